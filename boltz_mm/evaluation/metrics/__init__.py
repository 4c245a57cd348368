"""Metrics."""

from boltz_mm.evaluation.metrics.coco_category_id_metric import CheckedCocoMetric, CocoCategoryIdMetric
from boltz_mm.evaluation.metrics.coco_panoptic_quality_metric import CocoPanopticQualityMetric

__all__ = ['CheckedCocoMetric', 'CocoCategoryIdMetric', 'CocoPanopticQualityMetric']
