"""Metrics."""

from boltz_mm.evaluation.metrics.coco_category_id_metric import CheckedCocoMetric, CocoCategoryIdMetric

__all__ = ['CheckedCocoMetric', 'CocoCategoryIdMetric']
