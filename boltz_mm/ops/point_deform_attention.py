"""Multi-scale deformable attention on points: samples between the tokens nearest to a cell, weighted and summed.

Source: "AutoFocusFormer: Image Segmentation off the Grid" (arXiv 2304.12406), section 3.3; official files
``mask2former/modeling/pixel_decoder/msdeformattn_pc.py`` (``MSDeformAttnPc``), ``point_utils.py`` and the operator
``MSDETRPC`` of ``clusten.py``.

For query q, head h, level l and point p, on a canvas of w x h cells::

    at    = query_pos[q] + offsets[q, h, l, p]                         in cells
    cell  = (clamp(round(at.x), 0, w - 1), clamp(round(at.y), 0, h - 1))   halves round to even
    d_j   = |at - positions[t_j]|^2 for the tokens t_j = tables[l, cell]
    u_j   = 1 / (d_j^power + 1e-11)
    out[q, h] = sum over l, p of softmax_{l, p}(logits) * sum over j of (u_j / sum of u) * value[t_j, h]

Gradients flow to value, logits, power and, through the distances (not through the choice of the cell), to offsets and
``query_pos``.  The positions of tokens and the tables are constants.  A token at distance 0 passes no gradient on.

Deviations: the official code gives NaN for a sample that is not finite, or so far away that ``d^power`` of all its
tokens is beyond the range of numbers; here such a sample adds nothing to the sum and gets gradients of 0.

Cost, with an element of value of s bytes: the result takes ``s B N H D`` bytes, backward keeps the inputs alone; no
places, neighbours or weights of the samples exist.  FLOPs of the forward pass are ``2 B N H L P K D``, of the backward
pass ``4 B N H L P K D``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from boltz_mm.ops import _deterministic, _registration
from boltz_mm.ops._backend import has_native_operators, use_native
from boltz_mm.ops._checks import check_float, check_shape, check_value, compute_dtype
from boltz_mm.ops.deform_attention import empty_sum
from boltz_mm.ops.point_interpolate import (
    Power,
    as_power,
    bags,
    check_power,
    inverse_distance_weights,
    sum_in_order,
)


def point_deform_attention(
    value: Tensor,
    positions: Tensor,
    level_sizes: Sequence[int],
    tables: Tensor,
    canvas: tuple[int, int],
    query_pos: Tensor,
    offsets: Tensor,
    logits: Tensor,
    power: Power,
) -> Tensor:
    """Sample between the nearest tokens of every level and add up; see the formula at the top of this file.

    Args:
        value: ``[B, S, H, D]``, the tokens of all levels one level after the other.
        positions: ``[B, S, 2]`` (x, y) of the tokens in cells of the canvas.
        level_sizes: Number of tokens of each of the L levels, together S.
        tables: ``[B, L, h * w, K]`` int64 or int32 (K = 4 in the paper): the tokens nearest to each cell of the canvas
            (row by row), as numbers within their level.
        canvas: (h, w).
        query_pos: ``[B, N, 2]`` (x, y) in cells.
        offsets: ``[B, N, H, L, P, 2]`` (x, y) in cells.
        logits: ``[B, N, H, L, P]``, softmax over L and P jointly is taken inside.
        power: Exponent of the squared distance; a number, or a tensor ``[1]`` with a gradient.

    ``positions``, ``query_pos`` and ``tables`` may have a batch size of 1 for all images.

    Returns:
        ``[B, N, H * D]`` in the dtype of ``value``.  Positions, softmax, weights and sums are float32 (float64 for
        float64 values) whatever autocast says: keep offsets in float32.

    Raises:
        TypeError: A tensor is not floating point, or the tables are no integers.
        ValueError: Shapes do not match, or the level sizes do not add up to S.
        RuntimeError: An entry of the tables is no token of its level (on the CPU).
    """
    check_value(value)
    sizes = _check(value, positions, level_sizes, tables, canvas, query_pos, offsets, logits, power)
    dtype = compute_dtype(value)
    batch = value.shape[0]
    positions = positions.detach().to(dtype).expand(batch, -1, -1)
    query_pos, tables = query_pos.to(dtype).expand(batch, -1, -1), tables.expand(batch, -1, -1, -1)
    offsets, logits = offsets.to(dtype), logits.to(dtype)
    if use_native(value.device):
        power = as_power(power, offsets)
        return torch.ops.boltz_mm.point_deform_attention(
            value, positions, sizes, tables, canvas[0], canvas[1], query_pos, offsets, logits, power
        )
    power = power.to(dtype) if isinstance(power, Tensor) else float(power)
    return reference_point_deform_attention(value, positions, sizes, tables, canvas, query_pos, offsets, logits, power)


def reference_point_deform_attention(
    value: Tensor,
    positions: Tensor,
    level_sizes: Sequence[int],
    tables: Tensor,
    canvas: tuple[int, int],
    query_pos: Tensor,
    offsets: Tensor,
    logits: Tensor,
    power: Power,
) -> Tensor:
    """:func:`point_deform_attention` in plain PyTorch, with ``embedding_bag``; the same arguments, already checked."""
    batch, queries, heads = offsets.shape[:3]
    tokens, depth = value.shape[1], value.shape[3]
    sizes = torch.tensor(level_sizes, device=value.device, dtype=torch.int64)
    _check_tables(tables, sizes)
    if offsets.numel() == 0 or value.numel() == 0:
        nothing = empty_sum(value, offsets, logits, *([power] if isinstance(power, Tensor) else []))
        return nothing.to(value.dtype).expand(batch, queries, heads * depth)
    rows, weights = _weighted_rows(heads, tokens, positions, sizes, tables, canvas, query_pos, offsets, logits, power)
    return bags(value.reshape(-1, depth), rows, weights).reshape(batch, queries, heads * depth)


def _weighted_rows(
    heads: int,
    tokens: int,
    positions: Tensor,
    sizes: Tensor,
    tables: Tensor,
    canvas: tuple[int, int],
    query_pos: Tensor,
    offsets: Tensor,
    logits: Tensor,
    power: Power,
) -> tuple[Tensor, Tensor]:
    """Rows of ``value`` as ``[B * S * H, D]`` that each output adds up, and their weights: ``[B, N, H, L * P * K]``."""
    batch, _, _, levels, _, _ = offsets.shape
    at = query_pos[:, :, None, None, None] + offsets
    finite = at.isfinite().all(-1)
    at = torch.where(finite[..., None], at, 0)
    with torch.no_grad():
        column = at[..., 0].round().clamp(0, canvas[1] - 1).long()
        row = at[..., 1].round().clamp(0, canvas[0] - 1).long()
        level = torch.arange(levels, device=at.device)[:, None]
        image = torch.arange(batch, device=at.device)[:, None, None, None, None]
        entry = (image * levels + level) * (canvas[0] * canvas[1]) + row * canvas[1] + column
        number = tables.reshape(-1, tables.shape[3])[entry].long()
        sizes = sizes[:, None, None]
        inside = (number >= 0) & (number < sizes) if number.device.type != 'cpu' else None  # there they were looked at
        if inside is not None:
            number = torch.where(inside, number, 0)
        token = number + (sizes.cumsum(0) - sizes) + image[..., None] * tokens
        near = positions.flatten(0, 1)[token]
        if inside is not None:
            near = torch.where(inside[..., None], near, torch.inf)
        rows = token * heads + torch.arange(heads, device=at.device)[:, None, None, None]
    shares = inverse_distance_weights(at, near, power) * finite[..., None]
    attention = logits.flatten(3).softmax(-1).view(logits.shape)
    return rows.flatten(3), (attention[..., None] * shares).flatten(3)


def _check_tables(tables: Tensor, sizes: Tensor) -> None:
    """Require entries of the levels' sizes ``[L]``; on the CPU, where that needs no waiting."""
    if tables.numel() == 0 or tables.device.type != 'cpu' or torch.compiler.is_compiling():
        return
    low, high = tables.transpose(0, 1).flatten(1).aminmax(dim=1)
    wrong = (low < 0) | (high >= sizes)
    if wrong.any():
        level = int(wrong.nonzero()[0])
        raise RuntimeError(
            f'tables must hold tokens of their level: level {level} has {int(sizes[level])} tokens, its table '
            f'{int(low[level])}..{int(high[level])}'
        )


def _check(
    value: Tensor,
    positions: Tensor,
    level_sizes: Sequence[int],
    tables: Tensor,
    canvas: tuple[int, int],
    query_pos: Tensor,
    offsets: Tensor,
    logits: Tensor,
    power: Power,
) -> list[int]:
    for name, tensor in (('positions', positions), ('query_pos', query_pos), ('offsets', offsets), ('logits', logits)):
        check_float(name, tensor, value.device)
    check_power(power, value.device)
    sizes = [int(size) for size in level_sizes]
    batch, tokens, heads, _ = value.shape
    if any(size < 0 for size in sizes) or sum(sizes) != tokens:
        raise ValueError(f'level_sizes {sizes} must add up to the {tokens} tokens of value')
    height, width = canvas
    if height < 1 or width < 1:
        raise ValueError(f'canvas must be a positive (height, width), got {canvas}')
    if not isinstance(tables, Tensor) or tables.dtype not in (torch.int64, torch.int32):
        raise TypeError(f'tables must be int64 or int32, got {getattr(tables, "dtype", type(tables).__name__)}')
    if tables.device != value.device:
        raise ValueError(f'tables are on {tables.device}, value on {value.device}')
    if offsets.dim() != 6:
        raise ValueError(f'offsets must have shape [B, N, H, L, P, 2], got {list(offsets.shape)}')
    queries, points = offsets.shape[1], offsets.shape[4]
    check_shape('offsets', offsets, '[B, N, H, L, P, 2]', (batch, queries, heads, len(sizes), points, 2))
    check_shape('logits', logits, '[B, N, H, L, P]', offsets.shape[:5])
    check_shape('positions', positions, '[B, S, 2]', (_batch(positions, batch), tokens, 2))
    check_shape('query_pos', query_pos, '[B, N, 2]', (_batch(query_pos, batch), queries, 2))
    if tables.dim() != 4 or tables.shape[3] < 1:
        raise ValueError(f'tables must have shape [B, L, h * w, K] with K > 0, got {list(tables.shape)}')
    expected = (_batch(tables, batch), len(sizes), height * width, tables.shape[3])
    check_shape('tables', tables, '[B, L, h * w, K]', expected)
    return sizes


def _batch(tensor: Tensor, batch: int) -> int:
    """The batch size that a tensor must have: 1 stands for all images."""
    return 1 if tensor.dim() > 0 and tensor.shape[0] == 1 else batch


def _fake(value: Tensor, positions: Tensor, level_sizes: list[int], tables: Tensor, height: int, width: int,
          query_pos: Tensor, offsets: Tensor, logits: Tensor, power: Tensor) -> Tensor:  # fmt: skip
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(
    grad_output: Tensor, value: Tensor, positions: Tensor, level_sizes: list[int], tables: Tensor, height: int,
    width: int, query_pos: Tensor, offsets: Tensor, logits: Tensor, power: Tensor, value_needed: bool,
    power_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        value.new_empty(value.shape if value_needed else 0),
        offsets.new_empty(offsets.shape),
        logits.new_empty(logits.shape),
        power.new_empty(int(power_needed)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, positions, ctx.level_sizes, tables, ctx.height, ctx.width, *rest = inputs
    ctx.save_for_backward(value, positions, tables, *rest)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, positions, tables, query_pos, offsets, logits, power = ctx.saved_tensors
    value_needed, power_needed = ctx.needs_input_grad[0], ctx.needs_input_grad[9]
    sorts = value_needed and _deterministic.needed(value)
    grad_value, grad_offsets, grad_logits, grad_power = torch.ops.boltz_mm.point_deform_attention_backward(
        grad_output, value, positions, ctx.level_sizes, tables, ctx.height, ctx.width, query_pos, offsets, logits,
        power, value_needed and not sorts, power_needed,
    )  # fmt: skip
    if sorts:
        sizes = torch.tensor(ctx.level_sizes, device=value.device, dtype=torch.int64)
        heads, tokens, canvas = value.shape[2], value.shape[1], (ctx.height, ctx.width)

        def part(chosen: slice) -> tuple[Tensor, Tensor]:
            places = query_pos[:, chosen], offsets[:, chosen], logits[:, chosen], power
            return _weighted_rows(heads, tokens, positions, sizes, tables, canvas, *places)

        grad_value = sum_in_order(
            value, grad_output.unflatten(-1, value.shape[2:]), part, tables.shape[3] * logits.shape[3:].numel()
        )
    return (
        grad_value if value_needed else None, None, None, None, None, None,
        grad_offsets.sum((2, 3, 4)) if ctx.needs_input_grad[6] else None,
        grad_offsets, grad_logits, grad_power if power_needed else None,
    )  # fmt: skip


def _flops(value: Any, positions: Any, level_sizes: Any, tables: Any, height: int, width: int, query_pos: Any,
           offsets: Any, *args: Any, **kwargs: Any) -> int:  # fmt: skip
    """A multiply-add for each sample, neighbour and channel; places and weights are not counted."""
    batch, queries, heads, levels, points, _ = offsets
    return 2 * batch * queries * heads * levels * points * tables[3] * value[3]


def _backward_flops(grad_output: Any, *args: Any, **kwargs: Any) -> int:
    """A product with each neighbour and an addition to it: twice the forward pass."""
    return 2 * _flops(*args[:8])


if has_native_operators():
    _registration.register(
        'point_deform_attention', fake=_fake, setup_context=_setup_context, backward=_backward, flops=_flops
    )
    _registration.register_backward('point_deform_attention_backward', fake=_fake_backward, flops=_backward_flops)
    _registration.register_vmap('point_deform_attention', constant=('power',))
    _registration.register_vmap('point_deform_attention_backward', constant=('power',))
