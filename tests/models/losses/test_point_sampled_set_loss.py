"""The set loss: where it equals mmdet's, where it does not, and bad input."""

import pytest
import torch
from mmdet.models.dense_heads import Mask2FormerHead
from mmdet.models.task_modules.samplers import MaskPseudoSampler
from mmengine.structures import InstanceData
from torch import Tensor

from boltz_mm.models.losses.point_sampled_set_loss import PointSampledSetLoss

CLASSES, QUERIES = 4, 6


def predictions(batch: int, layers: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    classes = [torch.randn(batch, QUERIES, CLASSES + 1, requires_grad=True) for _ in range(layers)]
    return classes, [torch.randn(batch, QUERIES, 8, 8, requires_grad=True) for _ in range(layers)]


def targets(*counts: int) -> list[InstanceData]:
    return [InstanceData(labels=torch.randint(CLASSES, (n,)), masks=torch.rand(n, 32, 32) > 0.5) for n in counts]


def loss_of(**kwargs) -> PointSampledSetLoss:
    return PointSampledSetLoss(CLASSES, **{'num_points': 64, **kwargs})


def mmdet_losses(loss: PointSampledSetLoss, classes: Tensor, masks: Tensor, wanted: list[InstanceData]) -> list[Tensor]:
    head = Mask2FormerHead.__new__(Mask2FormerHead)
    torch.nn.Module.__init__(head)
    head.num_classes, head.num_queries, head.class_weight = CLASSES, QUERIES, loss.class_weight
    head.num_points, head.oversample_ratio, head.importance_sample_ratio = 64, 3.0, 0.75
    head.loss_cls, head.loss_mask, head.loss_dice = loss.loss_cls, loss.loss_mask, loss.loss_dice
    head.assigner, head.sampler = loss.assigner, MaskPseudoSampler(context=head)
    wanted = [InstanceData(labels=t.labels, masks=t.masks.long()) for t in wanted]
    return list(head._loss_by_feat_single(classes, masks, wanted, [{}] * len(wanted)))


def test_equals_mmdet_where_every_image_has_objects() -> None:
    torch.manual_seed(0)
    loss, wanted, (classes, masks) = loss_of(), targets(3, 2), predictions(2, layers=1)
    torch.manual_seed(1)
    ours = list(loss(classes, masks, wanted).values())
    torch.manual_seed(1)
    theirs = mmdet_losses(loss, classes[0], masks[0], wanted)
    torch.testing.assert_close(ours, [t.squeeze() for t in theirs], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('counts', 'official', 'mmdet'), [((3, 0), 3, 4), ((9,), 9, 6), ((0, 0), 1, None)])
def test_masks_are_divided_by_the_number_of_all_objects(
    counts: tuple[int, ...], official: int, mmdet: int | None
) -> None:
    torch.manual_seed(0)
    loss, wanted, (classes, masks) = loss_of(), targets(*counts), predictions(len(counts), layers=1)
    torch.manual_seed(1)
    ours = loss(classes, masks, wanted)
    if mmdet is None:
        assert ours['loss_mask'] == ours['loss_dice'] == 0
        assert ours['loss_cls'] > 0
        return
    torch.manual_seed(1)
    _, mask, dice = mmdet_losses(loss, classes[0], masks[0], wanted)
    torch.testing.assert_close(ours['loss_mask'] * official, (mask * mmdet).squeeze(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours['loss_dice'] * official, (dice * mmdet).squeeze(), rtol=1e-5, atol=1e-6)


def test_without_objects_masks_stay_in_the_graph() -> None:
    classes, masks = predictions(2)
    sum(loss_of()(classes, masks, targets(0, 0)).values()).backward()
    assert all(m.grad is not None and not m.grad.any() for m in masks)
    assert all(c.grad.any() for c in classes)


def test_names_and_order_of_draws() -> None:
    loss, sizes = loss_of(num_points=20), []

    def rand(size: tuple[int, ...], device: torch.device) -> Tensor:
        sizes.append(size)
        return torch.rand(size, device=device)

    loss.rand = rand
    found = loss(*predictions(2, layers=3), targets(1, 2))
    assert list(found)[:4] == ['loss_cls', 'loss_mask', 'loss_dice', 'd0.loss_cls']
    assert sizes == [(1, 20, 2), (1, 20, 2), (3, 60, 2), (3, 5, 2)] * 3


def test_points_are_the_least_certain_ones() -> None:
    loss = loss_of(num_points=8, oversample_ratio=4.0, importance_sample_ratio=0.5)
    ramp = torch.linspace(-4, 4, 64).expand(1, 64, 64).contiguous()
    points = loss.draw_points(ramp)
    assert points.shape == (1, 8, 2)
    candidates = loss.num_candidates
    torch.manual_seed(3)
    x = torch.rand(1, candidates, 2)[0, :, 0]
    torch.manual_seed(3)
    chosen = loss.draw_points(ramp)[0, :4, 0]
    assert set(chosen.tolist()) == set(x[(x - 0.5).abs().argsort()[:4]].tolist())


def test_is_computed_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    classes, masks = predictions(1)
    wanted = targets(2)
    torch.manual_seed(1)
    expected = loss_of()(classes, masks, wanted)
    torch.manual_seed(1)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = loss_of()(classes, masks, wanted)
    torch.testing.assert_close(found, expected)


def test_nan_is_named() -> None:
    classes, masks = predictions(1)
    with torch.no_grad():
        masks[-1][0, 2] = float('nan')
    with pytest.raises(FloatingPointError, match='matching costs are NaN'):
        loss_of()(classes, masks, targets(2))


def test_a_label_out_of_range_is_named() -> None:
    wanted = targets(2, 1)
    wanted[1].labels[0] = CLASSES
    with pytest.raises(ValueError, match=rf'labels of image 1 must be within 0\.\.3, got \[{CLASSES}\]'):
        loss_of()(*predictions(2), wanted)


@pytest.mark.parametrize(
    'bad',
    [
        {'num_points': 0},
        {'importance_sample_ratio': 1.5},
        {'oversample_ratio': 0.5},
        {'loss_cls': {'type': 'mmdet.CrossEntropyLoss', 'class_weight': [1.0, 2.0]}},
    ],
)
def test_bad_settings(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)) if 'loss_cls' not in bad else 'class_weight'):
        loss_of(**bad)
