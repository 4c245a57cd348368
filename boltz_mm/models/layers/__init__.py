"""Registered layers."""

from boltz_mm.models.layers import (  # noqa: F401
    box3d_transformer,
    box_attention,
    box_position,
    box_transformer,
    deform_attention,
)
