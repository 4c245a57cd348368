"""Image transforms of BoxeR (arXiv 2111.13087; official ``e2edet/dataset/processor/{functional,processors}.py``).

They differ from mmdet's transforms of the same purpose in ways that move the numbers: the resized long side is rounded
down, images are resized by PIL (anti-aliased), a resized mask pixel is the nearest one of torch's rule, a crop keeps
every box that has an area (even where nothing of its mask is left), and scale jitter draws one offset for both axes.

Images are uint8 arrays ``[H, W, C]`` or ``[H, W]`` in any channel order; boxes are ``HorizontalBoxes``; masks may be
``BitmapMasks`` or ``PolygonMasks`` and become bitmaps at the size they have when they first meet a resize or a crop.
``gt_areas`` (float32 ``[N]``, pixels), if present, is carried along.

Deviations, all where the official code stops with an error: a side is never shorter than one pixel (a 1 x 5000 image
stays within the maximum), and a crop of an image that is smaller than the smallest crop takes the whole side.
"""

from collections.abc import Callable, Sequence

import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms import RandomChoice as _RandomChoice
from mmdet.datasets.transforms import RandomFlip as _RandomFlip
from mmdet.structures.bbox import HorizontalBoxes, autocast_box_type
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from PIL import Image

from boltz_mm.datasets.transforms.draws import Draws
from boltz_mm.registry import TRANSFORMS

Shape = tuple[int, int]  # height, width


def resized_shape(shape: Shape, size: int | tuple[int, int], max_size: int | None = None) -> Shape:
    """The official rule for the size after resizing.

    Args:
        shape: Height and width of the image.
        size: Length of the short side, or the exact (width, height).
        max_size: The long side may not be longer; the short side is made shorter for that (rounded, then the long
            side is computed from it and rounded down, so that it may stay below the maximum).

    Returns:
        Height and width after resizing, each at least 1.
    """
    if not isinstance(size, int):
        width, height = size
        return height, width
    short, long = min(shape), max(shape)
    if max_size is not None and long / short * size > max_size:
        size = int(round(max_size * short / long))
        if size < 1:  # a very long image; the rule below would make it longer than the maximum
            return (1, max_size) if shape[0] < shape[1] else (max_size, 1)
    if short == size:
        return shape
    other = int(size * long / short)
    return (size, other) if shape[0] <= shape[1] else (other, size)


def jittered_shape(shape: Shape, scale: float, target: Shape) -> Shape:
    """The size after scale jitter: the image is fitted into ``target * scale`` with its aspect ratio kept."""
    factor = min(target[0] * scale / shape[0], target[1] * scale / shape[1])
    height, width = (max(int(np.round(side * factor)), 1) for side in shape)
    return height, width


def nearest_indexes(size: int, new_size: int) -> np.ndarray:
    """Source index of every element when ``size`` elements are resized to ``new_size``, by torch's ``nearest``."""
    scale = np.float32(size) / np.float32(new_size)
    indexes = np.floor(np.arange(new_size, dtype=np.float32) * scale).astype(np.int64)
    return np.minimum(indexes, size - 1)


def resize_image(img: np.ndarray, shape: Shape) -> np.ndarray:
    """Anti-aliased bilinear resizing by PIL, equal for all of its versions.

    PIL rounds to uint8 after each of its two passes and since version 13 begins with the vertical one where that
    shrinks the image more; the golden numbers come from version 13, so the passes are made here in its order.

    Args:
        img: uint8 ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]``, channels in any order.
        shape: Height and width after resizing.

    Raises:
        TypeError: The image is of another kind (PIL would mix a fourth channel into the others).
    """
    if img.dtype != np.uint8 or img.shape[2:] not in ((), (1,), (3,)):
        raise TypeError(f'BoxeR resizes uint8 images of 1 or 3 channels, got {img.dtype} {list(img.shape)}')
    (old_height, old_width), (height, width) = img.shape[:2], shape
    rows_lost, columns_lost = old_height - height, old_width - width
    vertical_first = rows_lost > max(0, 2 * columns_lost)
    image = Image.fromarray(np.ascontiguousarray(img.squeeze(-1) if img.shape[2:] == (1,) else img))
    for size in ((old_width, height) if vertical_first else (width, old_height), (width, height)):
        if image.size != size:
            image = image.resize(size, Image.Resampling.BILINEAR)
    return np.array(image).reshape(height, width, *img.shape[2:])


def resize(results: dict, shape: Shape, nearest: Callable[[int, int], np.ndarray] = nearest_indexes) -> dict:
    """Resize everything in ``results`` to ``shape`` (height, width).

    Masks and label maps take the elements that ``nearest`` names, see :func:`nearest_indexes`.

    Sets ``img_shape``, ``scale`` (width, height), ``scale_factor`` (of this step; x, y) and ``homography_matrix``.

    Raises:
        TypeError: The image is not uint8.
    """
    img = results['img']
    old, (height, width) = img.shape[:2], shape
    factor = (width / old[1], height / old[0])
    results.update(
        img=resize_image(img, shape),
        img_shape=(height, width),
        scale=(width, height),
        scale_factor=factor,
        keep_ratio=True,
    )
    if results.get('gt_bboxes') is not None:
        results['gt_bboxes'].rescale_(factor)
    if results.get('gt_areas') is not None:
        results['gt_areas'] = results['gt_areas'] * np.float32(factor[0] * factor[1])
    rows, columns = nearest(old[0], height)[:, None], nearest(old[1], width)[None]
    if results.get('gt_masks') is not None:
        masks = _bitmaps(results['gt_masks'])
        results['gt_masks'] = BitmapMasks(masks.masks[:, rows, columns], height, width)
    if results.get('gt_seg_map') is not None:
        results['gt_seg_map'] = results['gt_seg_map'][rows, columns]
    _record(results, np.diag([*factor, 1.0]))
    return results


def crop(results: dict, top: int, left: int, shape: Shape) -> dict:
    """Cut the region of ``shape`` (height, width) at (top, left) out of everything in ``results``.

    Objects whose clipped box has no area are dropped, whatever their mask; areas become those of the clipped boxes.

    Raises:
        ValueError: The region does not lie inside the image.
    """
    old, (height, width) = results['img'].shape[:2], shape
    if not (0 <= top <= top + height <= old[0] and 0 <= left <= left + width <= old[1] and height and width):
        raise ValueError(f'crop {(top, left, height, width)} does not lie inside the image of {tuple(old)}')
    rows, columns = slice(top, top + height), slice(left, left + width)
    results.update(img=results['img'][rows, columns], img_shape=(height, width))
    if results.get('gt_seg_map') is not None:
        results['gt_seg_map'] = results['gt_seg_map'][rows, columns]
    if results.get('gt_masks') is not None:
        masks = _bitmaps(results['gt_masks']).masks[:, rows, columns]
        results['gt_masks'] = BitmapMasks(masks, height, width)
    if results.get('gt_bboxes') is not None:
        _crop_boxes(results, top, left, shape)
    _record(results, np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]]))
    return results


def _crop_boxes(results: dict, top: int, left: int, shape: Shape) -> None:
    boxes: HorizontalBoxes = results['gt_bboxes']
    boxes.translate_((-left, -top))
    boxes.clip_(shape)
    keep = ((boxes.widths > 0) & (boxes.heights > 0)).numpy()
    results['gt_bboxes'] = boxes[keep]
    for key in ('gt_bboxes_labels', 'gt_ignore_flags', 'gt_masks'):
        if results.get(key) is not None:
            results[key] = results[key][keep]
    if results.get('gt_areas') is not None:
        results['gt_areas'] = results['gt_bboxes'].areas.numpy()


def _bitmaps(masks: BitmapMasks | PolygonMasks) -> BitmapMasks:
    return masks if isinstance(masks, BitmapMasks) else masks.to_bitmap()


def _record(results: dict, matrix: np.ndarray) -> None:
    matrix = matrix.astype(np.float32)
    before = results.get('homography_matrix')
    results['homography_matrix'] = matrix if before is None else matrix @ before


@TRANSFORMS.register_module()
class BoxeRResize(BaseTransform):
    """Resize by the official rule (see :func:`resized_shape`).

    Args:
        size: Length of the short side, or the exact (width, height), in pixels.
        max_size: Largest length of the long side, ``None`` for no limit.
    """

    def __init__(self, size: int | Sequence[int], max_size: int | None = None) -> None:
        self.size = size if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.max_size = max_size

    @autocast_box_type()
    def transform(self, results: dict) -> dict:  # noqa: D102
        return resize(results, resized_shape(results['img'].shape[:2], self.size, self.max_size))

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size}, max_size={self.max_size})'


@TRANSFORMS.register_module()
class BoxeRRandomResize(BaseTransform):
    """Resize with the short side drawn from a list.

    Args:
        sizes: Lengths of the short side, in pixels.
        max_size: Largest length of the long side, ``None`` for no limit.
        draws: Source of the draw (one ``choice``); the global generators if ``None``.
    """

    def __init__(self, sizes: Sequence[int], max_size: int | None = None, draws: Draws | None = None) -> None:
        if not sizes:
            raise ValueError(f'sizes must not be empty, got {sizes}')
        self.sizes, self.max_size, self.draws = list(sizes), max_size, draws or Draws()

    @autocast_box_type()
    def transform(self, results: dict) -> dict:  # noqa: D102
        size = self.draws.choice(self.sizes)
        return resize(results, resized_shape(results['img'].shape[:2], size, self.max_size))

    def __repr__(self) -> str:
        return f'{type(self).__name__}(sizes={self.sizes}, max_size={self.max_size})'


@TRANSFORMS.register_module()
class BoxeRRandomCrop(BaseTransform):
    """Crop a window whose width and height are drawn from ``min_size`` to ``min(side, max_size)``.

    Args:
        min_size: Smallest side of the window, in pixels.
        max_size: Largest side of the window, in pixels.
        draws: Source of the draws (``randint`` for the width, then the height; ``torch_randint`` for top and left,
            unless the window is the whole image); the global generators if ``None``.
    """

    def __init__(self, min_size: int, max_size: int, draws: Draws | None = None) -> None:
        if not 1 <= min_size <= max_size:
            raise ValueError(f'need 1 <= min_size <= max_size, got {min_size} and {max_size}')
        self.min_size, self.max_size, self.draws = min_size, max_size, draws or Draws()

    @autocast_box_type()
    def transform(self, results: dict) -> dict:  # noqa: D102
        rows, columns = results['img'].shape[:2]
        width, height = self._draw_side(columns), self._draw_side(rows)
        if (height, width) == (rows, columns):
            return crop(results, 0, 0, (height, width))
        top = self.draws.torch_randint(0, rows - height + 1)
        left = self.draws.torch_randint(0, columns - width + 1)
        return crop(results, top, left, (height, width))

    def _draw_side(self, side: int) -> int:
        return self.draws.randint(min(self.min_size, side), min(self.max_size, side))

    def __repr__(self) -> str:
        return f'{type(self).__name__}(min_size={self.min_size}, max_size={self.max_size})'


@TRANSFORMS.register_module()
class BoxeRScaleJitter(BaseTransform):
    """Scale jitter of the 5x recipes: fit into ``target * scale`` with a drawn scale, crop to at most ``target``.

    Nothing is padded.  Both offsets of the crop come from one draw ``u``: ``round((size - target) * u)``.

    Args:
        target: Height and width, in pixels.
        min_scale: Smallest scale.
        max_scale: Largest scale.
        draws: Source of the draws (``uniform`` for the scale, ``numpy_uniform`` for the offset); the global
            generators if ``None``.
    """

    def __init__(
        self,
        target: Sequence[int] = (1024, 1024),
        min_scale: float = 0.4,
        max_scale: float = 2.0,
        draws: Draws | None = None,
    ) -> None:
        self.target: Shape = (int(target[0]), int(target[1]))
        self.min_scale, self.max_scale, self.draws = min_scale, max_scale, draws or Draws()

    @autocast_box_type()
    def transform(self, results: dict) -> dict:  # noqa: D102
        scale = self.draws.uniform(self.min_scale, self.max_scale)
        results = resize(results, jittered_shape(results['img'].shape[:2], scale, self.target))
        rows, columns = results['img'].shape[:2]
        height, width = min(rows, self.target[0]), min(columns, self.target[1])
        share = self.draws.numpy_uniform(0.0, 1.0)
        top, left = int(np.round((rows - height) * share)), int(np.round((columns - width) * share))
        return crop(results, top, left, (height, width))

    def __repr__(self) -> str:
        scales = f'min_scale={self.min_scale}, max_scale={self.max_scale}'
        return f'{type(self).__name__}(target={self.target}, {scales})'


@TRANSFORMS.register_module()
class BoxeRRandomFlip(_RandomFlip):
    """mmdet's ``RandomFlip`` in one direction, with the official draw (``random() < prob``).

    Args:
        prob: Chance of a flip.
        direction: ``'horizontal'``, ``'vertical'`` or ``'diagonal'``.
        draws: Source of the draw; the global generators if ``None``.
    """

    def __init__(self, prob: float = 0.5, direction: str = 'horizontal', draws: Draws | None = None) -> None:
        super().__init__(prob=float(prob), direction=direction)
        self.draws = draws or Draws()

    def _choose_direction(self) -> str | None:
        return self.direction if self.draws.random() < self.prob else None


@TRANSFORMS.register_module()
class BoxeRRandomChoice(_RandomChoice):
    """mmcv's ``RandomChoice`` with the official draw (python's ``choices``).

    Args:
        transforms: One list of transforms for each branch.
        prob: Chances of the branches; equal ones if ``None``.
        draws: Source of the draw (one ``weighted_index``); the global generators if ``None``.
    """

    def __init__(
        self, transforms: list[list[dict]], prob: list[float] | None = None, draws: Draws | None = None
    ) -> None:
        super().__init__(transforms, prob)
        self.draws = draws or Draws()

    def random_pipeline_index(self) -> int:  # noqa: D102
        return self.draws.weighted_index(self.prob or [1.0] * len(self.transforms))
