"""Boxes of a point cloud in metres, and as the seven numbers in 0..1 that BoxeR-3D predicts.

Source: BoxeR, official file ``dataset/waymo.py`` (targets, and boxes of predictions in its evaluation).  With the range
of the point cloud as (min, extent), the code of a box is

    centre   (c - min) / extent,
    size     s / extent,
    heading  (h + pi) / (2 pi), with h wrapped to -pi..pi.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from boltz_mm.registry import TASK_UTILS


@TASK_UTILS.register_module()
class Box3dCoder:
    """Code of an upright box relative to the range of the point cloud.

    Args:
        point_cloud_range: (x, y, z) minimum, then maximum, metres.

    Raises:
        ValueError: The range is empty along an axis.
    """

    code_size = 7

    def __init__(self, point_cloud_range: Sequence[float] = (-75.0, -75.0, -3.0, 75.0, 75.0, 5.0)) -> None:
        self.point_cloud_range = tuple(float(v) for v in point_cloud_range)
        low, high = self.point_cloud_range[:3], self.point_cloud_range[3:]
        if len(self.point_cloud_range) != 6 or any(a >= b for a, b in zip(low, high, strict=False)):
            raise ValueError(f'point_cloud_range must be x, y, z minima then maxima, got {self.point_cloud_range}')

    def _low_and_extent(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low = like.new_tensor(self.point_cloud_range[:3])
        return low, like.new_tensor(self.point_cloud_range[3:]) - low

    def encode(self, boxes: Tensor) -> Tensor:
        """Code boxes.

        Args:
            boxes: Float tensor ``[..., 7]``: centre x, y, z and length, width, height in metres, heading in radians.

        Returns:
            Float tensor ``[..., 7]`` in the same order, in 0..1 for boxes whose centre lies in the range.
        """
        low, extent = self._low_and_extent(boxes)
        turns = (boxes[..., 6:] + math.pi) / (2 * math.pi)
        return torch.cat([(boxes[..., :3] - low) / extent, boxes[..., 3:6] / extent, turns - turns.floor()], dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Boxes of codes: the inverse of :meth:`encode`, headings in -pi..pi."""
        low, extent = self._low_and_extent(codes)
        heading = 2 * math.pi * codes[..., 6:] - math.pi
        return torch.cat([codes[..., :3] * extent + low, codes[..., 3:6] * extent, heading], dim=-1)
