"""Registered layers."""

from boltz_mm.models.layers import box_attention, box_position, box_transformer  # noqa: F401
