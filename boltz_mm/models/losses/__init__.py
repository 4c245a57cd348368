"""Registered losses."""

from boltz_mm.models.losses.box3d_giou_loss import Box3dGIoULoss
from boltz_mm.models.losses.point_sampled_set_loss import PointSampledSetLoss

__all__ = [
    'Box3dGIoULoss',
    'PointSampledSetLoss',
]
