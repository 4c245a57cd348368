"""The axis-aligned GIoU loss of 3D boxes."""

import torch

from boltz_mm.models.task_modules.box3d_overlaps import giou_3d
from boltz_mm.registry import MODELS


def test_box3d_giou_loss() -> None:
    found, wanted = torch.rand(2, 4, 7).unbind()
    each = 1 - giou_3d(found, wanted)
    build = lambda **kwargs: MODELS.build(dict(type='boltz_mm.Box3dGIoULoss', **kwargs))  # noqa: E731
    torch.testing.assert_close(build(reduction='none')(found, wanted), each)
    torch.testing.assert_close(build(loss_weight=2.0)(found, wanted), 2 * each.mean())
    torch.testing.assert_close(build()(found, wanted, avg_factor=10.0), each.sum() / 10)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    torch.testing.assert_close(build(reduction='sum')(found, wanted, weight), (each * weight).sum())


def test_box3d_giou_loss_without_boxes() -> None:
    found = torch.zeros(0, 7, requires_grad=True)
    loss = MODELS.build(dict(type='boltz_mm.Box3dGIoULoss'))(found, torch.zeros(0, 7), avg_factor=1.0)
    assert loss == 0
    loss.backward()
