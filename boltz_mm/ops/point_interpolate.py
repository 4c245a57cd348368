"""Inverse-distance interpolation between points, and points back to images.

Source: "AutoFocusFormer: Image Segmentation off the Grid" (arXiv 2304.12406); official file
``mask2former/modeling/transformer_decoder/point_utils.py`` (``upsample_feature_shepard``, ``shepard_decay_weights``,
``points2img``) and ``MSDETRPCFunction`` of ``clusten.py``.

For a query at q with neighbours p_j, features f_j and a power P of the squared distance (3 means distance^6)::

    d_j = |q - p_j|^2,   u_j = 1 / (d_j^P + 1e-11),   w_j = u_j / sum of u,   out = sum of w_j f_j

Deviations from the official code, all of them where it gives NaN: neighbours that are all so far away that every u is 0
weigh 0 (official 0 / 0), and a neighbour at distance 0 or with ``d^P`` beyond the range of numbers gets a gradient of 0
for every power (official 0 * Inf for powers below 1).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from boltz_mm.ops import _deterministic, _registration
from boltz_mm.ops._backend import has_native_operators, use_native
from boltz_mm.ops._checks import check_float, check_shape, compute_dtype
from boltz_mm.ops.deform_attention import empty_sum
from boltz_mm.ops.point_merge import weighted_gather

EPSILON = 1e-11  # of u; the official code writes 10e-12
_ELEMENTS = 1 << 26  # of what sum_in_order holds at a time
Power = Tensor | float


def inverse_distance_weights(query_pos: Tensor, neighbour_pos: Tensor, power: Power) -> Tensor:
    """Weights of the neighbours of each query; see the formula at the top of this file.

    Args:
        query_pos: ``[..., 2]`` positions, float32 or float64.
        neighbour_pos: ``[..., k, 2]`` positions of the neighbours.
        power: Exponent of the squared distance; a number, or a tensor ``[1]``.

    Returns:
        ``[..., k]``, adding up to 1, or all 0 where no neighbour is near enough for the range of numbers.  Gradients
        flow to both positions and to the power, none through a neighbour at distance 0.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: Shapes do not match.
    """
    check_float('query_pos', query_pos, query_pos.device)
    check_float('neighbour_pos', neighbour_pos, query_pos.device)
    check_power(power, query_pos.device)
    if neighbour_pos.dim() < 2 or neighbour_pos.shape[-1] != 2:
        raise ValueError(f'neighbour_pos must have shape [..., k, 2], got {list(neighbour_pos.shape)}')
    check_shape('query_pos', query_pos, '[..., 2]', (*neighbour_pos.shape[:-2], 2))
    squared = (query_pos.unsqueeze(-2) - neighbour_pos).square().sum(-1)
    raised = squared.pow(power)
    if raised.requires_grad:
        # The derivatives of the power are not finite at 0, and beyond the range of numbers; nothing flows there.
        apart = (squared != 0) & ~raised.isinf()
        raised = torch.where(apart, torch.where(apart, squared, 1).pow(power), raised.detach())
    nearness = 1 / (raised + EPSILON)
    total = nearness.sum(-1, keepdim=True)
    return nearness / torch.where(total == 0, 1, total)


def inverse_distance_interpolate(feat: Tensor, pos: Tensor, query_pos: Tensor, index: Tensor, power: Power) -> Tensor:
    """Features at the queries, from those of their neighbours; see the formula at the top of this file.

    Args:
        feat: ``[B, M, C]``.
        pos: ``[B, M, 2]`` positions of the features.
        query_pos: ``[B, N, 2]`` positions of the queries.
        index: ``[B, N, k]`` int64 or int32, the neighbours of each query in 0..M-1.
        power: Exponent of the squared distance; a number, or a tensor ``[1]``.

    Returns:
        ``[B, N, C]`` in the dtype of ``feat``; weights and sums are float32 (float64 for float64 features).  Gradients
        flow to the features, to the positions and to the power.

    Raises:
        TypeError: A tensor is not floating point, or the index is no integer.
        ValueError: Shapes do not match.
        RuntimeError: An index is out of range (on the CPU).
    """
    check_points('feat', feat)
    batch, count, _ = feat.shape
    _check_index(index, feat, 3, '[B, N, k]')
    check_float('pos', pos, feat.device)
    check_float('query_pos', query_pos, feat.device)
    check_shape('pos', pos, '[B, M, 2]', (batch, count, 2))
    check_shape('query_pos', query_pos, '[B, N, 2]', (*index.shape[:2], 2))
    dtype = compute_dtype(feat)
    constant = not torch.is_grad_enabled() or not (pos.requires_grad or query_pos.requires_grad)
    if constant and use_native(feat.device):
        return torch.ops.boltz_mm.inverse_distance_interpolate(
            feat, pos.to(dtype), query_pos.to(dtype), index, as_power(power, pos.to(dtype))
        )
    index = index.long()
    neighbours = pos.to(dtype).gather(1, index.flatten(1)[..., None].expand(-1, -1, 2)).unflatten(1, index.shape[1:])
    power = power.to(dtype) if isinstance(power, Tensor) else power
    weights = inverse_distance_weights(query_pos.to(dtype), neighbours, power)
    return sum_of_rows(feat, index, weights)


def weighted_point_sampling(index: Tensor, weights: Tensor, attn: Tensor, value: Tensor) -> Tensor:
    """``out[n] = sum over m of attn[n, m] * sum over k of weights[n, m, k] * value[index[n, m, k]]`` (MSDETRPC).

    Args:
        index: ``[B, N, M, K]`` int64 or int32, rows of ``value``.
        weights: ``[B, N, M, K]`` interpolation weights.
        attn: ``[B, N, M]`` attention weights of the samples.
        value: ``[B, S, C]``.

    Returns:
        ``[B, N, C]`` in the dtype of ``value``; sums are float32 (float64 for float64 values).  Gradients flow to
        weights, attn and value.

    Raises:
        TypeError: A tensor is not floating point, or the index is no integer.
        ValueError: Shapes do not match.
        RuntimeError: An index is out of range (on the CPU).
    """
    check_points('value', value)
    _check_index(index, value, 4, '[B, N, M, K]')
    check_float('weights', weights, value.device)
    check_float('attn', attn, value.device)
    check_shape('weights', weights, '[B, N, M, K]', index.shape)
    check_shape('attn', attn, '[B, N, M]', index.shape[:3])
    dtype = compute_dtype(value)
    both = attn.to(dtype).unsqueeze(-1) * weights.to(dtype)
    return sum_of_rows(value, index.flatten(2).long(), both.flatten(2))


def points_to_image(feat: Tensor, pos: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Put features to their places on a canvas.

    Args:
        feat: ``[B, N, C]``, any dtype.
        pos: ``[B, N, 2]`` (x, y), integers in any dtype; each place at most once in an image.
        canvas: (height, width).

    Returns:
        ``[B, C, height, width]``, 0 where no point is.  Gradients flow to the features.

    Raises:
        ValueError: Shapes do not match, or a position is outside of the canvas (looked at on the CPU).
    """
    if feat.dim() != 3:
        raise ValueError(f'feat must have shape [B, N, C], got {list(feat.shape)}')
    batch, count, channels = feat.shape
    check_shape('pos', pos, '[B, N, 2]', (batch, count, 2))
    height, width = canvas
    pos = pos.detach().long()
    if pos.numel() and pos.device.type == 'cpu' and not torch.compiler.is_compiling():
        low, high = pos.flatten(0, 1).aminmax(dim=0)
        if int(low.min()) < 0 or int(high[0]) >= width or int(high[1]) >= height:
            raise ValueError(
                f'positions reach from (x, y) = {low.tolist()} to {high.tolist()}, outside of a canvas of '
                f'height {height} and width {width}'
            )
    cell = pos[..., 1] * width + pos[..., 0]
    if channels > 1 and feat.stride(2) != 1 and feat.stride(1) == 1:  # a transposed [B, C, N]
        image = feat.new_zeros(batch, channels, height * width)
        image = image.scatter(2, cell[:, None].expand(-1, channels, -1), feat.transpose(1, 2))
        return image.view(batch, channels, height, width)
    cell = cell + torch.arange(batch, device=cell.device)[:, None] * (height * width)
    rows = feat.new_zeros(batch * height * width, channels).index_copy(0, cell.flatten(), feat.flatten(0, 1))
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def sum_of_rows(value: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """``out[n] = sum over k of weights[n, k] * value[index[n, k]]``, without the gathered rows.

    Args:
        value: ``[B, S, C]``.
        index: ``[B, N, K]`` int64 in 0..S-1.
        weights: ``[B, N, K]`` in the compute dtype.

    Returns:
        ``[B, N, C]`` in the dtype of ``value``.
    """
    batch, rows, _ = value.shape
    if index.numel() and index.device.type == 'cpu' and not torch.compiler.is_compiling():
        low, high = index.aminmax()
        if int(low) < 0 or int(high) >= rows:
            raise RuntimeError(f'index is out of range: {int(low)}..{int(high)}, there are {rows} rows')
    if use_native(value.device):
        return weighted_gather(index, weights, value)
    images = torch.arange(batch, device=value.device)[:, None, None]
    return bags(value.flatten(0, 1), index + images * rows, weights)


def bags(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The sums of weighted rows of a table, with ``embedding_bag``.

    Args:
        table: ``[R, C]``.
        index: ``[..., K]`` int64, rows of the table.
        weights: ``[..., K]`` in the compute dtype.

    Returns:
        ``[..., C]`` in the dtype of ``table``.
    """
    shape = (*index.shape[:-1], table.shape[1])
    if index.numel() == 0 or table.numel() == 0:
        return empty_sum(table, weights).to(table.dtype).expand(shape)
    index, weights = index.flatten(0, -2), weights.flatten(0, -2)
    with torch.autocast(table.device.type, enabled=False):
        sums = F.embedding_bag(index, table.to(weights.dtype), per_sample_weights=weights, mode='sum')
    return sums.to(table.dtype).view(shape)


def sum_in_order(
    value: Tensor, grad_output: Tensor, part: Callable[[slice], tuple[Tensor, Tensor]], terms: int
) -> Tensor:
    """The gradient of ``value``, added up by ``index_add_``, which sorts where deterministic algorithms are asked for.

    Args:
        value: ``[B, ..., C]``; its numbers do not matter.
        grad_output: ``[B, N, ..., C]``.
        part: Takes some of the N queries; gives the rows of ``value`` as ``[R, C]`` that their outputs add up and the
            weights, each ``[B, n, ..., terms]``.
        terms: See above.

    Returns:
        A tensor like ``value``.
    """
    channels = value.shape[-1]
    sums = value.new_zeros(value.numel() // max(1, channels), channels, dtype=compute_dtype(value))
    step = max(1, _ELEMENTS // max(1, grad_output[:, :1].numel() * terms))
    for first in range(0, grad_output.shape[1], step):
        chosen = slice(first, first + step)
        rows, weights = part(chosen)
        added = weights[..., None] * grad_output[:, chosen, ..., None, :].to(sums.dtype)
        sums.index_add_(0, rows.flatten(), added.flatten(0, -2))
    return sums.view(value.shape).to(value.dtype)


def check_points(name: str, tensor: Tensor) -> None:
    """Require a floating-point tensor ``[B, M, C]``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(tensor).__name__}')
    check_float(name, tensor, tensor.device)
    if tensor.dim() != 3:
        raise ValueError(f'{name} must have three dimensions, got {list(tensor.shape)}')


def check_power(power: Power, device: torch.device) -> None:
    """Require a number, or a floating-point tensor with one element."""
    if isinstance(power, Tensor):
        check_float('power', power, device)
        if power.numel() != 1:
            raise ValueError(f'power must have one element, got {list(power.shape)}')
    elif not isinstance(power, int | float):
        raise TypeError(f'power must be a number or a tensor, got {type(power).__name__}')


def as_power(power: Power, like: Tensor) -> Tensor:
    """A power as a tensor ``[1]`` of the dtype and device of another one."""
    return power.to(like.dtype).reshape(1) if isinstance(power, Tensor) else like.new_full((1,), power)


def _check_index(index: Tensor, value: Tensor, dims: int, meaning: str) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f'index must be int64 or int32, got {getattr(index, "dtype", type(index).__name__)}')
    if index.dim() != dims or index.shape[0] != value.shape[0]:
        raise ValueError(f'index must have shape {meaning} with B = {value.shape[0]}, got {list(index.shape)}')
    if index.device != value.device:
        raise ValueError(f'index is on {index.device}, the features on {value.device}')


def _fake(feat: Tensor, pos: Tensor, query_pos: Tensor, index: Tensor, power: Tensor) -> Tensor:
    return feat.new_empty(*index.shape[:2], feat.shape[2])


def _fake_backward(
    grad_output: Tensor, feat: Tensor, pos: Tensor, query_pos: Tensor, index: Tensor, power: Tensor, feat_needed: bool,
    power_needed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return feat.new_empty(feat.shape if feat_needed else 0), power.new_empty(int(power_needed))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    feat, pos, query_pos, index, power = saved
    feat_needed, power_needed = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    sorts = feat_needed and _deterministic.needed(feat)
    grad_feat, grad_power = torch.ops.boltz_mm.inverse_distance_interpolate_backward(
        grad_output, *saved, feat_needed and not sorts, power_needed
    )
    if sorts:
        image = torch.arange(len(feat), device=feat.device)[:, None, None]

        def part(chosen: slice) -> tuple[Tensor, Tensor]:
            rows = index[:, chosen].long() + image * feat.shape[1]
            return rows, inverse_distance_weights(query_pos[:, chosen], pos.flatten(0, 1)[rows], power)

        grad_feat = sum_in_order(feat, grad_output, part, index.shape[2])
    return grad_feat if feat_needed else None, None, None, None, grad_power if power_needed else None


def _flops(feat: Any, pos: Any, query_pos: Any, index: Any, *args: Any, **kwargs: Any) -> int:
    """A multiply-add for each neighbour and channel; the weights are not counted."""
    batch, queries, neighbours = index
    return 2 * batch * queries * neighbours * feat[2]


def _backward_flops(
    grad_output: Any, feat: Any, pos: Any, query_pos: Any, index: Any, power: Any, feat_needed: bool,
    power_needed: bool, **kwargs: Any,
) -> int:  # fmt: skip
    """An addition to each neighbour, and for the power a product with it."""
    return (int(feat_needed) + int(power_needed)) * _flops(feat, pos, query_pos, index)


if has_native_operators():
    _registration.register(
        'inverse_distance_interpolate', fake=_fake, setup_context=_setup_context, backward=_backward, flops=_flops
    )
    _registration.register_backward('inverse_distance_interpolate_backward', fake=_fake_backward, flops=_backward_flops)
    _registration.register_vmap('inverse_distance_interpolate', constant=('power',))
    _registration.register_vmap('inverse_distance_interpolate_backward', constant=('power',))
