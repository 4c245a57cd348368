"""Balanced clusters of tokens along a space-filling curve.

Source: AutoFocusFormer (arXiv 2304.12406), section 3.2; official ``point_utils.py::space_filling_cluster`` with
``calculate_peano_order`` and ``calculate_hilbert_order``.

Tokens are sorted along a curve and cut into runs of ``cluster_size``.  With anchors (the published models) the canvas
is cut into about as many cells as there are clusters; the curve orders the cells, and inside of a cell a token stands
by how much nearer it is to the centre of the previous cell than to that of the next::

    ratio = |pos - previous|^2 / (|pos - next|^2 + 1e-5)
    key   = rank(cell) * (max(ratio) + 1) + ratio

in float32 with one rounding per operation, the maximum over the whole batch.  Equal keys are common, and whoever
rounds otherwise gets other clusters; they keep the order of the input here (the official code leaves it open).

Deviations, all of them where the official code fails: with fewer than 3 cells, or none along an axis, the tokens
themselves are sorted along the curve; the first level of a Hilbert curve on a wide canvas is a row of blocks of 2 x 2
(see :func:`hilbert_values`); a Peano curve wider than its rounded number of columns goes on in the same pattern.
``per_image`` takes the maximum of the ratio for each image, so that an image does not depend on the others.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltz_mm.ops._backend import has_native_operators, use_native
from boltz_mm.ops.neighbors import check_canvas, check_positions

CURVES = ('scan', 'peano', 'hilbert')
_HILBERT_TURNS = ((-1, 1, 0, 0), (0, -1, 0, 1), (1, 0, -1, 0))  # by state mod 3 and cell x + 2 y
_HILBERT_ORDERS = ((0, 3, 1, 2), (2, 3, 1, 0), (2, 1, 3, 0), (0, 1, 3, 2))  # by state mod 4 and cell
_PEANO_ORDER = ((2, 3, 8), (1, 4, 7), (0, 5, 6))  # by y and x


class Clusters(NamedTuple):
    """Tokens in clusters of equal size.

    Attributes:
        order: ``[B, N]`` int64, the input token at each place along the curve.
        pos: ``[B, N, 2]`` float32, positions in that order, or as given without reordering.
        means: ``[B, K, 2]`` float32, mean position of each cluster's tokens.
        index: ``[B, K, cluster_size]`` int64, rows of ``pos`` that belong to a cluster; 0 where the last one is short.
        mask: ``[B, K, cluster_size]`` int64, 1 for a token and 0 for padding; ``None`` without padding.
    """

    order: Tensor
    pos: Tensor
    means: Tensor
    index: Tensor  # type: ignore[assignment]  # in place of tuple.index
    mask: Tensor | None


def space_filling_clusters(
    pos: Tensor,
    cluster_size: int,
    canvas: tuple[int, int],
    *,
    curve: str = 'scan',
    anchors: bool = True,
    reorder: bool = True,
    per_image: bool = False,
) -> Clusters:
    """Cut tokens into clusters along a space-filling curve; see the top of this file.

    Args:
        pos: ``[B, N, 2]``, (x, y) with ``0 <= x < width`` and ``0 <= y < height``; computed in float32.
        cluster_size: Tokens of a cluster; the last one may be short.
        canvas: (height, width).
        curve: ``'scan'`` (rows to and fro), ``'peano'`` or ``'hilbert'``.
        anchors: Order cells of the canvas along the curve, else the tokens themselves.
        reorder: Return positions in the order of the curve, so that cluster c is rows ``c * cluster_size`` and on.
        per_image: Take the largest ratio of each image, not of the batch.

    Returns:
        :class:`Clusters` of ``K = ceil(N / cluster_size)`` clusters.  No gradient flows.

    On a device other than the CPU, where looking would wait, tokens outside of the canvas count to the nearest cell.

    Raises:
        TypeError: ``pos`` is neither floating point nor int32 or int64.
        ValueError: Unknown curve, a cluster size below 1, or an empty canvas.
        RuntimeError: A token lies outside of the canvas (on the CPU).
    """
    pos, height, width = _check(pos, cluster_size, canvas, curve)
    batch, tokens = pos.shape[:2]
    count = -(-tokens // cluster_size)
    arguments = (pos, cluster_size, height, width)
    if use_native(pos.device):
        order, ordered, means = torch.ops.boltz_mm.space_filling_order(
            *arguments, CURVES.index(curve), anchors, per_image
        )
    else:
        order, ordered, means = reference_space_filling_order(*arguments, curve, anchors, per_image)
    place = torch.arange(count * cluster_size, device=pos.device).view(1, count, cluster_size)
    padded = count * cluster_size != tokens
    if reorder:
        index = torch.where(place < tokens, place, 0) if padded else place
        index = index.expand(batch, -1, -1)
    else:
        index = torch.nn.functional.pad(order, (0, count * cluster_size - tokens)).view(batch, count, cluster_size)
    mask = (place < tokens).to(torch.int64).expand(batch, -1, -1) if padded else None
    return Clusters(order, ordered if reorder else pos, means, index, mask)


def space_filling_keys(
    pos: Tensor,
    cluster_size: int,
    canvas: tuple[int, int],
    *,
    curve: str = 'scan',
    anchors: bool = True,
    per_image: bool = False,
) -> Tensor:
    """The keys by which :func:`space_filling_clusters` sorts, for tests and pictures; the arguments are the same.

    Returns:
        ``[B, N]``: float32 with anchors, places along the curve in int64 without.
    """
    pos, height, width = _check(pos, cluster_size, canvas, curve)
    return reference_keys(pos, cluster_size, height, width, curve, anchors, per_image)


def _check(pos: Tensor, cluster_size: int, canvas: tuple[int, int], curve: str) -> tuple[Tensor, int, int]:
    pos = check_positions('pos', pos)
    height, width = check_canvas(canvas)
    if cluster_size < 1:
        raise ValueError(f'cluster_size must be at least 1, got {cluster_size}')
    if curve not in CURVES:
        raise ValueError(f'curve must be one of {list(CURVES)}, got {curve!r}')
    return pos, height, width


def anchor_grid(tokens: int, cluster_size: int, height: int, width: int, curve: str) -> tuple[int, int]:
    """Rows and columns of anchor cells; (0, 0) where the tokens themselves are to be sorted along the curve.

    Args:
        tokens: Number of tokens N.
        cluster_size: Tokens of a cluster.
        height: Height of the canvas.
        width: Its width.
        curve: One of :data:`CURVES`.
    """
    if tokens == 0:
        return 0, 0
    side = math.sqrt(height * width / -(-tokens // cluster_size))
    rows, columns = round(height / side), round(width / side)
    if rows < 1:
        return 0, 0
    if curve == 'peano':
        rows = max(3, 3 ** round(math.log(rows, 3)))
        columns = round(round(width / height * 3) * (rows / 3))
    elif curve == 'hilbert':
        rows = max(2, 2 ** round(math.log(rows, 2)))
        columns = round(round(width / height * 2) * (rows / 2))
    return (rows, columns) if rows * columns >= 3 else (0, 0)


def curve_values(cells: Tensor, height: int, width: int, curve: str) -> Tensor:
    """Places of cells along a curve; they ascend along it, but need not be consecutive.

    Args:
        cells: ``[..., 2]`` float32 integers (x, y).
        height: Height of the canvas in cells.
        width: Its width.
        curve: One of :data:`CURVES`.

    Returns:
        ``[...]`` int64.
    """
    if curve == 'peano':
        return peano_values(cells, height)
    if curve == 'hilbert':
        return hilbert_values(cells, height, width)
    x, y = cells.to(torch.int64).unbind(-1)
    return y * width + torch.where(y % 2 == 0, x, width - 1 - x)


def peano_values(cells: Tensor, height: int) -> Tensor:
    """Places along a Peano curve of 3 x 3 blocks, wider or narrower in its first level.

    Columns of the first level are ``height / 3`` wide; every 3 of them are a block of the pattern, every other block
    upside-down, so that the curve goes on through them.

    Args:
        cells: ``[..., 2]`` float32 integers (x, y).
        height: Height of the canvas in cells.
    """
    levels = math.ceil(math.log(height, 3)) if height > 1 else 1
    pattern = torch.tensor(_PEANO_ORDER, device=cells.device)
    value = torch.zeros(cells.shape[:-1], dtype=torch.int64, device=cells.device)
    flip_x, flip_y = torch.zeros_like(value, dtype=torch.bool), torch.zeros_like(value, dtype=torch.bool)
    size = float(height)
    for level in range(levels):
        size = size / 3
        at = (cells / size).floor()
        cells = (cells - at * size).clamp(min=0)
        x, y = at.to(torch.int64).unbind(-1)
        if level == 0:
            turns, block = x % 2, x // 3
            value, x = 9 * block, x % 3
            row = torch.where(block % 2 == 1, 2 - y, y)
        else:
            x, y, value = x.clamp(max=2), y.clamp(max=2), value * 9
            x, row = torch.where(flip_x, 2 - x, x), torch.where(flip_y, 2 - y, y)
            turns = x % 2
        value = value + pattern[row.clamp(0, 2), x]
        # The next level of a middle row goes from right to left, of a middle column upside-down.
        flip_x, flip_y = flip_x ^ (y == 1), flip_y ^ (turns == 1)
    return value


def hilbert_values(cells: Tensor, height: int, width: int) -> Tensor:
    """Places along the Hilbert curve of the official code, and along a row of such curves on a wide canvas.

    Columns of the first level are ``height / 2`` wide.  With two of them, or one, this is the official order.  With
    more, where that has none, the first level is a row of 2 x 2 blocks, each in the order of the first one, after which
    the next one begins; a turn of a column is that of the same column of its block.

    Args:
        cells: ``[..., 2]`` float32 integers (x, y).
        height: Height of the canvas in cells.
        width: Its width.
    """
    levels = math.ceil(math.log(height, 2)) if height > 1 else 1
    size = height / 2
    columns = max(1, round(2 / height * width), 1 + math.floor((width - 1) / size))
    orders = torch.tensor(_HILBERT_ORDERS, device=cells.device)
    turns = torch.tensor(_HILBERT_TURNS, device=cells.device)
    value = torch.zeros(cells.shape[:-1], dtype=torch.int64, device=cells.device)
    state = torch.zeros_like(value)
    for level in range(levels):
        place = (cells / size).floor()
        cells = cells - place * size
        x, y = place.to(torch.int64).unbind(-1)
        size = size / 2
        y = y.clamp(0, 1)
        if level == 0:
            value, x = 4 * (x // 2), x % 2
        else:
            value, x = value * 4, x.clamp(max=1)
        at = x + 2 * y
        step = x + y if level == 0 and columns == 1 else at  # the official index where there is one column
        value = value + orders[state % 4, step]
        state = state + turns[state % 3, at]
    return value


def reference_keys(
    pos: Tensor, cluster_size: int, height: int, width: int, curve: str, anchors: bool, per_image: bool
) -> Tensor:
    """:func:`space_filling_keys` of checked arguments, in plain PyTorch."""
    limit = pos.new_tensor([width, height])
    if pos.device.type == 'cpu' and not torch.compiler.is_compiling():
        if not bool(((pos >= 0) & (pos < limit)).all()):
            raise RuntimeError(f'pos must lie on the canvas, 0 <= x < {width} and 0 <= y < {height}')
    else:
        nearest = pos.nan_to_num().clamp(min=0).minimum(limit - 1)
        pos = torch.where((pos >= 0) & (pos < limit), pos, nearest)
    rows, columns = anchor_grid(pos.shape[1], cluster_size, height, width, curve) if anchors else (0, 0)
    if rows == 0:
        return curve_values(pos.floor(), height, width, curve)
    y, x = torch.meshgrid(
        torch.arange(rows, device=pos.device), torch.arange(columns, device=pos.device), indexing='ij'
    )
    cells = torch.stack([x, y], -1).view(-1, 2).to(torch.float32)
    along = curve_values(cells, rows, columns, curve).argsort()
    rank = torch.empty_like(along).scatter_(0, along, torch.arange(rows * columns, device=pos.device))
    size = pos.new_tensor([width / columns, height / rows])
    centre = cells[along] * size + size / 2 - 0.5
    previous = torch.cat([centre[:1] - (centre[1:2] - centre[:1]), centre[:-1]])
    following = torch.cat([centre[1:], centre[-1:] + (centre[-1:] - centre[-2:-1])])
    cell = (pos / size).floor().to(torch.int64)
    place = rank[cell[..., 0].clamp(max=columns - 1) + cell[..., 1].clamp(max=rows - 1) * columns]
    ratio = _squared(pos - previous[place]) / (_squared(pos - following[place]) + 1e-5)
    largest = ratio.amax(1, keepdim=True) if per_image or ratio.numel() == 0 else ratio.amax()
    return place.to(torch.float32) * (largest + 1) + ratio


def _squared(offset: Tensor) -> Tensor:
    x, y = offset.unbind(-1)
    return x * x + y * y


def reference_space_filling_order(
    pos: Tensor, cluster_size: int, height: int, width: int, curve: str, anchors: bool, per_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, sorted positions and cluster means (see :class:`Clusters`) in plain PyTorch."""
    batch, tokens = pos.shape[:2]
    count = -(-tokens // cluster_size)
    order = reference_keys(pos, cluster_size, height, width, curve, anchors, per_image).argsort(dim=1, stable=True)
    ordered = pos.gather(1, order[..., None].expand(-1, -1, 2))
    full = tokens // cluster_size
    means = ordered[:, : full * cluster_size].reshape(batch, full, cluster_size, 2).mean(2)
    if full < count:
        rest = ordered[:, full * cluster_size :]
        means = torch.cat([means, rest.sum(1, keepdim=True) / rest.shape[1]], 1)
    return order, ordered, means


def _fake(
    pos: Tensor, cluster_size: Any, height: Any, width: Any, curve: int, anchors: bool, per_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = pos.shape[:2]
    means = pos.new_empty(batch, -(-tokens // cluster_size), 2)
    return pos.new_empty(batch, tokens, dtype=torch.int64), pos.new_empty(batch, tokens, 2), means


if has_native_operators():
    torch.library.register_fake('boltz_mm::space_filling_order', _fake)
