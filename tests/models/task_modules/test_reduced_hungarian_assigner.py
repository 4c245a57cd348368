"""Reduced matching against the full assignment problem."""

import pytest
import torch
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment

from boltz_mm.models.task_modules.reduced_hungarian_assigner import ReducedHungarianAssigner, reduce_and_assign

COSTS = [
    dict(type='mmdet.FocalLossCost', weight=2.0, eps=1e-8),
    dict(type='mmdet.BBoxL1Cost', box_format='xywh', weight=5.0),
    dict(type='mmdet.IoUCost', iou_mode='giou', weight=2.0),
]


@pytest.mark.parametrize(('num_preds', 'num_gts'), [(500, 1), (500, 6), (40, 6), (36, 6), (6, 6), (4, 6), (2000, 20)])
@pytest.mark.parametrize('contested', [False, True])
def test_equals_the_full_problem(num_preds, num_gts, contested):
    generator = torch.Generator().manual_seed(num_preds + num_gts)
    cost = torch.rand(num_preds, num_gts, generator=generator, dtype=torch.float64)
    if contested:  # every object prefers the same predictions
        cost = cost * 1e-3 + torch.rand(num_preds, 1, generator=generator, dtype=torch.float64)
    preds, gts = reduce_and_assign(cost)
    wanted_preds, wanted_gts = linear_sum_assignment(cost.numpy())
    assert preds.tolist() == wanted_preds.tolist()
    assert gts.tolist() == wanted_gts.tolist()


def test_ties_reach_the_same_total():
    cost = torch.randint(0, 3, (300, 8), generator=torch.Generator().manual_seed(0)).double()
    preds, gts = reduce_and_assign(cost)
    assert len(set(preds.tolist())) == 8
    assert sorted(gts.tolist()) == list(range(8))
    wanted = linear_sum_assignment(cost.numpy())
    assert cost[preds, gts].sum() == cost.numpy()[wanted].sum()


def make_instances(num_preds=50, num_gts=3, num_classes=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(num_preds + num_gts, 4, generator=generator) * 40
    boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 1], 1).to(dtype)
    pred = InstanceData(scores=torch.randn(num_preds, num_classes, generator=generator).to(dtype))
    pred.bboxes = boxes[:num_preds]
    gt = InstanceData(labels=torch.arange(num_gts) % num_classes, bboxes=boxes[num_preds:].float())
    return pred, gt, dict(img_shape=(80, 100))


def test_assign_follows_the_interface_of_mmdet():
    pred, gt, meta = make_instances()
    result = ReducedHungarianAssigner(COSTS).assign(pred, gt, meta)
    matched = result.gt_inds.nonzero()[:, 0]
    assert result.num_gts == 3
    assert sorted(result.gt_inds[matched].tolist()) == [1, 2, 3]
    assert torch.equal(result.labels[matched], gt.labels[result.gt_inds[matched] - 1])
    assert (result.labels[result.gt_inds == 0] == -1).all()


@pytest.mark.parametrize(('num_preds', 'num_gts'), [(5, 0), (0, 3), (0, 0)])
def test_nothing_to_match(num_preds, num_gts):
    pred, gt, meta = make_instances(num_preds, num_gts)
    result = ReducedHungarianAssigner(COSTS).assign(pred, gt, meta)
    assert result.gt_inds.tolist() == [0] * num_preds


def test_half_precision_predictions_are_matched_in_float32():
    pred, gt, meta = make_instances(dtype=torch.bfloat16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert ReducedHungarianAssigner(COSTS).cost(pred, gt, meta).dtype == torch.float32


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize(('field', 'words'), [('scores', 'predicted scores'), ('bboxes', 'predicted bboxes')])
def test_non_finite_predictions_are_named(field, words, value):
    pred, gt, meta = make_instances()
    pred[field][7, 1] = value
    with pytest.raises(FloatingPointError, match=f'1 of 200 {words} are NaN or infinite'):
        ReducedHungarianAssigner(COSTS).assign(pred, gt, meta)


def test_non_finite_ground_truth_is_named():
    pred, gt, meta = make_instances()
    gt.bboxes[0, 0] = float('nan')
    with pytest.raises(FloatingPointError, match='ground-truth bboxes'):
        ReducedHungarianAssigner(COSTS).assign(pred, gt, meta)
