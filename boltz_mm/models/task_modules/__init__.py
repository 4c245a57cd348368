"""Registered task modules."""

from boltz_mm.models.task_modules import (  # noqa: F401
    box3d_coder,
    box3d_match_costs,
    box3d_overlaps,
    reduced_hungarian_assigner,
)
