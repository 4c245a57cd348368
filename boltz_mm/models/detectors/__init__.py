"""Registered detectors."""

from boltz_mm.models.detectors.boxer import BoxeR
from boltz_mm.models.detectors.boxer3d import BoxeR3D

__all__ = ['BoxeR', 'BoxeR3D']
