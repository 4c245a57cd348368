"""Data elements that cross module borders; they import nothing of ours."""

from boltz_mm.structures.point_feature import PointFeature

__all__ = ['PointFeature']
