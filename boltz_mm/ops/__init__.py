"""Custom operators; needs torch alone."""

from boltz_mm.ops._backend import available_backends, use_backend
from boltz_mm.ops.box_attention import (
    box_attention,
    box_attention_weights,
    box_sampling_locations,
    grid_points,
    instance_attention,
    instance_attention_weights,
)
from boltz_mm.ops.deform_attention import deform_attention

__all__ = [
    'available_backends',
    'box_attention',
    'box_attention_weights',
    'box_sampling_locations',
    'deform_attention',
    'grid_points',
    'instance_attention',
    'instance_attention_weights',
    'use_backend',
]
