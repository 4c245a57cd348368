"""Registered losses."""

from boltz_mm.models.losses import box3d_giou_loss  # noqa: F401
