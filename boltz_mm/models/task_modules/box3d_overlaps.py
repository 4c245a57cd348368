"""Generalised IoU of 3D boxes.

Source: Rezatofighi et al., "Generalized Intersection over Union" (CVPR 2019), in three dimensions and without rotation
as in BoxeR, official ``criterion/losses.py::Boxer3DLoss``.  Deviation: 0 / 0 gives 0 in place of NaN.
"""

import torch
from torch import Tensor


def giou_3d(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of axis-aligned boxes, with broadcasting; headings are ignored.

    ``GIoU = I / U - (E - U) / E`` with the volumes of intersection, union and enclosing box.

    Args:
        boxes1: Float tensor ``[..., 6 or 7]``: centre x, y, z, then sizes along x, y, z, then anything.
        boxes2: Same, of a shape that broadcasts.

    Returns:
        Float tensor of the broadcast shape without the last dimension, in -1..1.  Two boxes of no volume have
        GIoU -1 or, when they coincide, 0; never NaN.
    """
    inner = outer = boxes1.new_ones(())
    # One axis at a time: the pairs of a first stage are millions, a last dimension of three would triple the peak.
    for axis in range(3):
        centre1, half1 = boxes1[..., axis], boxes1[..., axis + 3] / 2
        centre2, half2 = boxes2[..., axis], boxes2[..., axis + 3] / 2
        low1, high1, low2, high2 = centre1 - half1, centre1 + half1, centre2 - half2, centre2 + half2
        inner = inner * (torch.minimum(high1, high2) - torch.maximum(low1, low2)).clamp(min=0)
        outer = outer * (torch.maximum(high1, high2) - torch.minimum(low1, low2))
    union = boxes1[..., 3:6].prod(-1) + boxes2[..., 3:6].prod(-1) - inner
    tiny = torch.finfo(outer.dtype).tiny
    return inner / union.clamp(min=tiny) - (outer - union) / outer.clamp(min=tiny)
