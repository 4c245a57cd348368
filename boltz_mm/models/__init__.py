"""Registered model parts, by role."""

from boltz_mm.models import (  # noqa: F401  registers
    backbones,
    detectors,
    heads,
    layers,
    losses,
    necks,
    task_modules,
)
