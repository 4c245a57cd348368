"""Tokens of AutoFocusFormer to the feature maps that ordinary heads read.

The published heads work on the tokens themselves; this neck is ours.
"""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor

from boltz_mm import ops
from boltz_mm.models.layers.size_cache import SizeCache
from boltz_mm.registry import MODELS
from boltz_mm.structures import PointFeature

NUM_NEIGHBOURS = 4


def cell_centres(shape: tuple[int, int], step: int, device: torch.device | None = None) -> Tensor:
    """Centres of the cells of a coarser grid.

    Args:
        shape: Rows and columns (h, w) of the stride-4 grid.
        step: Stride-4 cells in a row of one coarse cell.
        device: Where the result lies.

    Returns:
        Float32 tensor ``[1, ceil(h / step) * ceil(w / step), 2]``, (x, y) in stride-4 cells, row by row.  Cell centres
        of the stride-4 grid have integers, so those of a coarse grid are ``step * i + (step - 1) / 2``; at the right
        and lower border they may lie outside of the canvas.
    """
    sides = [torch.arange(-(-size // step), device=device, dtype=torch.float32) for size in shape]
    y, x = torch.meshgrid(*(step * side + (step - 1) / 2 for side in sides), indexing='ij')
    return torch.stack((x, y), dim=-1).view(1, -1, 2)


@MODELS.register_module()
class PointsToGrid(BaseModule):
    """Interpolate each level of tokens at the cell centres of a grid.

    Level i becomes a map of stride ``2^(i+2)`` pixels.  A cell gets the features of the four tokens nearest to its
    centre, weighted by ``1 / (d^2)^power``; of all tokens where a level has fewer than four.  Ties of distance go to
    the token that comes first.  Level 0 has a token in each cell: its map is those tokens, put in their places.

    Args:
        levels: Level i of each input; ``None``: 0, 1, 2, ...
        power: Exponent of the squared distance; 3 is what the official pixel decoder uses between its levels.
        cache_size: Image sizes for which cell centres are kept.
        init_cfg: Config of the initialisation; the neck has no parameters.

    Raises:
        ValueError: A level is negative, or the power not positive.
    """

    def __init__(
        self,
        levels: Sequence[int] | None = None,
        power: float = 3.0,
        cache_size: int = 16,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if levels is not None and any(level < 0 for level in levels):
            raise ValueError(f'levels must not be negative, got {tuple(levels)}')
        if not power > 0:
            raise ValueError(f'power must be positive, got {power}')
        self.levels = None if levels is None else tuple(levels)
        self.power = power
        self.size_cache = SizeCache(cache_size)

    def forward(self, inputs: Sequence[PointFeature]) -> tuple[Tensor, ...]:
        """Make maps.

        Args:
            inputs: Tokens of each level, features ``[B, N_i, C_i]`` on one canvas (h, w).

        Returns:
            ``[B, C_i, ceil(h / 2^i), ceil(w / 2^i)]`` for each level i.

        Raises:
            ValueError: The number of inputs is not that of ``levels``; or level 0 has not one token for each cell.
        """
        levels = range(len(inputs)) if self.levels is None else self.levels
        if len(levels) != len(inputs):
            raise ValueError(f'expected {len(levels)} levels of tokens, got {len(inputs)}')
        return tuple(self._to_map(points, level) for points, level in zip(inputs, levels, strict=True))

    def _to_map(self, points: PointFeature, level: int) -> Tensor:
        feat, pos, shape = points
        batch, num_tokens, _ = feat.shape
        step = 2**level
        if level == 0:
            if num_tokens != shape[0] * shape[1]:
                raise ValueError(f'level 0 needs a token for each of {shape[0]} x {shape[1]} cells, got {num_tokens}')
            return ops.points_to_image(feat, pos, shape)
        centres = self.size_cache.get((shape, step), feat.device, lambda: cell_centres(shape, step, feat.device))
        centres = centres.expand(batch, -1, -1)
        index = ops.knn_points(centres, pos, min(NUM_NEIGHBOURS, num_tokens), canvas=shape)
        values = ops.inverse_distance_interpolate(feat, pos, centres, index, self.power)
        return values.transpose(1, 2).unflatten(2, tuple(-(-size // step) for size in shape))
