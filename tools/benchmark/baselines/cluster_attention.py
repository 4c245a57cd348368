"""AutoFocusFormer's operators as the tests of the official repository compute them: gather, multiply, add up.

Keys, values and their products with queries and weights are materialised for every neighbour (``b * n * m * c``
numbers each), neighbours are int64 index tensors, the position bias is looked up in a table over all offsets, and
neighbours are searched exhaustively, tile by tile, on differences of coordinates.
``tests/benchmark/test_aff_baseline.py`` holds these functions by the golden cases that hold our operators.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.benchmark.timing import CLOCK

TILE = 1 << 17  # distances that are in memory at a time: they fit into the cache of a core


class Stopwatch:
    """Seconds spent in the search for neighbours, which the benchmark prints apart."""

    def __init__(self) -> None:
        self.seconds = 0.0


KNN_TIME = Stopwatch()


@torch.no_grad()
def knn(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest points, nearest first, at equal distance the lower index.

    Args:
        query: ``[B, N, 2]`` float32.
        points: ``[B, M, 2]`` float32.
        k: How many.

    Returns:
        Indices ``[B, N, k]`` int64 and distances ``[B, N, k]`` float32.
    """
    started = CLOCK.read()
    batch, n, _ = query.shape
    m = points.shape[1]
    index = query.new_empty(batch, n, k, dtype=torch.int64)
    rows, number = max(1, TILE // m), torch.arange(m, device=query.device)
    for image in range(batch):
        x, y = points[image].unbind(-1)
        for tile, out in zip(query[image].split(rows), index[image].split(rows), strict=True):
            distance = (tile[:, :1] - x).square_().add_((tile[:, 1:] - y).square_()).sqrt_()
            # Bits of a positive float are in the order of the floats; the low half breaks ties by the index.
            key = distance.view(torch.int32).to(torch.int64).bitwise_left_shift_(32).add_(number)
            out.copy_(key.topk(k, dim=-1, largest=False).values.bitwise_and_(0xFFFFFFFF))
    chosen = gather_rows(points, index)
    distances = (query[:, :, None] - chosen).square().sum(-1).sqrt()
    KNN_TIME.seconds += CLOCK.read() - started
    return index, distances


def gather_rows(feat: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, N, K, C]`` of ``feat [B, M, C]`` at ``index [B, N, K]``."""
    batch, n, k = index.shape
    rows = feat.gather(1, index.reshape(batch, n * k, 1).expand(-1, -1, feat.shape[-1]))
    return rows.view(batch, n, k, -1)


def cluster_qk(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
    """Products ``[B, H, N, K]`` of ``query [B, H, N, C]`` with its neighbours among ``key [B, H, M, C]``."""
    return (query.unsqueeze(3) * _gather_heads(key, index)).sum(-1)


def cluster_av(attn: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """Sums ``[B, H, N, C]`` of ``value [B, H, M, C]`` over the neighbours, weighted by ``attn [B, H, N, K]``."""
    return (attn.unsqueeze(-1) * _gather_heads(value, index)).sum(3)


def _gather_heads(feat: Tensor, index: Tensor) -> Tensor:
    """``[B, H, N, K, C]`` of ``feat [B, H, M, C]``."""
    batch, heads, _, width = feat.shape
    _, n, k = index.shape
    rows = feat.gather(2, index.reshape(batch, 1, n * k, 1).expand(-1, heads, -1, width))
    return rows.view(batch, heads, n, k, width)


def cluster_wf(weights: Tensor, feat: Tensor, index: Tensor) -> Tensor:
    """``[B, N, I, C]``: sums of ``feat [B, M, C]`` over the neighbours with the weights ``[B, N, K, I]``."""
    return weights.transpose(2, 3) @ gather_rows(feat, index)


def weighted_gather(index: Tensor, weights: Tensor, feat: Tensor) -> Tensor:
    """``[B, N, C]``: sums of ``feat [B, M, C]`` at ``index [B, N, K]`` with the weights ``[B, N, K]``."""
    return (weights.unsqueeze(-1) * gather_rows(feat, index)).sum(2)


def weighted_point_sampling(index: Tensor, weights: Tensor, attn: Tensor, value: Tensor) -> Tensor:
    """``[B, N, C]``: samples of K tokens each, ``weights [B, N, M, K]``, added up by ``attn [B, N, M]``."""
    batch, n, samples, k = index.shape
    rows = gather_rows(value, index.flatten(2)).view(batch, n, samples, k, -1)
    return ((weights.unsqueeze(-1) * rows).sum(3) * attn.unsqueeze(-1)).sum(2)


def shepard_weights(query_pos: Tensor, neighbour_pos: Tensor, power: Tensor | float) -> Tensor:
    """Weights ``[..., K]`` by inverse distance: ``power`` is an exponent of the squared distance."""
    squared = (query_pos.unsqueeze(-2) - neighbour_pos).square().sum(-1)
    weights = 1 / (squared**power + 1e-11)
    return weights / weights.sum(-1, keepdim=True)


def offset_table(radius: int, device: torch.device | None = None) -> Tensor:
    """Five features of every offset up to ``radius``: ``[(2 * radius + 1) ** 2, 5]``, dy major."""
    axis = torch.arange(-radius, radius + 1, dtype=torch.float32, device=device)
    dy, dx = torch.meshgrid(axis, axis, indexing='ij')
    distance = (dx.square() + dy.square()).sqrt()
    table = torch.stack([dx, dy, distance, dy / distance, dx / distance], -1)
    return table.nan_to_num_(0.0).view(-1, 5)


def table_rows(offset: Tensor, radius: int, clamp: bool) -> Tensor:
    """Row of :func:`offset_table` of each offset ``[..., 2]``; offsets beyond the table clamp where asked to."""
    shifted, width = offset + radius, 2 * radius + 1
    if clamp:
        shifted = shifted.clamp(0, width - 1)
    return (shifted[..., 1] * width + shifted[..., 0]).long()


class Clusters(NamedTuple):
    """Tokens in the order of their clusters.

    Attributes:
        order: ``[B, N]`` int64, which token stands at each place.
        means: ``[B, k, 2]`` mean positions.
        members: ``[B, k, size]`` int64 places; padded with 0.
        mask: ``[B, k, size]`` int64, 0 where padded; ``None`` if nothing is.
    """

    order: Tensor
    means: Tensor
    members: Tensor
    mask: Tensor | None


@torch.no_grad()
def space_filling_clusters(pos: Tensor, size: int, height: int, width: int) -> Clusters:
    """Balanced clusters along scan lines through anchors; ``pos [B, N, 2]`` on a canvas of ``height x width``."""
    batch, n, _ = pos.shape
    count = math.ceil(n / size)
    length = math.sqrt(height * width / count)
    rows, columns = round(height / length), round(width / length)
    patch = pos.new_tensor([width / columns, height / rows])
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing='ij')
    x = torch.where(y % 2 == 0, x, columns - 1 - x)
    cells = torch.stack([x, y], -1).view(-1, 2).to(pos.device)
    rank = torch.empty(rows * columns, dtype=torch.int64, device=pos.device)
    rank[cells[:, 0] + cells[:, 1] * columns] = torch.arange(rows * columns, device=pos.device)
    centres = cells * patch + patch / 2 - 0.5
    before = torch.cat([centres[:1] - (centres[1:2] - centres[:1]), centres[:-1]])
    after = torch.cat([centres[1:], centres[-1:] + (centres[-1:] - centres[-2:-1])])
    cell = (pos / patch).floor().long()
    anchor = rank[cell[..., 0] + cell[..., 1] * columns]
    ratio = (pos - before[anchor]).square().sum(-1) / ((pos - after[anchor]).square().sum(-1) + 1e-5)
    order = (anchor * (ratio.max() + 1) + ratio).sort(dim=1, stable=True).indices
    ordered = pos.gather(1, order[..., None].expand(-1, -1, 2))
    padding = count * size - n
    members = torch.cat([torch.arange(n, device=pos.device), order.new_zeros(padding)])
    members = members.view(1, count, size).expand(batch, -1, -1)
    if not padding:
        return Clusters(order, ordered.view(batch, count, size, 2).mean(2), members, None)
    mask = (torch.arange(count * size, device=pos.device) < n).long().view(1, count, size).expand(batch, -1, -1)
    grouped = F.pad(ordered, (0, 0, 0, padding)).view(batch, count, size, 2)
    return Clusters(order, grouped.sum(2) / mask.sum(-1, keepdim=True), members, mask)
