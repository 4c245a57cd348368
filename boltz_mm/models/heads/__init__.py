"""Registered heads."""

from boltz_mm.models.heads import boxer3d_head, boxer_head, boxer_mask_head  # noqa: F401
