"""Datasets and their transforms."""

from boltz_mm.datasets import transforms  # noqa: F401  registers
from boltz_mm.datasets.checked_coco import CheckedCocoDataset, DatasetError
from boltz_mm.datasets.cityscapes_panoptic import CityscapesPanopticDataset
from boltz_mm.datasets.coco_category_id import CocoCategoryIdDataset
from boltz_mm.datasets.coco_panoptic import CheckedCocoPanopticDataset

__all__ = [
    'CheckedCocoDataset',
    'CheckedCocoPanopticDataset',
    'CityscapesPanopticDataset',
    'CocoCategoryIdDataset',
    'DatasetError',
]
