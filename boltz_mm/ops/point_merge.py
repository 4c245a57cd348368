"""Weighted sums over the neighbours of points, with weights that the caller gives or that follow from the offset.

Source: "AutoFocusFormer: Image Segmentation off the Grid" (arXiv 2304.12406), section 3; official files
``clusten/clusten.py`` (``CLUSTENWFFunction``, ``WEIGHTEDGATHERFunction``), ``aff_transformer.py``
(``ClusterMerging``) and ``pixel_decoder/msdeformattn_pc.py`` (``PointConv``).

For point n with neighbours k, inner channel i and channel c::

    cluster_wf        out[n, i, c] = sum over k of weights[n, k, i] * feat[index[n, k], c]
    weighted_gather   out[n, c]    = sum over k of weights[n, k] * feat[index[n, k], c]
    point_merge       the first with weights = GELU(LayerNorm_I(weight . five(offset) + bias)) * importance of k

where the offset is that from the point to its neighbour (``sign`` turns it round) and ``five`` is
:func:`offset_features`.  The learned downsampling of AutoFocusFormer merges the clusters near each kept token, the
convolution of its pixel decoder 9 points of a grid.

Deviations: the weights are computed where they are used, for the offsets that occur, so that neither a table of all
offsets nor weights ``[B, N, K, I]`` nor gathered features ``[B, N, K, C]`` exist; clusters are given by their numbers,
because their members are consecutive; bfloat16 and float16 features with float32 sums; the backward pass is
deterministic.

Cost, with an element of feat of s bytes and K neighbours of a point: the result takes ``s B N I C`` bytes, backward
keeps the inputs alone and lists which points name each cluster (8 bytes for each entry of ``nearest`` or ``index``);
on CUDA it holds the gradients of the weights, ``4 B N K I`` bytes.  FLOPs of the forward pass are ``2 B N K I C``, of
the backward pass ``4 B N K I C``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from boltz_mm.ops import _registration
from boltz_mm.ops._backend import has_native_operators, use_native
from boltz_mm.ops._checks import DTYPES, check_float, check_shape, compute_dtype
from boltz_mm.ops.deform_attention import empty_sum


def offset_features(offset: Tensor) -> Tensor:
    """The five numbers by which AutoFocusFormer describes an offset: ``dx, dy, d, dy / d, dx / d``.

    ``d`` is the length of the offset.  The ratios of an offset of length 0 are 0.  It is what the official lookup table
    (``build_pe_lookup``) holds, for any offset.

    Args:
        offset: ``[..., 2]`` (dx, dy); integers count as float32.

    Returns:
        ``[..., 5]`` in the dtype of ``offset``; 16-bit types are computed in float32.  The gradient at an offset of
        length 0 is that of dx and dy alone.

    Raises:
        TypeError: ``offset`` is complex or boolean.
        ValueError: The last dimension is not 2.
    """
    if offset.dtype == torch.bool or offset.is_complex():
        raise TypeError(f'offset must be real numbers, got {offset.dtype}')
    if offset.dim() == 0 or offset.shape[-1] != 2:
        raise ValueError(f'offset must have shape [..., 2], got {list(offset.shape)}')
    dtype = offset.dtype if offset.dtype in DTYPES else torch.float32
    dx, dy = offset.to(torch.float64 if dtype == torch.float64 else torch.float32).unbind(-1)
    squared = dx * dx + dy * dy
    is_zero = squared == 0
    # The square root has no derivative at 0, so that 0 must not reach it.
    length = torch.where(is_zero, 1, squared).sqrt()
    distance = torch.where(is_zero, 0, length)
    return torch.stack([dx, dy, distance, dy / length, dx / length], -1).to(dtype)


def cluster_wf(weights: Tensor, feat: Tensor, index: Tensor) -> Tensor:
    """Add up the features of the neighbours of each point, once for each inner channel (CLUSTENWF).

    Args:
        weights: ``[B, N, K, I]``.
        feat: ``[B, M, C]``.
        index: ``[B, N, K]`` int32 or int64, rows of ``feat``; may have batch 1.

    Returns:
        ``[B, N, I, C]`` in the dtype of ``feat``; weights and sums are float32 (float64 for float64 features).

    Raises:
        TypeError: A tensor has a dtype that is not supported.
        ValueError: Shapes do not match.
        RuntimeError: On the CPU an index is out of range.  On CUDA, and where PyTorch compiles the reference, such a
            neighbour counts as nothing.
    """
    _check_feat(feat)
    check_float('weights', weights, feat.device)
    if weights.dim() != 4:
        raise ValueError(f'weights must have shape [B, N, K, I], got {list(weights.shape)}')
    batch, points, count, _ = weights.shape
    check_shape('feat', feat, '[B, M, C]', (batch, *feat.shape[1:]))
    _check_index('index', index, feat, '[B, N, K]', (points, count))
    weights = weights.to(compute_dtype(feat))
    if use_native(feat.device):
        return torch.ops.boltz_mm.cluster_wf(weights, feat, index)
    return _reference_sum(weights, feat, index, 1)


def weighted_gather(index: Tensor, weights: Tensor, feat: Tensor) -> Tensor:
    """Add up the features of the neighbours of each point.

    Args:
        index: ``[B, N, K]`` int32 or int64, rows of ``feat``; may have batch 1.
        weights: ``[B, N, K]``.
        feat: ``[B, M, C]``.

    Returns:
        ``[B, N, C]`` in the dtype of ``feat``; weights and sums are float32 (float64 for float64 features).

    Raises:
        TypeError: A tensor has a dtype that is not supported.
        ValueError: Shapes do not match.
        RuntimeError: On the CPU an index is out of range.  On CUDA, and where PyTorch compiles the reference, such a
            neighbour counts as nothing.
    """
    if weights.dim() != 3:
        raise ValueError(f'weights must have shape [B, N, K], got {list(weights.shape)}')
    return cluster_wf(weights.unsqueeze(-1), feat, index).squeeze(2)


def point_merge(
    feat: Tensor,
    *,
    query_pos: Tensor,
    key_pos: Tensor,
    nearest: Tensor | None = None,
    cluster_size: int = 1,
    index: Tensor | None = None,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    importance: Tensor | None = None,
    sign: int = 1,
    max_offset: float | None = None,
) -> Tensor:
    """Merge the neighbours of each point with weights that follow from their offset; see the top of this file.

    The neighbours are the members of the clusters ``nearest``, or the rows ``index``, or, with neither, all M rows.

    Args:
        feat: ``[B, M, C]``.
        query_pos: ``[B, N, 2]``, (x, y) of the points; may have batch 1.
        key_pos: ``[B, M, 2]``, (x, y) of the rows of ``feat``; may have batch 1.
        nearest: ``[B, N, J]`` int32 or int64, cluster numbers; may have batch 1.  Cluster c is the rows from
            ``c * cluster_size`` on; what is missing in the last one counts as nothing.
        cluster_size: Rows of a cluster.
        index: ``[B, N, K]`` int32 or int64, rows of ``feat``; may have batch 1.
        weight: ``[I, 5]`` of the linear layer on the five numbers of an offset.
        bias: ``[I]`` of it.
        norm_weight: ``[I]`` of the layer norm.
        norm_bias: ``[I]`` of the layer norm.
        eps: Added to the variance in the layer norm.
        importance: ``[B, M]``, a factor for each row of ``feat``.
        sign: 1 for offsets from the point to its neighbour (AutoFocusFormer's backbone), -1 for the opposite (its pixel
            decoder).
        max_offset: Limit of dx and dy, in both directions.

    Returns:
        ``[B, N, I * C]`` in the dtype of ``feat``, element ``i * C + c``.  Weights and sums are float32 (float64 for
        float64 features) whatever autocast says.

    Gradients flow to feat, weight, bias, norm_weight, norm_bias and importance; positions are constants.

    Raises:
        TypeError: A tensor has a dtype that is not supported.
        ValueError: Shapes do not match, or both kinds of neighbours are given.
        RuntimeError: On the CPU a neighbour is out of range.  On CUDA, and where PyTorch compiles the reference, it
            counts as nothing.
    """
    _check_merge(feat, query_pos, key_pos, weight, bias, norm_weight, norm_bias, importance)
    if sign not in (1, -1):
        raise ValueError(f'sign must be 1 or -1, got {sign}')
    if max_offset is not None and not max_offset >= 0:
        raise ValueError(f'max_offset must not be negative, got {max_offset}')
    nearest, cluster_size = _neighbours(feat, query_pos, nearest, cluster_size, index)
    dtype = compute_dtype(feat)
    offset_weights = [tensor.to(dtype) for tensor in (weight, bias, norm_weight, norm_bias)]
    query_pos, key_pos = query_pos.detach().to(dtype), key_pos.detach().to(dtype)
    importance = None if importance is None else importance.to(dtype)
    if use_native(feat.device):
        output: Tensor = torch.ops.boltz_mm.point_merge(
            feat, query_pos, key_pos, nearest, cluster_size, *offset_weights, eps, importance, sign, max_offset
        )
        return output.flatten(2)
    return _reference_merge(
        feat, query_pos, key_pos, nearest, cluster_size, offset_weights, eps, importance, sign, max_offset
    )


def _check_feat(feat: Tensor) -> None:
    if not isinstance(feat, Tensor):
        raise TypeError(f'feat must be a tensor, got {type(feat).__name__}')
    check_float('feat', feat, feat.device)
    if feat.dim() != 3:
        raise ValueError(f'feat must have shape [B, M, C], got {list(feat.shape)}')


def _check_index(name: str, index: Tensor, feat: Tensor, meaning: str, expected: tuple[int, ...]) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(index).__name__}')
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f'{name} must be int32 or int64, got {index.dtype}')
    if index.device != feat.device:
        raise ValueError(f'{name} is on {index.device}, feat on {feat.device}')
    _check_batch(name, index, feat, meaning, expected)


def _check_batch(name: str, tensor: Tensor, feat: Tensor, meaning: str, expected: tuple[int, ...]) -> None:
    """Require a shape, with the batch of ``feat`` or 1."""
    first = 1 if tensor.dim() and tensor.shape[0] == 1 else feat.shape[0]
    check_shape(name, tensor, meaning, (first, *expected))


def _check_merge(
    feat: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    importance: Tensor | None,
) -> None:
    _check_feat(feat)
    batch, rows, _ = feat.shape
    for name, pos in (('query_pos', query_pos), ('key_pos', key_pos)):
        check_float(name, pos, feat.device)
        if pos.dim() != 3:
            raise ValueError(f'{name} must have shape [B, {"N" if name[0] == "q" else "M"}, 2], got {list(pos.shape)}')
    _check_batch('query_pos', query_pos, feat, '[B, N, 2]', (query_pos.shape[1], 2))
    _check_batch('key_pos', key_pos, feat, '[B, M, 2]', (rows, 2))
    check_float('weight', weight, feat.device)
    if weight.dim() != 2:
        raise ValueError(f'weight must have shape [I, 5], got {list(weight.shape)}')
    inner = weight.shape[0]
    check_shape('weight', weight, '[I, 5]', (inner, 5))
    for name, vector in (('bias', bias), ('norm_weight', norm_weight), ('norm_bias', norm_bias)):
        check_float(name, vector, feat.device)
        check_shape(name, vector, '[I]', (inner,))
    if importance is not None:
        check_float('importance', importance, feat.device)
        check_shape('importance', importance, '[B, M]', (batch, rows))


def _neighbours(
    feat: Tensor, query_pos: Tensor, nearest: Tensor | None, cluster_size: int, index: Tensor | None
) -> tuple[Tensor, int]:
    """The neighbours as numbers of clusters ``[B or 1, N, J]``, with the size of a cluster."""
    points, rows = query_pos.shape[1], feat.shape[1]
    if nearest is not None and index is not None:
        raise ValueError('give the neighbours as nearest (cluster numbers) or as index (rows), not both')
    if index is not None:
        _check_index('index', index, feat, '[B, N, K]', (points, *index.shape[2:3]))
        return index, 1
    if nearest is not None:
        if cluster_size < 1:
            raise ValueError(f'cluster_size must be positive, got {cluster_size}')
        _check_index('nearest', nearest, feat, '[B, N, J]', (points, *nearest.shape[2:3]))
        return nearest, cluster_size
    everything = torch.zeros(1, 1, min(rows, 1), dtype=torch.int32, device=feat.device)
    return everything.expand(1, points, -1), max(rows, 1)


def _reference_merge(
    feat: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    nearest: Tensor,
    cluster_size: int,
    offset_weights: list[Tensor],
    eps: float,
    importance: Tensor | None,
    sign: int,
    max_offset: float | None,
) -> Tensor:
    """:func:`point_merge` in plain PyTorch; the weights ``[B, N, K, I]`` exist."""
    weight, bias, norm_weight, norm_bias = offset_weights
    batch, rows, channels = feat.shape
    inner = weight.shape[0]
    members = _members(nearest, cluster_size)
    tensors = [feat, *offset_weights, *([] if importance is None else [importance])]
    if batch * members.numel() * channels * inner == 0:
        zero = empty_sum(*tensors).to(feat.dtype)
        return zero.expand(batch, query_pos.shape[1], inner * channels)
    inside = (members >= 0) & (members < rows)
    safe = torch.where(inside, members, 0)
    with torch.autocast(feat.device.type, enabled=False):
        offset = _take(key_pos, safe) - query_pos.unsqueeze(2)
        offset = offset if sign == 1 else -offset
        offset = offset if max_offset is None else offset.clamp(-max_offset, max_offset)
        hidden = F.layer_norm(F.linear(offset_features(offset), weight, bias), (inner,), norm_weight, norm_bias, eps)
        weights = F.gelu(hidden)
        if importance is not None:
            weights = weights * _take(importance.unsqueeze(-1), safe)
        weights = torch.where(inside.unsqueeze(-1), weights, 0)
        return _reference_sum(weights, feat, nearest, cluster_size).flatten(2)


def _members(clusters: Tensor, cluster_size: int) -> Tensor:
    """Rows ``[B, N, J * cluster_size]`` int64 of the clusters ``[B, N, J]``."""
    if cluster_size == 1:
        return clusters.long()
    steps = torch.arange(cluster_size, device=clusters.device)
    return (clusters.long().unsqueeze(-1) * cluster_size + steps).flatten(2)


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """``values [B or 1, M, F]`` at ``rows [B or 1, N, K]``: ``[B or 1, N, K, F]``."""
    flat = rows + torch.arange(values.shape[0], device=rows.device)[:, None, None] * values.shape[1]
    return values.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, flat.shape)


def _reference_sum(weights: Tensor, feat: Tensor, clusters: Tensor, cluster_size: int) -> Tensor:
    """``sum over k of weights [B, N, K, I] * feat``, as ``[B, N, I, C]`` in the dtype of ``feat``."""
    batch, rows, channels = feat.shape
    if feat.device.type == 'cpu' and not torch.compiler.is_compiling():
        _check_range(clusters, -(-rows // cluster_size))
    weights = weights.expand(batch, -1, -1, -1)
    if weights.numel() * channels == 0:
        zero = empty_sum(weights, feat).to(feat.dtype)
        return zero.expand(batch, weights.shape[1], weights.shape[3], channels)
    members = _members(clusters, cluster_size).expand(batch, -1, -1)
    table = feat.to(weights.dtype).flatten(0, 1)
    starts = torch.arange(batch, device=feat.device)[:, None, None] * rows
    # Slots without a row read one of zeros: a weight of 0 would not silence a NaN.
    table = torch.cat([table, table.new_zeros(1, channels)])
    inside = (members >= 0) & (members < rows)
    flat = torch.where(inside, members + starts, batch * rows).flatten(0, 1)
    result: Tensor = _WeightedSum.apply(weights.flatten(0, 1), table, flat)
    return result.unflatten(0, (batch, -1)).to(feat.dtype)


def _check_range(clusters: Tensor, count: int) -> None:
    if clusters.numel():
        low, high = (int(bound) for bound in torch.aminmax(clusters))
        if low < 0 or high >= count:
            raise RuntimeError(f'neighbours must be in 0 ... {count - 1}, got {low if low < 0 else high}')


class _WeightedSum(torch.autograd.Function):
    """``embedding_bag`` forward; backward with one over the transposed list, and a product with gathered rows."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        """``weights [N, K, I]``, ``table [M, C]``, ``rows [N, K]`` to ``[N, I, C]``."""
        ctx.save_for_backward(weights, table, rows)
        points, count, inner = weights.shape
        bags = rows.unsqueeze(1).expand(-1, inner, -1).reshape(points * inner, count)
        in_bags = weights.transpose(1, 2).reshape(points * inner, count)
        sums = F.embedding_bag(bags, table, per_sample_weights=in_bags, mode='sum')
        return sums.view(points, inner, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of the weights and of the table."""
        weights, table, rows = ctx.saved_tensors
        points, count, inner = weights.shape
        grad_weights = torch.bmm(table[rows], grad.transpose(1, 2))
        order = rows.flatten().argsort(stable=True)
        sorted_rows = rows.flatten()[order]
        starts = torch.searchsorted(sorted_rows, torch.arange(table.shape[0], device=rows.device))
        point = torch.div(order, count, rounding_mode='floor')
        entries = point.unsqueeze(1) * inner + torch.arange(inner, device=rows.device)
        in_bags = weights.reshape(points * count, inner)[order]
        grad_table = F.embedding_bag(
            entries.flatten(),
            grad.reshape(points * inner, -1),
            starts * inner,
            per_sample_weights=in_bags.flatten(),
            mode='sum',
        )
        return grad_weights, grad_table, None


def _fake_sum(weights: Tensor, feat: Tensor, index: Tensor) -> Tensor:
    batch, points, _, inner = weights.shape
    return feat.new_empty(batch, points, inner, feat.shape[2])


def _order(clusters: Tensor) -> Tensor | None:
    """The places in ``clusters [B, N, J]`` sorted by their cluster, ``[B, N * J]``: what the CUDA kernels ask for."""
    return clusters.flatten(1).argsort(stable=True) if clusters.device.type == 'cuda' else None


def _fake_sum_backward(
    grad_output: Tensor, weights: Tensor, feat: Tensor, index: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), feat.new_empty(feat.shape)


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_sum(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
    weights, feat, index = ctx.saved_tensors
    grad_weights, grad_feat = torch.ops.boltz_mm.cluster_wf_backward(grad_output, weights, feat, index, _order(index))
    return grad_weights, grad_feat, None


def _sum_flops(weights: Any, feat: Any, index: Any, *args: Any, **kwargs: Any) -> int:
    """A multiply-add for each neighbour, inner channel and channel."""
    batch, points, count, inner = weights
    return 2 * batch * points * count * inner * feat[2]


def _sum_backward_flops(grad_output: Any, *args: Any, **kwargs: Any) -> int:
    """One product for each of the two gradients."""
    return 2 * _sum_flops(*args[:3])


def _fake_merge(feat: Tensor, query_pos: Tensor, key_pos: Tensor, nearest: Tensor, *args: Any) -> Tensor:
    return feat.new_empty(feat.shape[0], nearest.shape[1], args[1].shape[0], feat.shape[2])


def _fake_merge_backward(grad_output: Tensor, feat: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, importance = args[4], args[9]
    return (
        feat.new_empty(feat.shape),
        weight.new_empty(weight.shape[0], 8),
        weight.new_empty(0 if importance is None else importance.shape),
    )


def _setup_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.cluster_size, ctx.eps, ctx.sign, ctx.max_offset = inputs[4], inputs[9], inputs[11], inputs[12]


def _backward_merge(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    feat, query_pos, key_pos, nearest, *offset_weights = ctx.saved_tensors
    importance = offset_weights.pop() if len(offset_weights) == 5 else None
    grad_feat, parameters, grad_importance = torch.ops.boltz_mm.point_merge_backward(
        grad_output,
        feat,
        query_pos,
        key_pos,
        nearest,
        ctx.cluster_size,
        *offset_weights,
        ctx.eps,
        importance,
        ctx.sign,
        ctx.max_offset,
        _order(nearest),
    )
    of_parameters = (parameters[:, :5], *parameters[:, 5:].unbind(1))
    grad_importance = None if importance is None else grad_importance
    return grad_feat, None, None, None, None, *of_parameters, None, grad_importance, None, None


def _merge_flops(feat: Any, query_pos: Any, key_pos: Any, nearest: Any, *args: Any, **kwargs: Any) -> int:
    """A multiply-add for each neighbour, inner channel and channel; the weights are not counted."""
    neighbours = nearest[1] * nearest[2] * min(args[0], feat[1])
    return 2 * feat[0] * neighbours * args[1][0] * feat[2]


def _merge_backward_flops(grad_output: Any, *args: Any, **kwargs: Any) -> int:
    """One product for the weights and one for the gradient of feat."""
    return 2 * _merge_flops(*args)


if has_native_operators():
    _registration.register(
        'cluster_wf', fake=_fake_sum, setup_context=_setup_sum, backward=_backward_sum, flops=_sum_flops
    )
    _registration.register_backward('cluster_wf_backward', fake=_fake_sum_backward, flops=_sum_backward_flops)
    _registration.register(
        'point_merge', fake=_fake_merge, setup_context=_setup_merge, backward=_backward_merge, flops=_merge_flops
    )
    _registration.register_backward('point_merge_backward', fake=_fake_merge_backward, flops=_merge_backward_flops)
    for _name in ('cluster_wf', 'cluster_wf_backward'):
        _registration.register_vmap(_name, constant=())
    for _name in ('point_merge', 'point_merge_backward'):
        _registration.register_vmap(_name, constant=('weight', 'bias', 'norm_weight', 'norm_bias'))
