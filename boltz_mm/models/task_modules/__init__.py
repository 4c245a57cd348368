"""Registered task modules: coders, match costs, assigners."""

from boltz_mm.models.task_modules.box3d_coder import Box3dCoder
from boltz_mm.models.task_modules.box3d_match_costs import Box3dGIoUCost, Box3dL1Cost
from boltz_mm.models.task_modules.mask_hungarian_assigner import MaskHungarianAssigner
from boltz_mm.models.task_modules.reduced_hungarian_assigner import ReducedHungarianAssigner

__all__ = [
    'Box3dCoder',
    'Box3dGIoUCost',
    'Box3dL1Cost',
    'MaskHungarianAssigner',
    'ReducedHungarianAssigner',
]
