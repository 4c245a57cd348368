"""Box codes, overlaps and matching costs of BoxeR-3D."""

import math

import pytest
import torch
from mmengine.structures import InstanceData

from boltz_mm.models.task_modules.box3d_coder import Box3dCoder
from boltz_mm.models.task_modules.box3d_overlaps import giou_3d
from boltz_mm.registry import TASK_UTILS

RANGE = (-10.0, -20.0, -3.0, 10.0, 20.0, 5.0)


def test_code_of_a_known_box() -> None:
    box = torch.tensor([[0.0, 10.0, 1.0, 4.0, 2.0, 1.6, math.pi / 2]])
    wanted = torch.tensor([[0.5, 0.75, 0.5, 0.2, 0.05, 0.2, 0.75]])
    torch.testing.assert_close(Box3dCoder(RANGE).encode(box), wanted)


def test_decoding_inverts_encoding_up_to_full_turns() -> None:
    coder = Box3dCoder(RANGE)
    boxes = torch.rand(50, 7, dtype=torch.float64) * 4 - 2
    boxes[:, 6] *= 10
    back = coder.decode(coder.encode(boxes))
    torch.testing.assert_close(back[:, :6], boxes[:, :6])
    turns = (back[:, 6] - boxes[:, 6]) / (2 * math.pi)
    torch.testing.assert_close(turns, turns.round())
    assert back[:, 6].abs().max() <= math.pi


@pytest.mark.parametrize('bad', [(0.0, 0, 0, 1, 1, 0), (0.0, 0, 0, 1, 1)])
def test_coder_refuses_an_empty_range(bad: tuple) -> None:
    with pytest.raises(ValueError, match='point_cloud_range must be'):
        Box3dCoder(bad)


def test_giou_of_known_boxes() -> None:
    unit = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.3])
    beside = torch.tensor([2.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.9])
    half = torch.tensor([0.25, 0.0, 0.0, 0.5, 1.0, 1.0, 0.0])
    assert giou_3d(unit, unit) == 1
    torch.testing.assert_close(giou_3d(unit, half), torch.tensor(0.5))
    torch.testing.assert_close(giou_3d(unit, beside), torch.tensor(-1 / 3))


def test_giou_is_symmetric_and_bounded() -> None:
    a, b = torch.rand(2, 30, 7).unbind()
    pairs = giou_3d(a[:, None], b)
    assert pairs.shape == (30, 30)
    torch.testing.assert_close(pairs, giou_3d(b[:, None], a).T)
    assert pairs.min() >= -1
    assert pairs.max() <= 1


def test_giou_of_boxes_without_volume_is_finite_with_its_gradient() -> None:
    boxes = torch.zeros(2, 7, requires_grad=True)
    other = torch.tensor([[0.0] * 7, [0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]])
    giou = giou_3d(boxes, other)
    assert giou.tolist() == [0, -1]
    giou.sum().backward()
    assert bool(boxes.grad.isfinite().all())


def test_giou_gradient() -> None:
    a, b = torch.rand(2, 6, 7, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(giou_3d, (a.requires_grad_(), b.requires_grad_()))


def test_costs_pair_by_pair() -> None:
    predicted, wanted = torch.rand(5, 7), torch.rand(3, 7)
    arguments = (InstanceData(bboxes=predicted), InstanceData(bboxes=wanted))
    size = TASK_UTILS.build(dict(type='boltz_mm.Box3dL1Cost', weight=5.0))(*arguments)
    heading = TASK_UTILS.build(dict(type='boltz_mm.Box3dL1Cost', columns=(6, 7), weight=4.0))(*arguments)
    overlap = TASK_UTILS.build(dict(type='boltz_mm.Box3dGIoUCost', weight=2.0))(*arguments)
    assert size.shape == heading.shape == overlap.shape == (5, 3)
    for i in range(5):
        for j in range(3):
            difference = (predicted[i] - wanted[j]).abs()
            torch.testing.assert_close(size[i, j], 5 * difference[:6].sum())
            torch.testing.assert_close(heading[i, j], 4 * difference[6])
            torch.testing.assert_close(overlap[i, j], -2 * giou_3d(predicted[i], wanted[j]))
