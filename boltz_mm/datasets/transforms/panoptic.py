"""Panoptic segments: the picture of ids is what gets augmented, masks are made from it at the end.

As the official AutoFocusFormer does (``mask_former_panoptic_dataset_mapper.py``); mmdet makes a bitmap for every thing
first and augments all of them.
"""

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

from boltz_mm.datasets.checked_coco import DatasetError
from boltz_mm.datasets.coco_panoptic import read_segment_ids
from boltz_mm.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadPanopticSegments(BaseTransform):
    """Read the picture of ids at ``seg_map_path`` into ``gt_seg_map`` (int32 ``[H, W]``, 0 is void).

    Ids of segments that the dataset left out, such as those of unknown categories, stay; they belong to no segment.

    Args:
        backend_args: Where files are read, see ``mmengine.fileio``.

    Raises:
        DatasetError: The picture cannot be read, has another size than the image, or has none of its segments.
    """

    def __init__(self, backend_args: dict | None = None) -> None:
        self.backend_args = backend_args

    def transform(self, results: dict) -> dict:  # noqa: D102
        path = results['seg_map_path']
        if path is None:
            return results
        ids = read_segment_ids(path, self.backend_args)
        height, width = results['height'], results['width']
        if ids.shape != (height, width):
            found = f'{ids.shape[1]} x {ids.shape[0]}'
            raise DatasetError(f'{path}: the picture of ids is {found} (width x height), the image {width} x {height}')
        listed = [segment['id'] for segment in results['segments_info']]
        if listed and not np.isin(listed, ids).any():
            raise DatasetError(f'{path}: the picture of ids has none of the segments, such as {listed[0]}')
        results['gt_seg_map'] = ids
        results.setdefault('seg_fields', []).append('gt_seg_map')
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(backend_args={self.backend_args})'


@TRANSFORMS.register_module()
class PanopticSegmentsToInstances(BaseTransform):
    """Make one instance of every segment, of things and of stuff: the targets of mask classification.

    ``gt_seg_map`` is taken away, ``gt_masks``, ``gt_bboxes``, ``gt_bboxes_labels`` and ``gt_ignore_flags`` are added,
    in the order of ``segments_info`` and without crowds.  mmdet's ``MaskFormerHead`` and its kind take instances as
    they are where there is no semantic map.

    Args:
        keep_empty: Keep segments of which augmentation has left no pixel, as the official code does: their masks are
            empty.
    """

    def __init__(self, keep_empty: bool = True) -> None:
        self.keep_empty = keep_empty

    def transform(self, results: dict) -> dict:  # noqa: D102
        ids = results.pop('gt_seg_map')
        results['seg_fields'] = [name for name in results.get('seg_fields', ()) if name != 'gt_seg_map']
        segments = [segment for segment in results['segments_info'] if not segment['iscrowd']]
        if not self.keep_empty:
            present = set(np.unique(ids).tolist())
            segments = [segment for segment in segments if segment['id'] in present]
        numbers = np.array([segment['id'] for segment in segments], dtype=np.int32)
        masks = BitmapMasks((ids == numbers[:, None, None]).astype(np.uint8), *ids.shape)
        results['gt_masks'] = masks
        # A mask without pixels has the box (0, 0, 0, 0).
        results['gt_bboxes'] = masks.get_bboxes(HorizontalBoxes) if segments else HorizontalBoxes(torch.zeros(0, 4))
        results['gt_bboxes_labels'] = np.array([segment['category'] for segment in segments], dtype=np.int64)
        results['gt_ignore_flags'] = np.zeros(len(segments), dtype=bool)
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(keep_empty={self.keep_empty})'
