"""Metrics."""

from boltz_mm.evaluation.metrics import coco_category_id_metric  # noqa: F401
