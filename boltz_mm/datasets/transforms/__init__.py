"""Data transforms, and the one source of their random draws."""

from boltz_mm.datasets.transforms.boxer import (
    BoxeRRandomChoice,
    BoxeRRandomCrop,
    BoxeRRandomFlip,
    BoxeRRandomResize,
    BoxeRResize,
    BoxeRScaleJitter,
)
from boltz_mm.datasets.transforms.draws import Draws, RecordedDraws
from boltz_mm.datasets.transforms.panoptic import LoadPanopticSegments, PanopticSegmentsToInstances
from boltz_mm.datasets.transforms.short_edge import RandomShortEdgeResize

__all__ = [
    'BoxeRRandomChoice',
    'BoxeRRandomCrop',
    'BoxeRRandomFlip',
    'BoxeRRandomResize',
    'BoxeRResize',
    'BoxeRScaleJitter',
    'Draws',
    'LoadPanopticSegments',
    'PanopticSegmentsToInstances',
    'RandomShortEdgeResize',
    'RecordedDraws',
]
