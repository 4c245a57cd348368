"""One level of features that lie on points instead of a grid."""

from typing import NamedTuple

from torch import Tensor


class PointFeature(NamedTuple):
    """Features of tokens and where the tokens lie.

    Attributes:
        feat: Float tensor ``[B, N, C]``.
        pos: Float32 tensor ``[B, N, 2]``, (x, y) of each token in cells of the stride-4 grid, whatever the level;
            integers, 0 <= x < w and 0 <= y < h.
        shape: Rows and columns (h, w) of the stride-4 grid.
    """

    feat: Tensor
    pos: Tensor
    shape: tuple[int, int]
