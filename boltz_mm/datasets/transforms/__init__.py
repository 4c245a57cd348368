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

__all__ = [
    'BoxeRRandomChoice',
    'BoxeRRandomCrop',
    'BoxeRRandomFlip',
    'BoxeRRandomResize',
    'BoxeRResize',
    'BoxeRScaleJitter',
    'Draws',
    'RecordedDraws',
]
