"""Matching of masks at sampled points."""

import pytest
import torch
from mmdet.models.task_modules.assigners import HungarianAssigner
from mmengine.structures import InstanceData

from boltz_mm.models.losses.point_sampled_set_loss import OFFICIAL_ASSIGNER
from boltz_mm.models.task_modules.mask_hungarian_assigner import MaskHungarianAssigner

COSTS = OFFICIAL_ASSIGNER['match_costs']


def instances(queries: int, objects: int) -> tuple[InstanceData, InstanceData]:
    predicted = InstanceData(scores=torch.randn(queries, 5), masks=torch.randn(queries, 30))
    return predicted, InstanceData(labels=torch.randint(4, (objects,)), masks=torch.rand(objects, 30).round())


@pytest.mark.parametrize(('queries', 'objects'), [(7, 3), (3, 7), (4, 0)])
def test_assigns_as_mmdet(queries: int, objects: int) -> None:
    torch.manual_seed(0)
    data = instances(queries, objects)
    ours, theirs = (kind(COSTS).assign(*data) for kind in (MaskHungarianAssigner, HungarianAssigner))
    assert torch.equal(ours.gt_inds, theirs.gt_inds)
    assert torch.equal(ours.labels, theirs.labels)


def test_several_images_at_once() -> None:
    torch.manual_seed(0)
    assigner = MaskHungarianAssigner(COSTS)
    costs = [assigner.cost(*instances(5, n)) for n in (2, 0, 8)]
    together = assigner.solve(costs)
    assert [len(q) for q, _ in together] == [2, 0, 5]
    for cost, pair in zip(costs, together, strict=True):
        [alone] = assigner.solve([cost])
        assert torch.equal(torch.stack(pair), torch.stack(alone))
        assert pair[0].tolist() == sorted(pair[0].tolist())
    assert assigner.solve([]) == []


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_cost_that_is_no_number_is_named(bad: float) -> None:
    cost = torch.rand(4, 3)
    cost[1, 2] = bad
    with pytest.raises(FloatingPointError, match='1 of 12 matching costs are NaN or infinite'):
        MaskHungarianAssigner(COSTS).solve([cost])
