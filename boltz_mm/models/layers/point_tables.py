"""Neighbour tables of token sets on a canvas: which tokens are near each cell.

All positions are (x, y) in cells of one canvas ``(h, w)``.  The official code searches these neighbours anew wherever
it needs them (in every mask prediction, and twice for the finest level); here each table is made once per
forward, and what depends on the canvas alone once per canvas.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from boltz_mm.models.layers.size_cache import SizeCache
from boltz_mm.ops import knn_points, nearest_clusters

Canvas = tuple[int, int]
"""Height and width of the grid that positions live on, as Python numbers."""

# Among the nearest cells at most 8 are equally far: (1, 2) and its mirrors; farther ones only get more beyond the 20th.
_MAX_NEIGHBORS = 9
_MAX_TIE = 8
# The nine nearest cells of a cell that is farther than this from all borders are the same everywhere.
_FAR = 6

_CACHE = SizeCache(maxsize=32)


def cell_index(pos: Tensor, canvas: Canvas) -> Tensor:
    """Row-major cell of each position.

    Args:
        pos: Integer-valued positions (x, y) ``[B, N, 2]`` inside the canvas.
        canvas: Height and width.

    Returns:
        int64 ``[B, N]``.
    """
    x, y = pos.long().unbind(-1)
    return y * canvas[1] + x


def grid_positions(canvas: Canvas, device: torch.device | str = 'cpu', dtype: torch.dtype = torch.float32) -> Tensor:
    """Positions of all cells in row-major order, ``[h * w, 2]``."""
    height, width = canvas
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=dtype), torch.arange(width, device=device, dtype=dtype), indexing='ij'
    )
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def token_of_cell(pos: Tensor, canvas: Canvas) -> Tensor:
    """The token that stands on each cell of a full grid, the inverse of :func:`cell_index`.

    Args:
        pos: Positions ``[B, h * w, 2]``, every cell once, in any order.
        canvas: Height and width.

    Returns:
        int64 ``[B, h * w]``.

    Raises:
        ValueError: The number of tokens is not that of the cells.
    """
    batch, num_tokens, _ = pos.shape
    height, width = canvas
    if num_tokens != height * width:
        raise ValueError(f'a full grid of {height} x {width} cells has {height * width} tokens, got {num_tokens}')
    tokens = torch.arange(num_tokens, device=pos.device).expand(batch, -1)
    return torch.empty_like(tokens).scatter_(1, cell_index(pos, canvas), tokens)


def nearest_tables(positions: list[Tensor], canvas: Canvas, k: int = 4) -> Tensor:
    """The k nearest tokens of every cell, for each level.

    A level with fewer than ``k`` tokens repeats them in order of distance (nearest first), so that an interpolation
    over a table is exact for one or two tokens and favours the nearest one where k is no multiple of their number.

    Args:
        positions: Positions of each level's tokens, ``[B, N_l, 2]``.
        canvas: Height and width.
        k: Neighbours of a cell.

    Returns:
        Indexes within the level, int32 ``[B, L, h * w, k]``, ascending distance, ties to the lowest index.

    Raises:
        ValueError: A level has no tokens.
    """
    tables = []
    for level, pos in enumerate(positions):
        if pos.shape[1] == 0:
            raise ValueError(f'level {level} has no tokens')
        grid = canvas_positions(canvas, pos.device).to(pos.dtype).expand(pos.shape[0], -1, -1)
        table = nearest_clusters(grid, pos, min(k, pos.shape[1]), canvas=canvas)
        if table.shape[-1] < k:
            table = table.repeat(1, 1, -(-k // table.shape[-1]))[..., :k]
        tables.append(table)
    return torch.stack(tables, dim=1)


def canvas_positions(canvas: Canvas, device: torch.device) -> Tensor:
    """:func:`grid_positions` in float32, kept for each canvas and device."""
    return _CACHE.get(('positions', canvas), device, lambda: grid_positions(canvas, device))


class GridPlan(NamedTuple):
    """What the size of a canvas says about the k nearest cells of each cell.

    Attributes:
        cells: The k nearest cells, ascending distance, ties in row-major order, ``[h * w, k]``.
        candidates: The nearest cells up to the end of the last tie that touches rank k, ``[h * w, K]``.
        ranks: Number of smaller distances of each candidate, ``[h * w, K]``.
        tied: Cells whose k nearest depend on how tokens are numbered (cells near a corner), ``[A]``.
    """

    cells: Tensor
    candidates: Tensor
    ranks: Tensor
    tied: Tensor


def grid_plan(canvas: Canvas, device: torch.device, k: int) -> GridPlan:
    """The k nearest cells of each cell (k of 1..9), kept for each canvas and device."""
    return _CACHE.get(('plan', canvas, k), device, lambda: _make_grid_plan(canvas, device, k))


def _make_grid_plan(canvas: Canvas, device: torch.device, k: int) -> GridPlan:
    grid = grid_positions(canvas, device)[None]
    extent = min(grid.shape[1], k + _MAX_TIE)
    candidates, distance = (t[0] for t in knn_points(grid, grid, extent, return_distance=True, canvas=canvas))
    ranks = torch.zeros_like(candidates)
    ranks[:, 1:] = (distance[:, 1:] > distance[:, :-1]).cumsum(dim=1)
    tied = _tied_cells(canvas, k).to(device)
    return GridPlan(candidates[:, :k].contiguous(), candidates, ranks, tied)


def _tied_cells(canvas: Canvas, k: int) -> Tensor:
    """Cells with equally near cells on both sides of rank k, in ascending order; on the CPU.

    Only the way to the border counts, so a small canvas tells them, and nothing is read back from a device.
    """
    height, width = (min(size, 2 * _FAR + 1) for size in canvas)
    grid = grid_positions((height, width))
    distance = (grid[:, None] - grid[None]).square().sum(dim=-1).sort(dim=1).values
    if k == len(grid):
        return torch.zeros(0, dtype=torch.long)
    tied = (distance[:, k - 1] == distance[:, k]).view(height, width)
    rows, columns = (_representatives(size) for size in canvas)
    return tied[rows[:, None], columns].flatten().nonzero()[:, 0]


def _representatives(size: int) -> Tensor:
    """For each row (or column), the one of a small canvas that is as far from both borders, if that is not far."""
    places = torch.arange(size)
    return places.clamp(max=_FAR) + (places - max(size - 1 - _FAR, _FAR)).clamp(min=0)


def grid_neighbors(tokens: Tensor, canvas: Canvas, k: int = 9, *, ordered: bool = False) -> Tensor:
    """The k nearest cells of every cell of a full grid, as a search among the tokens finds them.

    The search takes the token with the lowest number among equally near ones.  That matters near the corners only;
    everywhere else the neighbours follow from the canvas and are not searched at all.

    Args:
        tokens: The token on each cell, int64 ``[B, h * w]`` (:func:`token_of_cell`).
        canvas: Height and width.
        k: Neighbours of a cell, itself included; all cells where the canvas has fewer.
        ordered: Also put equally near neighbours into the order of their tokens.

    Returns:
        Cells, int64 ``[B, h * w, k]``, in ascending distance.

    Raises:
        ValueError: ``k`` is not within 1..9.
    """
    if not 1 <= k <= _MAX_NEIGHBORS:
        raise ValueError(f'k must be within 1..{_MAX_NEIGHBORS}, got {k}')
    batch, num_cells = tokens.shape
    k = min(k, num_cells)
    plan = grid_plan(canvas, tokens.device, k)
    rows = torch.arange(num_cells, device=tokens.device) if ordered else plan.tied
    candidates = plan.candidates[rows]
    # Distance decides first, the number of the token second.
    key = plan.ranks[rows] * num_cells + tokens[:, candidates]
    nearest = candidates.expand(batch, -1, -1).gather(2, key.argsort(dim=-1)[..., :k])
    return plan.cells.expand(batch, -1, -1).index_copy(1, rows, nearest)
