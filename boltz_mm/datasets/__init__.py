"""Datasets and their transforms."""

from boltz_mm.datasets import checked_coco, coco_category_id, transforms  # noqa: F401
