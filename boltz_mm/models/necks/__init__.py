"""Registered necks."""

from boltz_mm.models.necks.boxer_neck import BoxeRNeck

__all__ = ['BoxeRNeck']
