"""Registered necks."""

from boltz_mm.models.necks.boxer_neck import BoxeRNeck
from boltz_mm.models.necks.points_to_grid import PointsToGrid

__all__ = ['BoxeRNeck', 'PointsToGrid']
