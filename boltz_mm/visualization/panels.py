"""Pictures of ground truth and detections that stay readable for small images, and sheets of several of them.

The drawing itself is mmdet's ``DetLocalVisualizer``; images are enlarged first, because it draws lines and text of a
fixed least size, which would cover the objects of a 128-pixel image.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.models.utils import mask2ndarray
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData, PixelData

LEAST_SIDE = 400
"""Pictures are enlarged by the whole number that brings their shorter side to about this many pixels."""


def drawing_scale(image: np.ndarray, least_side: int = LEAST_SIDE) -> int:
    """The whole number, at least 1, by which :func:`enlarge` should enlarge an image [H, W, 3]."""
    return max(1, round(least_side / min(image.shape[:2])))


def enlarge(image: np.ndarray, sample: DetDataSample, scale: int) -> tuple[np.ndarray, DetDataSample]:
    """Enlarge an image and what is known of it.

    Args:
        image: RGB, uint8 [H, W, 3].
        sample: Its ground truth and predictions, in pixels of the image; left as it is.
        scale: How many times larger.

    Returns:
        Image [H * scale, W * scale, 3] and a sample with plain boxes, cut at the image's border, and boolean masks of
        that size.  Pixels are repeated, not interpolated.
    """
    large = image if scale == 1 else cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    result = DetDataSample(metainfo=sample.metainfo)
    for name in ('gt_instances', 'pred_instances'):
        if name in sample:
            setattr(result, name, _enlarge_instances(getattr(sample, name), scale, large.shape))
    for name in ('gt_sem_seg', 'pred_sem_seg', 'gt_panoptic_seg', 'pred_panoptic_seg'):
        if name in sample:
            maps = {key: _repeat(torch.as_tensor(value), scale) for key, value in getattr(sample, name).items()}
            setattr(result, name, PixelData(**maps))
    return large, result


def _repeat(tensor: torch.Tensor, scale: int) -> torch.Tensor:
    return tensor.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)


def _enlarge_instances(instances: InstanceData, scale: int, shape: tuple[int, ...]) -> InstanceData:
    result = InstanceData(metainfo=instances.metainfo)
    for key in ('labels', 'scores', 'label_names'):
        if key in instances:
            result[key] = instances[key]
    if 'bboxes' in instances:
        boxes = get_box_tensor(instances.bboxes) * scale
        # A box that leaves the image would make the visualizer shrink the image to show all of it.
        limits = boxes.new_tensor([shape[1], shape[0], shape[1], shape[0]])
        result.bboxes = boxes.clamp(min=0).minimum(limits)
    if 'masks' in instances:
        masks = instances.masks
        masks = masks if isinstance(masks, torch.Tensor) else torch.from_numpy(mask2ndarray(masks))
        result.masks = _repeat(masks.bool(), scale).cpu()
    return result


def make_visualizer(dataset_meta: dict[str, Any]) -> DetLocalVisualizer:
    """A visualizer that draws but stores nothing.

    Args:
        dataset_meta: ``classes`` and ``palette``, as far as they are known.

    Returns:
        The visualizer.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*backend is not initialized')
        visualizer = DetLocalVisualizer(line_width=2, alpha=0.5)
    visualizer.dataset_meta = dataset_meta
    return visualizer


def draw_panel(
    visualizer: DetLocalVisualizer,
    image: np.ndarray,
    sample: DetDataSample,
    *,
    draw_gt: bool = True,
    draw_pred: bool = True,
    score_thr: float = 0.3,
    least_side: int = LEAST_SIDE,
) -> np.ndarray:
    """Draw ground truth (left) and predictions (right) of one image.

    Args:
        visualizer: See :func:`make_visualizer`; one with backends would store every panel.
        image: RGB, uint8 [H, W, 3].
        sample: Ground truth and predictions in pixels of the image.
        draw_gt: Draw the ground truth.
        draw_pred: Draw the predictions.
        score_thr: Least score of a drawn prediction.
        least_side: See :data:`LEAST_SIDE`.

    Returns:
        RGB picture, uint8 [h, w, 3].
    """
    large, sample = enlarge(image, sample, drawing_scale(image, least_side))
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*out of bounds')  # a box that ends with the image
        visualizer.add_datasample(
            'panel', large, sample, draw_gt=draw_gt, draw_pred=draw_pred, pred_score_thr=score_thr
        )
    return visualizer.get_image()


def make_sheet(pictures: Sequence[np.ndarray], columns: int = 2, gap: int = 12) -> np.ndarray:
    """Lay pictures out in rows on white.

    Args:
        pictures: RGB, uint8 [h, w, 3], of any sizes.
        columns: Pictures in a row.
        gap: Pixels between them.

    Returns:
        RGB, uint8 [H, W, 3].

    Raises:
        ValueError: If there are no pictures.
    """
    if not pictures:
        raise ValueError('a sheet needs at least one picture')
    columns = min(columns, len(pictures))
    height = max(p.shape[0] for p in pictures) + gap
    width = max(p.shape[1] for p in pictures) + gap
    sheet = np.full((math.ceil(len(pictures) / columns) * height + gap, columns * width + gap, 3), 255, np.uint8)
    for k, picture in enumerate(pictures):
        row, column = divmod(k, columns)
        y, x = row * height + gap, column * width + gap
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return sheet
