"""Resizing by the short side as detectron2 does (its ``ResizeShortestEdge``), for recipes that come from there.

Both sides are rounded to the nearest pixel, images are resized by PIL (anti-aliased), masks and label maps take the
pixel under the centre.  mmcv's ``Resize`` gives the same sizes but, by default, no anti-aliasing, and PIL there takes
no maps of more than 8 bits.
"""

from collections.abc import Sequence

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.structures.bbox import autocast_box_type

from boltz_mm.datasets.transforms.boxer import Shape, resize
from boltz_mm.datasets.transforms.draws import Draws
from boltz_mm.registry import TRANSFORMS


def short_edge_shape(shape: Shape, size: int, max_size: int | None = None) -> Shape:
    """Height and width, at least 1 each, after resizing ``shape`` to a short side of ``size``.

    Args:
        shape: Height and width of the image.
        size: Length of the short side.
        max_size: The long side may not be longer; the short side becomes shorter for that.
    """
    scale = size / min(shape)
    sides = [float(size) if side == min(shape) else scale * side for side in shape]
    if max_size is not None and max(sides) > max_size:
        scale = max_size / max(sides)
        sides = [side * scale for side in sides]
    height, width = (max(int(side + 0.5), 1) for side in sides)
    return height, width


def centre_indexes(size: int, new_size: int) -> np.ndarray:
    """Source index of every element when ``size`` elements are resized to ``new_size``: the one under the centre."""
    return ((np.arange(new_size) + 0.5) * (size / new_size)).astype(np.int64).clip(max=size - 1)


@TRANSFORMS.register_module()
class RandomShortEdgeResize(BaseTransform):
    """Resize with the short side drawn from a list.

    Args:
        sizes: Lengths of the short side in pixels, or one length.
        max_size: Largest length of the long side, ``None`` for no limit.
        draws: Source of the draw (one ``choice``; none for one length); the global generators if ``None``.

    Raises:
        ValueError: There is no length.
    """

    def __init__(self, sizes: int | Sequence[int], max_size: int | None = None, draws: Draws | None = None) -> None:
        self.sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        if not self.sizes:
            raise ValueError(f'sizes must not be empty, got {sizes}')
        self.max_size, self.draws = max_size, draws or Draws()

    @autocast_box_type()
    def transform(self, results: dict) -> dict:  # noqa: D102
        size = self.sizes[0] if len(self.sizes) == 1 else self.draws.choice(self.sizes)
        return resize(results, short_edge_shape(results['img'].shape[:2], size, self.max_size), centre_indexes)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(sizes={self.sizes}, max_size={self.max_size})'
