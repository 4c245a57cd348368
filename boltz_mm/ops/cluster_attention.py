"""Cluster attention of AutoFocusFormer: every token attends to the members of its nearest clusters.

Source: "AutoFocusFormer: Image Segmentation off the Grid" (arXiv 2304.12406), section 3; official files
``aff_transformer.py::ClusterAttention`` and ``clusten.py``.

The keys are sorted so that cluster c is the rows ``c * m .. c * m + m - 1``.  For query i, head h and slot j of the
clusters in ``nearest[i]``, with the offset ``(dx, dy) = key_pos[j] - query_pos[i]`` of length d::

    logit[i, j] = scale * q[i] . k[j] + bias_weight[h] . (dx, dy, d, dy / d, dx / d) + bias[h]
    blank[i]    = scale * q[i] . blank_key[h]
    out[i]      = sum over j of p[i, j] * v[j] + p[i, blank] * blank_value[h],   p = softmax(logit[i, :], blank[i])

Slots of the last cluster beyond the last key count as key 0 with -100 added to the logit, as in the official code.

Deviations from the official code: neighbours are cluster ids and not the indices of their members; the position bias
is computed from the offset, so that no table and no range of offsets exists; sums are float32 for 16-bit types; the
gradients of keys and values are added up cluster by cluster, in a fixed order.

Cost, with an element of s bytes and K slots of a query: the result takes ``s B N H D`` bytes, backward keeps the inputs
and ``8 B N H`` bytes.  FLOPs of the forward pass are ``4 B N H K D``, of the backward pass ``10``; the softmax and the
position bias are not counted.
"""

import math
from typing import Any

import torch
from torch import Tensor

from boltz_mm.ops import _neighbor_sums, _registration
from boltz_mm.ops._backend import has_native_operators, use_native
from boltz_mm.ops._checks import check_float, check_shape, compute_dtype
from boltz_mm.ops.point_merge import offset_features

_PADDED = -100.0  # what the official code adds to the logits of padded slots


def cluster_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_pos: Tensor,
    key_pos: Tensor,
    nearest: Tensor | None,
    cluster_size: int = 1,
    bias_weight: Tensor | None = None,
    bias: Tensor | None = None,
    blank_key: Tensor | None = None,
    blank_value: Tensor | None = None,
    scale: float = 1.0,
    max_offset: int | None = None,
) -> Tensor:
    """Attend to the members of the nearest clusters; see the formula at the top of this file.

    Args:
        query: ``[B, N, H, D]``.
        key: ``[B, M, H, D]``, with any strides, as a part of ``[B, M, H, 2, D]``; converted to the dtype of ``query``.
        value: ``[B, M, H, D]``, likewise.
        query_pos: ``[B, N, 2]`` (x, y) in any unit; B may be 1 for positions that all images share.
        key_pos: ``[B, M, 2]``, likewise.
        nearest: ``[B, N, J]`` int32 or int64, ids of the clusters that each query sees, B may be 1; ``None`` where it
            sees all keys.
        cluster_size: m, keys of a cluster.
        bias_weight: ``[H, 5]`` for the features of :func:`offset_features`; no position bias without it.
        bias: ``[H]``, added to the logits of all keys.
        blank_key: ``[H, D]``, the key of one more token that every query sees.
        blank_value: ``[H, D]``, its value; given with ``blank_key`` or not at all.
        scale: Factor of the products.
        max_offset: Bound of dx and dy, which are clamped to it (511 in the official segmentation code).

    Returns:
        ``[B, N, H * D]`` in the dtype of ``query``.  Positions, softmax and sums are float32 (float64 for a float64
        query) whatever autocast says.  A query that sees no key and no blank token gets 0.

    Gradients flow to query, key, value, bias_weight, bias, blank_key and blank_value; positions are constants.

    Raises:
        TypeError: A tensor is not floating point, or ``nearest`` is not int32 or int64.
        ValueError: Shapes do not match, or ``cluster_size`` or ``max_offset`` is out of range.
        RuntimeError: A cluster id is out of range, on the CPU.  On CUDA, where looking would wait, such a cluster
            counts as nothing (on the reference backend the result is undefined).
    """
    _check(query, key, value, query_pos, key_pos, nearest, cluster_size, max_offset)
    _check_parameters(query, bias_weight, bias, blank_key, blank_value)
    dtype = compute_dtype(query)
    key, value = key.to(query.dtype), value.to(query.dtype)
    query_pos, key_pos = query_pos.detach().to(dtype), key_pos.detach().to(dtype)
    bias_weight, bias, blank_key, blank_value = (
        None if tensor is None else tensor.to(dtype) for tensor in (bias_weight, bias, blank_key, blank_value)
    )
    if use_native(query.device):
        bound = math.inf if max_offset is None else float(max_offset)
        inputs = query, key, value, query_pos, key_pos, nearest, cluster_size, bias_weight, bias, blank_key, blank_value
        return torch.ops.boltz_mm.cluster_attention(*inputs, float(scale), bound)[0]
    positions = query_pos, key_pos, max_offset
    parameters = bias_weight, bias, blank_key, blank_value
    with torch.autocast(query.device.type, enabled=False):
        return _reference(query, key, value, positions, nearest, cluster_size, parameters, scale)


def cluster_qk(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
    """Products of each query with its neighbours' keys.

    ``out[b, h, n, k] = query[b, h, n] . key[b, h, index[b, n, k]]``: ``CLUSTENQKFunction`` of the official
    ``clusten.py``, for any number of neighbours and channels.

    Args:
        query: ``[B, H, N, C]``.
        key: ``[B, H, M, C]``, converted to the dtype of ``query``.
        index: ``[B, N, K]`` int32 or int64 in ``0 .. M - 1``, shared by the heads.

    Returns:
        ``[B, H, N, K]`` in the dtype of ``query``; sums are float32 (float64 for float64) whatever the dtype.

    Raises:
        TypeError: A tensor is not floating point, or the index is not int32 or int64.
        ValueError: Shapes do not match.
        RuntimeError: An index is out of range (on the CPU; on other devices the result is undefined).
    """
    _check_rows('query', query, '[B, H, N, C]')
    batch, heads, queries, depth = query.shape
    _check_rows('key', key, '[B, H, M, C]', query.device)
    check_shape('key', key, '[B, H, M, C]', (batch, heads, key.shape[2], depth))
    _check_index('index', index, query.device, batch, queries, '[B, N, K]')
    dtype = compute_dtype(query)
    rows, table = query.to(dtype), key.to(query.dtype).to(dtype)
    if _has_products(query.device) and use_native(query.device):
        return torch.ops.boltz_mm.neighbor_products(rows, table, index).to(query.dtype)
    _check_range('index', index, key.shape[2], 'keys')
    return _neighbor_sums.products(rows, table, index).to(query.dtype)


def cluster_av(attn: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """Weighted sum of the neighbours' values.

    ``out[b, h, n] = sum over k of attn[b, h, n, k] * value[b, h, index[b, n, k]]``: ``CLUSTENAVFunction`` of the
    official ``clusten.py``, for any number of neighbours and channels.

    Args:
        attn: ``[B, H, N, K]``.
        value: ``[B, H, M, C]``, converted to the dtype of ``attn``.
        index: ``[B, N, K]`` int32 or int64 in ``0 .. M - 1``, shared by the heads.

    Returns:
        ``[B, H, N, C]`` in the dtype of ``attn``; sums are float32 (float64 for float64) whatever the dtype.

    Raises:
        TypeError: A tensor is not floating point, or the index is not int32 or int64.
        ValueError: Shapes do not match.
        RuntimeError: An index is out of range (on the CPU; on other devices the result is undefined).
    """
    _check_rows('attn', attn, '[B, H, N, K]')
    batch, heads, queries, count = attn.shape
    _check_rows('value', value, '[B, H, M, C]', attn.device)
    check_shape('value', value, '[B, H, M, C]', (batch, heads, *value.shape[2:]))
    _check_index('index', index, attn.device, batch, queries, '[B, N, K]')
    check_shape('index', index, '[B, N, K]', (batch, queries, count))
    dtype = compute_dtype(attn)
    weights, table = attn.to(dtype), value.to(attn.dtype).to(dtype)
    if _has_products(attn.device) and use_native(attn.device):
        return torch.ops.boltz_mm.neighbor_sums(weights, table, index).to(attn.dtype)
    _check_range('index', index, value.shape[2], 'values')
    return _neighbor_sums.sums(weights, table, index).to(attn.dtype)


def _check_rows(name: str, tensor: Tensor, meaning: str, device: torch.device | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(tensor).__name__}')
    check_float(name, tensor, tensor.device if device is None else device)
    if tensor.dim() != 4:
        raise ValueError(f'{name} must have shape {meaning}, got {list(tensor.shape)}')


def _check_index(
    name: str, index: Tensor, device: torch.device, batch: int, queries: int, meaning: str, shared: bool = False
) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f'{name} must be an int32 or int64 tensor, got {getattr(index, "dtype", type(index).__name__)}')
    if index.device != device:
        raise ValueError(f'{name} is on {index.device}, query on {device}')
    good = index.dim() == 3 and index.shape[1] == queries
    if not good or (index.shape[0] != batch and (index.shape[0] != 1 or not shared)):
        sizes = f'B = {batch}, N = {queries}'
        raise ValueError(f'{name} must have shape {meaning} with {sizes}, got {list(index.shape)}')


def _check_range(name: str, index: Tensor, length: int, what: str) -> None:
    """Refuse an index out of range where that needs no synchronisation, that is on the CPU."""
    if index.device.type != 'cpu' or torch.compiler.is_compiling() or type(index) is not Tensor or index.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= length:
        raise RuntimeError(f'{name} is out of range: it has {low if low < 0 else high}, and there are {length} {what}')


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    nearest: Tensor | None,
    cluster_size: int,
    max_offset: int | None,
) -> None:
    _check_rows('query', query, '[B, N, H, D]')
    batch, queries, heads, depth = query.shape
    _check_rows('key', key, '[B, M, H, D]', query.device)
    keys = key.shape[1]
    _check_rows('value', value, '[B, M, H, D]', query.device)
    check_shape('key', key, '[B, M, H, D]', (batch, keys, heads, depth))
    check_shape('value', value, '[B, M, H, D]', (batch, keys, heads, depth))
    for name, pos, count in (('query_pos', query_pos, queries), ('key_pos', key_pos, keys)):
        check_float(name, pos, query.device)
        if pos.dim() != 3 or (pos.shape[0] != 1 and pos.shape[0] != batch):  # a tracer cannot tell with `in`
            raise ValueError(f'{name} must have shape [B, N, 2] with B = 1 or {batch}, got {list(pos.shape)}')
        check_shape(name, pos, '[B, N, 2]', (pos.shape[0], count, 2))
    if nearest is not None:
        _check_index('nearest', nearest, query.device, batch, queries, '[B, N, J]', shared=True)
    if cluster_size < 1:
        raise ValueError(f'cluster_size must be at least 1, got {cluster_size}')
    if max_offset is not None and max_offset < 0:
        raise ValueError(f'max_offset must not be negative, got {max_offset}')


def _check_parameters(
    query: Tensor,
    bias_weight: Tensor | None,
    bias: Tensor | None,
    blank_key: Tensor | None,
    blank_value: Tensor | None,
) -> None:
    _, _, heads, depth = query.shape
    if (blank_key is None) != (blank_value is None):
        raise ValueError('blank_key and blank_value must be given together')
    for name, tensor, meaning, shape in (
        ('bias_weight', bias_weight, '[H, 5]', (heads, 5)),
        ('bias', bias, '[H]', (heads,)),
        ('blank_key', blank_key, '[H, D]', (heads, depth)),
        ('blank_value', blank_value, '[H, D]', (heads, depth)),
    ):
        if tensor is not None:
            check_float(name, tensor, query.device)
            check_shape(name, tensor, meaning, shape)


def _has_products(device: torch.device) -> bool:
    """CLUSTEN's products have no kernels for CUDA so far: the reference runs there, whatever was chosen."""
    return device.type != 'cuda'


# ------------------------------------------------------------------------------------------------------ reference ----


def _member_index(nearest: Tensor, cluster_size: int, keys: int) -> tuple[Tensor, Tensor]:
    """Keys ``[B, N, J * m]`` in the clusters, 0 for a padded slot, and which slots are padded."""
    _check_range('nearest', nearest, -(-keys // cluster_size), 'clusters')
    members = nearest.long()[..., None] * cluster_size + torch.arange(cluster_size, device=nearest.device)
    members = members.flatten(2)
    padded = members >= keys
    return torch.where(padded, 0, members), padded


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: tuple[Tensor, Tensor, int | None],
    nearest: Tensor | None,
    cluster_size: int,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    scale: float,
) -> Tensor:
    """:func:`cluster_attention` in plain PyTorch: nothing of size N * K * D exists in any direction."""
    query_pos, key_pos, max_offset = positions
    bias_weight, bias, blank_key, blank_value = parameters
    batch, keys = query.shape[0], key.shape[1]
    rows, table, values = (x.to(query_pos.dtype).transpose(1, 2) for x in (query, key, value))
    rows = rows * scale
    inverse, index, padded = None, None, None
    if nearest is None:
        offset = key_pos[:, None] - query_pos[:, :, None]
        logits = rows @ table.transpose(2, 3)
    else:
        shared, padded = _member_index(nearest, cluster_size, keys)
        index = shared.expand(batch, -1, -1)
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            inverse = _neighbor_sums.invert(index, keys)
        at = shared if key_pos.shape[0] == 1 else index
        image = torch.arange(key_pos.shape[0], device=at.device)[:, None, None]
        offset = key_pos[image, at] - query_pos[:, :, None] if keys else query_pos.new_zeros(1, *at.shape[1:], 2)
        logits = _neighbor_sums.products(rows, table, index, inverse)
    added = _position_bias(offset, bias_weight, bias, max_offset)
    logits = logits if added is None else logits + added
    logits = logits if padded is None else logits + torch.where(padded, _PADDED, 0.0).to(logits.dtype)[:, None]
    count = logits.shape[3]
    if blank_key is not None:
        logits = torch.cat([logits, (rows * blank_key[:, None]).sum(-1, keepdim=True)], -1)
    weights = logits.softmax(-1)
    of_keys = weights[..., :count]
    output = of_keys @ values if index is None else _neighbor_sums.sums(of_keys, values, index, inverse)
    if blank_value is not None:
        output = output + weights[..., count:] * blank_value[:, None]
    return output.transpose(1, 2).flatten(2).to(query.dtype)


def _position_bias(offset: Tensor, weight: Tensor | None, bias: Tensor | None, bound: int | None) -> Tensor | None:
    """What is added to the logits ``[B, H, N, K]`` for offsets ``[B, N, K, 2]``."""
    if weight is None:
        return None if bias is None else bias[:, None, None]
    offset = offset if bound is None else offset.clamp(-bound, bound)
    return torch.nn.functional.linear(offset_features(offset), weight, bias).permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------------------- native ----


def _fake_attention(query: Tensor, key: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, depth = query.shape
    normalizer = query.new_empty((batch, queries, heads, 2), dtype=compute_dtype(query))
    return query.new_empty(batch, queries, heads * depth), normalizer


def _fake_attention_backward(
    grad_output: Tensor,
    normalizer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    nearest: Tensor | None,
    cluster_size: int,
    bias_weight: Tensor | None,
    bias: Tensor | None,
    blank_key: Tensor | None,
    blank_value: Tensor | None,
    scale: float,
    max_offset: float,
    order: Tensor | None = None,
) -> tuple[Tensor, ...]:
    parameters = (bias_weight, bias, blank_key, blank_value)
    return (
        *(query.new_empty(tensor.shape) for tensor in (query, key, value)),
        *(normalizer.new_empty(0 if tensor is None else tensor.shape) for tensor in parameters),
    )


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _order(nearest: Tensor | None) -> Tensor | None:
    """The places in ``nearest [B, N, J]`` sorted by their cluster, ``[B, N * J]``: what the CUDA kernels ask for."""
    return None if nearest is None or nearest.device.type != 'cuda' else nearest.flatten(1).argsort(stable=True)


def _backward_attention(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    normalizer, *saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    if grad_output is None:
        return (None,) * len(ctx.others)
    left = iter(saved)
    inputs = [next(left) if other is None else other[0] for other in ctx.others]
    of_rows = torch.ops.boltz_mm.cluster_attention_backward(grad_output, normalizer, *inputs, _order(inputs[5]))
    gradients = dict(zip((0, 1, 2, 7, 8, 9, 10), of_rows, strict=True))
    return tuple(
        gradients[place] if place in gradients and value is not None else None for place, value in enumerate(inputs)
    )


def _attention_flops(query: Any, key: Any, value: Any, query_pos: Any, key_pos: Any, *args: Any, **kwargs: Any) -> int:
    """Two multiply-adds for each key, head and channel that a query sees."""
    nearest, cluster_size = args[0], args[1]
    batch, queries, heads, depth = query
    slots = key[1] if nearest is None else nearest[2] * cluster_size
    return 4 * batch * queries * heads * slots * depth


def _attention_backward_flops(grad_output: Any, normalizer: Any, *args: Any, **kwargs: Any) -> int:
    """The products again, those with the gradient, and three sums of weighted rows."""
    return _attention_flops(*args) * 5 // 2


if has_native_operators():
    _registration.register(
        'cluster_attention',
        fake=_fake_attention,
        setup_context=_setup_attention,
        backward=_backward_attention,
        flops=_attention_flops,
    )
    _registration.register_backward(
        'cluster_attention_backward', fake=_fake_attention_backward, flops=_attention_backward_flops
    )
