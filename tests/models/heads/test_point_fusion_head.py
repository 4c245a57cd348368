"""Official post-processing on masks made by hand, and mmdet's form of it."""

import pytest
import torch
from mmdet.models.seg_heads import MaskFormerFusionHead
from mmdet.structures import DetDataSample
from torch import Tensor

from boltz_mm.models.heads.point_fusion_head import (
    PointMaskFusionHead,
    instance_inference,
    panoptic_inference,
    semantic_inference,
)
from boltz_mm.models.heads.point_mask2former_head import upsample_masks

META = dict(img_shape=(30, 32), ori_shape=(15, 16), batch_input_shape=(32, 32))


def certain(*labels: int, num_classes: int = 4, logit: float = 8.0) -> Tensor:
    """Class logits of queries that are sure of these classes; ``num_classes`` is "no object"."""
    return logit * torch.eye(num_classes + 1)[list(labels)]


def strips(*spans: tuple[int, int], logit: float = 6.0, width: int = 12) -> Tensor:
    """Mask logits of queries that are sure of these columns."""
    x = torch.arange(width)
    rows = [torch.where((x >= a) & (x < b), logit, -logit) for a, b in spans]
    return torch.stack(rows)[:, None].expand(-1, 3, -1).contiguous()


def test_segments_are_numbered_by_query_and_stuff_is_shared() -> None:
    # Stuff 2, thing 0, "no object", stuff 2 again, thing 0 again.
    classes = certain(2, 0, 4, 2, 0)
    masks = strips((0, 2), (2, 4), (4, 6), (6, 8), (8, 10))
    ids, segments = panoptic_inference(classes, masks, things=[0, 1])
    assert ids.dtype == torch.int32
    assert ids[0].tolist() == [1, 1, 2, 2, 0, 0, 1, 1, 3, 3, 0, 0]
    assert [tuple(s) for s in segments] == [(1, 2, False), (2, 0, True), (3, 0, True)]


def test_covered_queries_and_low_scores_are_left_out() -> None:
    classes = certain(0, 1, 3)
    classes[1] *= 0.99  # loses its columns to query 0 but for one
    classes[2] = certain(3, logit=1.0)  # sure of nothing
    ids, segments = panoptic_inference(classes, strips((0, 6), (1, 7), (8, 10)), things=[0, 1])
    assert [s.category_id for s in segments] == [0]
    assert ids[0].tolist() == [1] * 6 + [0] * 6


def test_a_segment_without_confident_pixels_is_left_out() -> None:
    # Query 1 wins columns 6.. only where its mask is below 0.5, and has a confident pixel that query 0 takes.
    classes, masks = certain(0, 1), strips((0, 6), (6, 12))
    masks[1] = torch.where(masks[1] > 0, -0.1, masks[1])
    masks[1, :, 0] = 0.1
    ids, segments = panoptic_inference(classes, masks, things=[0, 1], overlap_thr=0.5)
    assert [s.category_id for s in segments] == [0]
    assert ids.unique().tolist() == [0, 1]
    head = MaskFormerFusionHead(2, 2, test_cfg=dict(iou_thr=0.5, filter_low_score=True, object_mask_thr=0.8))
    ours = PointMaskFusionHead(2, 2, test_cfg=dict(iou_thr=0.5)).panoptic_postprocess(classes, masks)
    theirs = head.panoptic_postprocess(classes, masks)
    assert torch.equal(ours.sem_seg, theirs.sem_seg)


def test_nothing_found() -> None:
    ids, segments = panoptic_inference(certain(4, 4), strips((0, 3), (3, 6)), things=[0])
    assert not ids.any()
    assert ids.shape == (3, 12)
    assert segments == []
    data = PointMaskFusionHead(2, 2).panoptic_postprocess(certain(4), strips((0, 3)))
    assert data.sem_seg.unique().tolist() == [4]


@pytest.mark.parametrize('seed', range(3))
def test_panoptic_codes_tell_the_same_segments_as_mmdet(seed: int) -> None:
    torch.manual_seed(seed)
    classes, masks = torch.randn(8, 5) * 4, torch.nn.functional.interpolate(torch.randn(1, 8, 4, 4) * 5, size=(16, 16))
    cfg = dict(iou_thr=0.3, object_mask_thr=0.5, filter_low_score=True)
    ours = PointMaskFusionHead(2, 2, test_cfg=cfg).panoptic_postprocess(classes, masks[0])
    theirs = MaskFormerFusionHead(2, 2, test_cfg=cfg).panoptic_postprocess(classes, masks[0])
    assert torch.equal(ours.sem_seg % 1000, theirs.sem_seg % 1000)
    pairs = torch.stack((ours.sem_seg.flatten(), theirs.sem_seg.flatten())).unique(dim=1)
    assert len(pairs[0].unique()) == len(pairs[1].unique()) == pairs.shape[1]
    assert len(ours.segments_info) == len(ours.segment_ids.unique()) - int((ours.segment_ids == 0).any())


def test_instances() -> None:
    classes, masks = torch.zeros(2, 4), strips((0, 4), (6, 12), logit=2.0)
    classes[0, 1], classes[1, 2] = 3.0, 2.0
    found = instance_inference(classes, masks, max_per_image=2)
    probability = classes.softmax(-1)
    assert found.labels.tolist() == [1, 2]
    inside = torch.tensor(2.0).sigmoid() * 12 / (12 + 1e-6)
    torch.testing.assert_close(found.scores[0], probability[0, 1] * inside)
    assert torch.equal(found.masks, masks > 0)
    assert found.bboxes.tolist() == [[0, 0, 4, 3], [6, 0, 12, 3]]


def test_things_are_chosen_after_the_best() -> None:
    classes, masks = torch.zeros(2, 4), strips((0, 4), (6, 12))
    classes[:, 1] = 3.0
    assert len(instance_inference(classes, masks, max_per_image=2, things=[0, 2])) == 0
    assert len(instance_inference(classes, masks, max_per_image=100)) == 6
    assert instance_inference(classes, masks, 100, things=[2]).labels.tolist() == [2, 2]


def test_an_empty_mask_has_score_zero() -> None:
    found = instance_inference(certain(0), strips((0, 0)), max_per_image=1)
    assert found.scores.tolist() == [0]
    assert not found.masks.any()


def test_semantic_maps() -> None:
    torch.manual_seed(0)
    classes, masks = torch.randn(2, 5, 4), torch.randn(2, 5, 6, 7)
    maps = semantic_inference(classes, masks)
    expected = sum(classes[1, q].softmax(0)[2] * masks[1, q, 3, 4].sigmoid() for q in range(5))
    torch.testing.assert_close(maps[1, 2, 3, 4], expected)
    assert maps.shape == (2, 3, 6, 7)


def test_results_have_the_size_asked_for() -> None:
    head = PointMaskFusionHead(1, 2, dict(instance_on=True, semantic_on=True))
    sample = DetDataSample(metainfo=dict(img_shape=(10, 12), ori_shape=(20, 24)))
    classes, masks = certain(0, 2, num_classes=3)[None], torch.randn(1, 2, 16, 16)
    [plain] = head.predict(classes, masks, [sample])
    [full] = head.predict(classes, masks, [sample], rescale=True)
    for result, size in ((plain, (10, 12)), (full, (20, 24))):
        assert result['pan_results'].shape == result['sem_results'].shape == size
        assert result['ins_results'].masks.shape[1:] == size
        assert set(result['ins_results'].labels.tolist()) == {0}
    only_semantic = PointMaskFusionHead(1, 2, dict(panoptic_on=False, semantic_on=True))
    assert set(only_semantic.predict(classes, masks, [sample])[0]) == {'sem_results'}


@pytest.mark.parametrize('tasks', [('panoptic_on',), ('instance_on',), ('panoptic_on', 'instance_on', 'semantic_on')])
def test_masks_of_the_grid_give_the_same(tasks: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    cfg = {name: name in tasks for name in ('panoptic_on', 'instance_on', 'semantic_on')}
    head = PointMaskFusionHead(2, 2, {**cfg, 'object_mask_thr': 0.5, 'iou_thr': 0.1, 'max_per_image': 4})
    meta = dict(img_shape=(27, 30), ori_shape=(50, 60), batch_input_shape=(32, 32))
    classes, masks = torch.randn(1, 9, 5) * 3, torch.randn(1, 9, 8, 8)
    assert len(head.needed_queries(classes[0])) < 9 or cfg['semantic_on']
    sample = DetDataSample(metainfo=meta)
    [small] = head.predict(classes, masks, [sample], rescale=True)
    full = torch.nn.functional.interpolate(
        upsample_masks(masks, (32, 32))[..., :27, :30], size=(50, 60), mode='bilinear', align_corners=False
    )
    if cfg['panoptic_on']:
        expected = head.panoptic_postprocess(classes[0], full[0])
        assert torch.equal(small['pan_results'].segment_ids, expected.segment_ids)
    if cfg['instance_on']:
        expected = head.instance_postprocess(classes[0], full[0])
        assert torch.equal(small['ins_results'].masks, expected.masks)
        assert torch.equal(small['ins_results'].labels, expected.labels)
        torch.testing.assert_close(small['ins_results'].scores, expected.scores)
    if cfg['semantic_on']:
        expected = head.semantic_postprocess(classes[0], full[0])
        torch.testing.assert_close(small['sem_results'].logits, expected.logits)


def test_no_query_is_good_enough() -> None:
    head = PointMaskFusionHead(2, 2)
    [result] = head.predict(certain(4, 4)[None], torch.randn(1, 2, 8, 8), [DetDataSample(metainfo=META)])
    assert result['pan_results'].sem_seg.unique().tolist() == [4]


def test_semantic_maps_alone_are_made_before_resizing() -> None:
    torch.manual_seed(0)
    head = PointMaskFusionHead(2, 2, dict(panoptic_on=False, semantic_on=True))
    classes, masks = torch.randn(1, 3, 5), 4 * torch.randn(1, 3, 8, 8)
    [result] = head.predict(classes, masks, [DetDataSample(metainfo=META)], rescale=True)
    maps = semantic_inference(classes, upsample_masks(masks, (32, 32)))[..., :30, :32]
    expected = torch.nn.functional.interpolate(maps, size=(15, 16), mode='bilinear', align_corners=False)[0]
    torch.testing.assert_close(result['sem_results'].logits, expected)
    first = PointMaskFusionHead(2, 2, dict(panoptic_on=True, semantic_on=True))
    [other] = first.predict(classes, masks, [DetDataSample(metainfo=META)], rescale=True)
    assert not torch.allclose(other['sem_results'].logits, expected, atol=1e-3)
