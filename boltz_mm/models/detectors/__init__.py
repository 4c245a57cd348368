"""Registered detectors."""

from boltz_mm.models.detectors.boxer import BoxeR  # noqa: F401
from boltz_mm.models.detectors.boxer3d import BoxeR3D  # noqa: F401
