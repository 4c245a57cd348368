"""Losses and results of BoxeR's head from given predictions."""

import numpy as np
import pytest
import torch
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData

from boltz_mm.models.heads.boxer_head import BoxeRHead

NUM_CLASSES = 5
SIZES = [(60, 80), (48, 64)]


def make_batch(num_objects=(3, 0), seed=0, with_masks=True):
    generator = torch.Generator().manual_seed(seed)
    instances, metas = [], []
    for count, (height, width) in zip(num_objects, SIZES, strict=True):
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
        boxes = corners.flatten(1) * torch.tensor([width, height, width, height]) + torch.tensor([0.0, 0, 1, 1])
        gt = InstanceData(bboxes=boxes, labels=torch.randint(NUM_CLASSES, (count,), generator=generator))
        if with_masks:
            # As the data preprocessor gives them: padded to the batch.
            padded = np.zeros((count, 60, 80), dtype=np.uint8)
            padded[:, :height, :width] = torch.rand(count, height, width, generator=generator).numpy() > 0.5
            gt.masks = BitmapMasks(padded, 60, 80)
        instances.append(gt)
        metas.append({'img_shape': (height, width)})
    return instances, metas


def make_predictions(layers=2, queries=9, tokens=40, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    return {
        'cls': [leaf(2, queries, NUM_CLASSES) for _ in range(layers)],
        'box': [leaf(2, queries, 4) for _ in range(layers)],
        'mask': [leaf(2, queries, 28, 28) for _ in range(layers)],
        'enc_cls': leaf(2, tokens, 1),
        'enc_box': leaf(2, tokens, 4),
    }


def compute_losses(head, predictions, instances, metas, **kwargs):
    def mask_logits(layer, rows):
        return torch.cat([predictions['mask'][layer][b, r] for b, r in enumerate(rows)])

    return head.loss_by_feat(
        predictions['cls'],
        [b.sigmoid() for b in predictions['box']],
        predictions['enc_cls'],
        predictions['enc_box'].sigmoid(),
        instances,
        metas,
        mask_logits=mask_logits if head.with_mask else None,
        **kwargs,
    )


def total(losses):
    return sum(value for name, value in losses.items() if 'loss' in name)


def leaves(predictions):
    return [p for v in predictions.values() for p in (v if isinstance(v, list) else [v])]


def test_names_of_losses():
    losses = compute_losses(BoxeRHead(NUM_CLASSES, 16, with_mask=True), make_predictions(), *make_batch())
    layer = ['loss_cls', 'loss_bbox', 'loss_iou', 'loss_mask', 'loss_dice']
    wanted = layer + [f'd0.{n}' for n in layer] + [f'enc_{n}' for n in layer[:3]] + ['accuracy']
    assert sorted(losses) == sorted(wanted)
    assert all(value.shape == () for value in losses.values())
    losses = compute_losses(BoxeRHead(NUM_CLASSES, 16), make_predictions(), *make_batch(with_masks=False))
    assert not any('mask' in n or 'dice' in n for n in losses)


@pytest.mark.parametrize('num_objects', [(3, 2), (0, 2), (0, 0)])
def test_every_prediction_gets_a_finite_gradient(num_objects):
    head = BoxeRHead(NUM_CLASSES, 16, with_mask=True)
    predictions = make_predictions()
    losses = compute_losses(head, predictions, *make_batch(num_objects))
    assert all(value.isfinite() for value in losses.values())
    for gradient in torch.autograd.grad(total(losses), leaves(predictions)):
        assert gradient.isfinite().all()


def test_num_boxes_normalises_all_losses():
    head = BoxeRHead(NUM_CLASSES, 16, with_mask=True)
    predictions, batch = make_predictions(), make_batch((3, 1))
    by_default = total(compute_losses(head, predictions, *batch))
    torch.testing.assert_close(total(compute_losses(head, predictions, *batch, num_boxes=4.0)), by_default)
    doubled = total(compute_losses(head, predictions, *batch, num_boxes=torch.tensor(8.0)))
    torch.testing.assert_close(doubled * 2, by_default)


def test_accumulated_images_give_the_loss_of_the_batch():
    head = BoxeRHead(NUM_CLASSES, 16, with_mask=True)
    predictions, (instances, metas) = make_predictions(), make_batch((3, 1))
    whole = total(compute_losses(head, predictions, instances, metas))
    parts = 0
    for b in range(2):
        one = slice(b, b + 1)
        image = {k: [v[one] for v in vs] if isinstance(vs, list) else vs[one] for k, vs in predictions.items()}
        parts = parts + total(compute_losses(head, image, [instances[b]], [metas[b]], num_boxes=4.0))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize('kind', ['tensor', 'polygons'])
def test_other_kinds_of_masks(kind):
    head = BoxeRHead(NUM_CLASSES, 16, with_mask=True)
    predictions, (instances, metas) = make_predictions(), make_batch((2, 0))
    polygons = [[np.array([3.0, 4, 50, 4, 50, 40, 3, 40])], [np.array([10.0, 10, 70, 10, 70, 55])]]
    instances[0].masks = PolygonMasks(polygons, 60, 80)
    instances[1].masks = PolygonMasks([], 48, 64)
    wanted = compute_losses(head, predictions, instances, metas)
    assert wanted['loss_mask'] > 0
    if kind == 'tensor':
        for gt in instances:
            gt.masks = torch.from_numpy(gt.masks.to_ndarray()).bool()
        torch.testing.assert_close(compute_losses(head, predictions, instances, metas), wanted)


@pytest.mark.parametrize(('label', 'words'), [(5, 'label 5 does not fit num_classes=5'), (-1, 'label -1')])
def test_labels_out_of_range_are_named(label, words):
    instances, metas = make_batch((3, 2))
    instances[1].labels[0] = label
    with pytest.raises(ValueError, match=words):
        compute_losses(BoxeRHead(NUM_CLASSES, 16, with_mask=True), make_predictions(), instances, metas)


def test_masks_and_with_mask_go_together():
    predictions, batch = make_predictions(), make_batch()
    boxes = [b.sigmoid() for b in predictions['box']]
    with pytest.raises(ValueError, match='mask_logits must be given'):
        BoxeRHead(NUM_CLASSES, 16, with_mask=True).loss_by_feat(predictions['cls'], boxes, None, None, *batch)


def test_missing_masks_are_named():
    with pytest.raises(ValueError, match="ground truth has none: load it with 'with_mask=True'"):
        compute_losses(BoxeRHead(NUM_CLASSES, 16, with_mask=True), make_predictions(), *make_batch(with_masks=False))


@pytest.mark.parametrize('which', ['cls', 'box', 'enc_cls', 'enc_box'])
def test_nan_predictions_are_named(which):
    predictions = make_predictions()
    with torch.no_grad():
        (predictions[which] if which.startswith('enc') else predictions[which][0])[0, 3] = float('nan')
    with pytest.raises(FloatingPointError, match='predicted (scores|bboxes) are NaN or infinite'):
        compute_losses(BoxeRHead(NUM_CLASSES, 16, with_mask=True), predictions, *make_batch())


def test_configs_may_name_losses_of_mmdet_without_prefix():
    head = BoxeRHead(NUM_CLASSES, 16, loss_bbox=dict(type='SmoothL1Loss', loss_weight=3.0))
    assert type(head.loss_bbox).__name__ == 'SmoothL1Loss'


def test_initial_weights():
    head = BoxeRHead(NUM_CLASSES, 16, with_mask=True)
    head.init_weights()
    probability = head.cls_branch.bias.sigmoid()
    torch.testing.assert_close(probability, torch.full_like(probability, 0.01))
    references = torch.rand(2, 7, 4) * 0.8 + 0.1
    _, boxes = head(torch.randn(1, 2, 7, 16), references)
    torch.testing.assert_close(boxes[0], references)


# ------------------------------------------------------------------------------------------------------ results


def predict(head, num_images=2, queries=30, rescale=True, masks=None, seed=0, metas=None):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_images, queries, NUM_CLASSES, generator=generator)
    boxes = torch.rand(num_images, queries, 4, generator=generator)
    metas = metas or [{'img_shape': (60, 80), 'ori_shape': (30, 40), 'scale_factor': (2.0, 2.0)}] * num_images
    logits = None
    if masks is not None:

        def logits(layer, rows):
            return torch.cat([masks[b, r] for b, r in enumerate(rows)])

    return scores, boxes, head.predict_by_feat(scores, boxes, metas, mask_logits=logits, rescale=rescale)


def test_best_pairs_by_falling_score():
    scores, _, results = predict(BoxeRHead(NUM_CLASSES, 16))
    for image, result in zip(scores, results, strict=True):
        assert len(result) == 100
        best = image.sigmoid().flatten().sort(descending=True).values[:100]
        torch.testing.assert_close(result.scores, best)
        torch.testing.assert_close(result.scores, image.sigmoid()[result.query_inds, result.labels])


def test_fewer_pairs_than_max_per_img():
    _, _, results = predict(BoxeRHead(NUM_CLASSES, 16, test_cfg=dict(max_per_img=1000)))
    assert len(results[0]) == 30 * NUM_CLASSES


def test_threshold_takes_all_pairs_above():
    scores, _, results = predict(BoxeRHead(NUM_CLASSES, 16, test_cfg=dict(score_thr=0.6, max_per_img=1)))
    assert [len(r) for r in results] == [(s.sigmoid() > 0.6).sum() for s in scores]
    _, _, results = predict(BoxeRHead(NUM_CLASSES, 16, test_cfg=dict(score_thr=1.0)))
    assert [len(r) for r in results] == [0, 0]
    assert results[0].bboxes.shape == (0, 4)


def test_no_detection_with_masks():
    head = BoxeRHead(NUM_CLASSES, 16, with_mask=True, test_cfg=dict(score_thr=1.0))
    _, _, results = predict(head, masks=torch.zeros(2, 30, 28, 28))
    assert results[0].masks.shape == (0, 30, 40)


@pytest.mark.parametrize('rescale', [True, False])
def test_boxes_and_masks_are_in_the_wanted_image(rescale):
    _, boxes, results = predict(
        BoxeRHead(NUM_CLASSES, 16, with_mask=True), rescale=rescale, masks=torch.full((2, 30, 28, 28), 5.0)
    )
    height, width = (30, 40) if rescale else (60, 80)
    result = results[1]
    cx, cy, w, h = boxes[1, result.query_inds].unbind(1)
    wanted = torch.stack([(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height], 1)
    torch.testing.assert_close(result.bboxes, wanted)
    assert (result.bboxes < 0).any(), 'officially boxes are not clipped'
    assert result.masks.shape == (100, height, width)
    assert result.masks.dtype == torch.bool
    area = result.masks.sum((1, 2))
    inside = wanted.clamp(min=0)
    inside = (inside[:, 2].clamp(max=width) - inside[:, 0]) * (inside[:, 3].clamp(max=height) - inside[:, 1])
    assert ((area - inside).abs() <= 2 * (width + height)).all()


def test_clipped_boxes():
    _, _, results = predict(BoxeRHead(NUM_CLASSES, 16, test_cfg=dict(clip_boxes=True)))
    for result in results:
        assert result.bboxes.min() >= 0
        assert (result.bboxes <= torch.tensor([40.0, 30, 40, 30])).all()


def test_scores_are_rescored_by_masks_and_empty_masks_give_zero():
    head = BoxeRHead(NUM_CLASSES, 16, with_mask=True)
    masks = torch.full((2, 30, 28, 28), 2.0)
    masks[:, ::2] = -2.0
    scores, _, results = predict(head, masks=masks)
    for image, result in zip(scores, results, strict=True):
        probability = image.sigmoid()[result.query_inds, result.labels]
        empty = result.query_inds % 2 == 0
        assert (result.scores[empty] == 0).all()
        assert not result.masks[empty].any()
        seen = ~empty & result.masks.any((1, 2))
        # Inside a mask of constant logits the probability falls only where the border fades.
        ratio = result.scores[seen] / probability[seen]
        assert ((ratio <= torch.tensor(2.0).sigmoid() + 1e-6) & (ratio >= 0.5)).all()
        assert (result.scores.diff() <= 0).all()


def test_masks_are_asked_once_for_distinct_queries():
    head, asked = BoxeRHead(NUM_CLASSES, 16, with_mask=True), []
    generator = torch.Generator().manual_seed(0)
    scores, boxes = torch.randn(2, 30, NUM_CLASSES, generator=generator), torch.rand(2, 30, 4, generator=generator)

    def mask_logits(layer, rows):
        asked.append(rows)
        return torch.zeros(sum(len(r) for r in rows), 28, 28)

    metas = [{'img_shape': (60, 80)}] * 2
    results = head.predict_by_feat(scores, boxes, metas, mask_logits=mask_logits)
    assert len(asked) == 1
    for rows, result in zip(asked[0], results, strict=True):
        assert sorted(rows.tolist()) == sorted(set(result.query_inds.tolist()))
