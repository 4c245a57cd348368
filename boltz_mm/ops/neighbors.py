"""Exact nearest neighbours of points in the plane, in linear time for points that are spread over a canvas.

Source: the kNN of AutoFocusFormer (arXiv 2304.12406; official ``point_utils.py::knn_keops``, a KeOps reduction of
``sqrt(sum((q - p) ** 2))`` in float32 that visits every pair).  The rule, with every operation rounded to float32::

    distance(q, p) = sqrt((q_x - p_x) ** 2 + (q_y - p_y) ** 2)

Neighbours ascend in distance; equal distances (also those that the roundings make equal) ascend in index.  Positions
on a grid tie massively, so that another rule gives other neighbours.

Deviations: none in the result.  The native kernels sort the points into square buckets and look at the buckets around a
query until no other point can be as near, so that points spread evenly take O(N k) operations; points that all lie in
a few spots take more, up to O(N M).  No gradient flows.

Cost: indices take ``8 B N k`` bytes (``4 B N k`` for int32), buckets, while a search
runs, about ``20 B M`` (``28 B M`` on CUDA).
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from boltz_mm.ops import _registration
from boltz_mm.ops._backend import has_native_operators, use_native

_PAIRS_AT_ONCE = 1 << 22  # of the reference, in memory
_POSITIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)


@overload
def knn_points(
    query: Tensor,
    points: Tensor,
    k: int,
    *,
    return_distance: Literal[False] = ...,
    canvas: tuple[int, int] | None = ...,
) -> Tensor: ...


@overload
def knn_points(
    query: Tensor, points: Tensor, k: int, *, return_distance: Literal[True], canvas: tuple[int, int] | None = ...
) -> tuple[Tensor, Tensor]: ...


def knn_points(
    query: Tensor,
    points: Tensor,
    k: int,
    *,
    return_distance: bool = False,
    canvas: tuple[int, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The k nearest points of every query; see the rule at the top of this file.

    Args:
        query: ``[B, N, 2]``, (x, y), floating point or int32 or int64; computed in float32.
        points: ``[B, M, 2]``, the same.  Duplicates are allowed.
        k: Number of neighbours, at most M.
        return_distance: Also return the distances.
        canvas: (height, width) that the points are spread over, ``0 <= x < width``.  On a CUDA device it places the
            buckets, which saves looking for the bounds of the points; points outside of it are found all the same.

    Returns:
        Indices ``[B, N, k]`` int64 and, if asked for, distances ``[B, N, k]`` float32.

    A point or query that is not finite is an error on the CPU; on another device, where looking would wait, its
    distances count as infinite.

    Raises:
        TypeError: A tensor is neither floating point nor int32 or int64.
        ValueError: Shapes do not match, k is not in 0..M, or the canvas is empty.
        RuntimeError: A coordinate is not finite (on the CPU).
    """
    index, distance = _nearest(query, points, k, canvas, long_index=True, distance_needed=return_distance)
    return (index, distance) if return_distance else index


def nearest_clusters(pos: Tensor, means: Tensor, j: int, *, canvas: tuple[int, int] | None = None) -> Tensor:
    """The j clusters whose mean positions are nearest, in the order of :func:`knn_points`.

    Args:
        pos: ``[B, N, 2]``.
        means: ``[B, K, 2]``.
        j: Number of clusters, at most K.
        canvas: See :func:`knn_points`.

    Returns:
        ``[B, N, j]`` int32.
    """
    return _nearest(pos, means, j, canvas, long_index=False, distance_needed=False)[0]


def nearest_other_distance(pos: Tensor, *, canvas: tuple[int, int] | None = None) -> Tensor:
    """The distance of every token to the nearest other one; 0 where another token has the same place.

    Args:
        pos: ``[B, N, 2]`` with ``N >= 2``.
        canvas: See :func:`knn_points`.

    Returns:
        ``[B, N]`` float32.
    """
    return _nearest(pos, pos, 2, canvas, long_index=False, distance_needed=True)[1][..., 1]


def check_positions(name: str, tensor: Tensor) -> Tensor:
    """Require positions ``[B, N, 2]`` and return them in float32, without gradient."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(tensor).__name__}')
    if tensor.dtype not in _POSITIONS:
        raise TypeError(f'{name} must be floating point, int64 or int32, got {tensor.dtype}')
    if tensor.dim() != 3 or tensor.shape[2] != 2:
        raise ValueError(f'{name} must have shape [B, N, 2], got {list(tensor.shape)}')
    return tensor.detach().to(torch.float32)


def check_canvas(canvas: tuple[int, int]) -> tuple[int, int]:
    """Require a (height, width) of at least 1."""
    height, width = canvas
    if height < 1 or width < 1:
        raise ValueError(f'canvas must be a (height, width) of at least 1, got {tuple(canvas)}')
    return height, width


def _nearest(
    query: Tensor, points: Tensor, k: int, canvas: tuple[int, int] | None, *, long_index: bool, distance_needed: bool
) -> tuple[Tensor, Tensor]:
    query, points = check_positions('query', query), check_positions('points', points)
    if query.device != points.device:
        raise ValueError(f'points are on {points.device}, query on {query.device}')
    if query.shape[0] != points.shape[0]:
        raise ValueError(f'query has a batch of {query.shape[0]}, points of {points.shape[0]}')
    if not 0 <= k <= points.shape[1]:
        raise ValueError(f'k must be in 0..{points.shape[1]}, the number of points, got {k}')
    height, width = (0, 0) if canvas is None else check_canvas(canvas)
    if use_native(query.device):
        return torch.ops.boltz_mm.knn_points(query, points, k, height, width, long_index, distance_needed)
    return reference_knn_points(query, points, k, long_index, distance_needed)


def reference_knn_points(
    query: Tensor, points: Tensor, k: int, long_index: bool, distance_needed: bool
) -> tuple[Tensor, Tensor]:
    """:func:`knn_points` in plain PyTorch: all pairs, some queries at a time.

    Args:
        query: ``[B, N, 2]`` float32.
        points: ``[B, M, 2]`` float32.
        k: Number of neighbours.
        long_index: Whether the indices are int64, else int32.
        distance_needed: Whether the distances are returned, else a tensor of size 0.
    """
    if query.device.type == 'cpu' and not torch.compiler.is_compiling():
        for name, tensor in (('query', query), ('points', points)):
            if not bool(tensor.isfinite().all()):
                raise RuntimeError(f'{name} must be finite')
    batch, queries, count = query.shape[0], query.shape[1], points.shape[1]
    step = max(1, _PAIRS_AT_ONCE // max(1, batch * count))
    # The bits of a distance ascend with it: with the index below them, a key is its own tie-break.
    below = torch.arange(count, device=query.device)
    keys = [torch.empty(batch, 0, k, dtype=torch.int64, device=query.device)]
    for part in query.split(step, 1) if queries else ():
        offset = part[:, :, None] - points[:, None]
        x, y = offset[..., 0], offset[..., 1]
        # In float64, because torch's root of float32 is not always the nearest number.
        distance = (x * x + y * y).double().sqrt().float().nan_to_num(nan=torch.inf, posinf=torch.inf)
        key = distance.view(torch.int32).to(torch.int64) * 2**32 + below
        keys.append(key.topk(k, dim=-1, largest=False, sorted=True).values)
    key = torch.cat(keys, 1)
    index = (key % 2**32).to(torch.int64 if long_index else torch.int32)
    if not distance_needed:
        return index, query.new_empty(0)
    return index, (key // 2**32).to(torch.int32).view(torch.float32)


def _fake(
    query: Tensor, points: Tensor, k: int, height: Any, width: Any, long_index: bool, distance_needed: bool
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], k)
    index = query.new_empty(shape, dtype=torch.int64 if long_index else torch.int32)
    return index, query.new_empty(shape if distance_needed else 0)


if has_native_operators():
    torch.library.register_fake('boltz_mm::knn_points', _fake)
    _registration.register_vmap('knn_points', constant=())
