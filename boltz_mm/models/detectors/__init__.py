"""Registered detectors."""

from boltz_mm.models.detectors.boxer import BoxeR
from boltz_mm.models.detectors.boxer3d import BoxeR3D
from boltz_mm.models.detectors.point_mask2former import PointMask2Former

__all__ = [
    'BoxeR',
    'BoxeR3D',
    'PointMask2Former',
]
