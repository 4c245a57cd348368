"""Datasets and their transforms."""

from boltz_mm.datasets import transforms  # noqa: F401  registers
from boltz_mm.datasets.checked_coco import CheckedCocoDataset, DatasetError
from boltz_mm.datasets.coco_category_id import CocoCategoryIdDataset

__all__ = ['CheckedCocoDataset', 'CocoCategoryIdDataset', 'DatasetError']
