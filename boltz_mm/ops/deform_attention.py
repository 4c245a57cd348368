"""Multi-scale deformable attention at given points: bilinear samples of several levels, weighted and summed.

For query q, head h and channel c::

    out[q, h, c] = sum over l, p of  weights[q, h, l, p] * V_l(x, y)[h, c]
    x = locations[q, h, l, p, 0] * W_l - 0.5,  y = locations[q, h, l, p, 1] * H_l - 0.5

``V_l`` is the bilinear interpolation of level l with zeros outside, and a point contributes only if ``-1 < x < W_l``
and ``-1 < y < H_l`` (so a NaN contributes nothing).  This is the operator of Deformable DETR (arXiv 2010.04159, section
4.1), of mmcv's ``MultiScaleDeformableAttention`` and, with the grid of a box as points, of BoxeR (arXiv 2111.13087,
``e2edet/module/ops/box_attention_func.py::BoxAttnFunction``).

Deviations: no ``im2col_step`` and so no divisibility of the batch, ``level_start_index`` follows from the shapes,
float16 and bfloat16 values with float32 coordinates and sums, deterministic (on CUDA the gradient of ``value`` only
where ``torch.use_deterministic_algorithms`` asks for it, and then slower).

Cost, with an element of value of s bytes: the result takes ``s B Q H D`` bytes, backward keeps the inputs alone.  FLOPs
of the forward pass are ``8 B Q H L P D``, of the backward pass ``16 B Q H L P D``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from boltz_mm.ops import _deterministic, _registration
from boltz_mm.ops._backend import has_native_operators, use_native
from boltz_mm.ops._checks import Shapes, as_shapes_tensor, check_float, check_shape, check_value, compute_dtype


def deform_attention(value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample every level at the given points and add up the samples.

    Args:
        value: ``[B, S, H, D]``, levels concatenated row-major, ``S = sum(h * w)``.
        spatial_shapes: ``[L, 2]`` integers (height, width); a tensor or a list of pairs.
        locations: ``[B, Q, H, L, P, 2]``, (x, y) in 0..1 of the padded level; may lie outside.
        weights: ``[B, Q, H, L, P]``, already normalised.

    Returns:
        ``[B, Q, H * D]`` in the dtype of ``value``.  Coordinates and sums are float32 (float64 for float64 values)
        whatever autocast says: keep ``locations`` in float32, a float16 coordinate is off by up to a cell.

    Raises:
        TypeError: A tensor is not floating point, or the shapes are not integers.
        ValueError: Shapes do not match, or the levels do not add up to S.
    """
    check_value(value)
    shapes = as_shapes_tensor(spatial_shapes, value)
    check_float('locations', locations, value.device)
    check_float('weights', weights, value.device)
    batch, _, heads, _ = value.shape
    if locations.dim() != 6:
        raise ValueError(f'locations must have shape [B, Q, H, L, P, 2], got {list(locations.shape)}')
    queries, points = locations.shape[1], locations.shape[4]
    expected = (batch, queries, heads, shapes.shape[0], points)
    check_shape('locations', locations, '[B, Q, H, L, P, 2]', (*expected, 2))
    check_shape('weights', weights, '[B, Q, H, L, P]', expected)
    dtype = compute_dtype(value)
    locations, weights = locations.to(dtype), weights.to(dtype)
    if use_native(value.device):
        return torch.ops.boltz_mm.deform_attention(value, shapes, locations, weights)
    return reference_deform_attention(value, shapes, locations, weights)


def reference_deform_attention(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """:func:`deform_attention` in plain PyTorch: one ``grid_sample`` per level, weighted and added up.

    Args:
        value: ``[B, S, H, D]``.
        spatial_shapes: ``[L, 2]`` int64.
        locations: ``[B, Q, H, L, P, 2]`` in the compute dtype.
        weights: ``[B, Q, H, L, P]`` in the compute dtype.

    Returns:
        ``[B, Q, H * D]`` in the dtype of ``value``.
    """
    batch, queries, heads = locations.shape[:3]
    depth, points = value.shape[3], locations.shape[4]
    dtype = locations.dtype
    output = empty_sum(value, locations, weights).to(dtype).expand(batch * heads, depth, queries)
    if output.numel() == 0 or points == 0:
        return output.reshape(batch, heads * depth, queries).transpose(1, 2).to(value.dtype)
    with torch.autocast(value.device.type, enabled=False):
        for level, samples in enumerate(sample_levels(value, spatial_shapes, locations)):
            if samples is not None:
                scale = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
                output = output + (samples * scale).sum(-1)
    return output.reshape(batch, heads * depth, queries).transpose(1, 2).to(value.dtype)


def empty_sum(*tensors: Tensor) -> Tensor:
    """A zero that depends on the tensors, so that they get a zero gradient where nothing else is computed."""
    return torch.stack([tensor.flatten()[:0].sum().to(torch.float64) for tensor in tensors]).sum()


def sample_levels(value: Tensor, spatial_shapes: Tensor, locations: Tensor) -> list[Tensor | None]:
    """Bilinear samples of each level; zeros outside and at points that are not finite.

    Args:
        value: ``[B, S, H, D]``.
        spatial_shapes: ``[L, 2]`` int64.
        locations: ``[B, Q, H, L, P, 2]``.

    Returns:
        One ``[B * H, D, Q, P]`` per level in the dtype of ``locations``; ``None`` for a level without cells.
    """
    batch, queries, heads, _, points, _ = locations.shape
    sizes = [(int(height), int(width)) for height, width in spatial_shapes.tolist()]
    # grid_sample multiplies by the coordinate even where it finds nothing, so NaN and Inf must not reach it.
    grid = torch.where(locations.abs() < 1e4, locations, -2.0) * 2 - 1
    sampled: list[Tensor | None] = []
    for level, part in enumerate(value.to(locations.dtype).split([height * width for height, width in sizes], dim=1)):
        height, width = sizes[level]
        if height * width == 0:
            sampled.append(None)
            continue
        planes = part.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        at = grid[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        sampled.append(F.grid_sample(planes, at, mode='bilinear', padding_mode='zeros', align_corners=False))
    return sampled


def _fake(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor, value_needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_value = value.new_empty(value.shape if value_needed else 0)
    return grad_value, locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    value, shapes, locations, weights = saved
    value_needed = ctx.needs_input_grad[0]
    sorts = value_needed and _deterministic.needed(value)
    grad_value, grad_locations, grad_weights = torch.ops.boltz_mm.deform_attention_backward(
        grad_output, *saved, value_needed and not sorts
    )
    if sorts:
        at_points = grad_output.unflatten(-1, value.shape[2:]).unsqueeze(3)
        grad_value = _deterministic.gradient_of_value(value, shapes, locations, [(weights, at_points)])
    return grad_value if value_needed else None, None, grad_locations, grad_weights


def _flops(value: Any, spatial_shapes: Any, locations: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    """Four multiply-adds for each sample and channel; coordinates are not counted."""
    batch, queries, heads, levels, points, _ = locations
    return 8 * batch * queries * heads * levels * points * value[3]


def _backward_flops(grad_output: Any, *args: Any, **kwargs: Any) -> int:
    """Four products with the corners and four additions to them: twice the forward pass."""
    return 2 * _flops(*args[:4])


if has_native_operators():
    _registration.register(
        'deform_attention', fake=_fake, setup_context=_setup_context, backward=_backward, flops=_flops
    )
    _registration.register_backward('deform_attention_backward', fake=_fake_backward, flops=_backward_flops)
    _registration.register_vmap('deform_attention', constant=('spatial_shapes',))
    _registration.register_vmap('deform_attention_backward', constant=('spatial_shapes',))
