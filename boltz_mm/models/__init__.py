"""Registered model parts, by role."""

from boltz_mm.models import (  # noqa: F401
    backbones,
    data_preprocessors,
    detectors,
    heads,
    layers,
    losses,
    necks,
    segmentors,
    task_modules,
)
