"""Box attention and instance attention of BoxeR: a grid in every head's and level's box, sampled and weighted.

Source: "BoxeR: Box-Attention for 2D and 3D Transformers" (arXiv 2111.13087), section 3.1 and 3.3; official files
``e2edet/module/box_attention.py`` and ``e2edet/module/ops/box_attention_func.py``.

For query q, head h, level l with box (cx, cy, w, h) and grid point k::

    point   = (cx, cy) + R(angle) (k * relu(w, h)), times the level's valid ratio
    S       = bilinear sample of the level at point (zeros outside, centres of cells at (i + 0.5) / n)

    box attention        out      = sum over l, p of softmax_{l, p}(logits) * S
    instance attention   out      = sum over l, p of softmax_{l, quadrant}(logits) / (m / 2)^2 * S
                         mask_out = sum over l    of softmax_l(logits of the point's quadrant) * S, for each grid point

Deviation from the official code: the operators take boxes and logits, so that neither the sampling locations
``[B, Q, H, L, P, 2]`` nor repeated weights ``[B, Q, H, L, P]`` exist in memory.

Cost, with an element of value of s bytes and P points of a level: results take ``s B Q H D`` bytes, a mask output
``P`` times as many; backward keeps the inputs alone.  FLOPs of the forward pass are ``8 B Q H L P D`` (12 with a mask
output), of the backward pass ``16`` (28).
"""

import math
from typing import Any

import torch
from torch import Tensor

from boltz_mm.ops import _deterministic, _registration
from boltz_mm.ops._backend import has_native_operators, use_native
from boltz_mm.ops._checks import Shapes, as_shapes_tensor, check_float, check_shape, check_value, compute_dtype
from boltz_mm.ops.deform_attention import empty_sum, reference_deform_attention, sample_levels


def grid_points(
    size: int,
    *,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The sampling grid of a box in units of the box size, centred on 0.

    Args:
        size: Number m of points along each side.
        scale: Divisor of the index offsets; m by default, 2 in BoxeR-3D.
        dtype: dtype of the result.  The points are rounded to float32 first, as in the official weights.
        device: Where to put the result.

    Returns:
        ``[m * m, 2]``: ``((j - (m - 1) / 2) / scale, (i - (m - 1) / 2) / scale)`` as (x, y), row-major in (i, j).

    Raises:
        ValueError: ``size`` or ``scale`` is not positive.
    """
    scale = size if scale is None else scale
    if size < 1 or not scale > 0:
        raise ValueError(f'size and scale of a grid must be positive, got {size} and {scale}')
    steps = (torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2) / scale
    y, x = torch.meshgrid(steps, steps, indexing='ij')
    return torch.stack([x, y], dim=-1).reshape(-1, 2).to(dtype)


def box_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    boxes: Tensor,
    logits: Tensor,
    points: Tensor,
    *,
    valid_ratios: Tensor | None = None,
    angles: Tensor | None = None,
) -> Tensor:
    """Attend to a grid of points in each box; see the formula at the top of this file.

    Args:
        value: ``[B, S, H, D]``, levels concatenated row-major, ``S = sum(h * w)``.
        spatial_shapes: ``[L, 2]`` integers (height, width); a tensor or a list of pairs.
        boxes: ``[B, Q, H, L, 4]``, (cx, cy, w, h) in 0..1 of the unpadded image; sizes below 0 count as 0.
        logits: ``[B, Q, H, L, P]``, softmax over L and P jointly is taken inside.
        points: ``[P, 2]``, (x, y) offsets in units of the box size, see :func:`grid_points`.
        valid_ratios: ``[B, L, 2]``, (x, y) share of the padded level that the image covers.
        angles: ``[B, Q, H, L]``, rotation of the grid in radians.

    Returns:
        ``[B, Q, H * D]`` in the dtype of ``value``.  Coordinates, softmax and sums are float32 (float64 for float64
        values) whatever autocast says: keep ``boxes`` in float32.

    Gradients flow to value, boxes, logits and angles; valid ratios and points are constants.

    Raises:
        TypeError: A tensor is not floating point, or the shapes are not integers.
        ValueError: Shapes do not match, or the levels do not add up to S.
    """
    shapes = _check(value, spatial_shapes, boxes, points, valid_ratios)
    check_float('logits', logits, value.device)
    check_shape('logits', logits, '[B, Q, H, L, P]', (*boxes.shape[:4], points.shape[0]))
    if angles is not None:
        check_float('angles', angles, value.device)
        check_shape('angles', angles, '[B, Q, H, L]', boxes.shape[:4])
    dtype = compute_dtype(value)
    boxes, logits, points = boxes.to(dtype), logits.to(dtype), points.to(dtype)
    valid_ratios, angles = _cast(valid_ratios, dtype), _cast(angles, dtype)
    if use_native(value.device):
        return torch.ops.boltz_mm.box_attention(value, shapes, boxes, logits, points, valid_ratios, angles)
    locations = _finite_locations(boxes, points, valid_ratios, angles)
    return reference_deform_attention(value, shapes, locations, box_attention_weights(logits))


def instance_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    boxes: Tensor,
    logits: Tensor,
    points: Tensor,
    *,
    valid_ratios: Tensor | None = None,
    mask_output: bool = True,
) -> tuple[Tensor, Tensor] | Tensor:
    """Attend to an m x m grid in each box, and keep the grid as a feature map; see the top of this file.

    Args:
        value: ``[B, S, H, D]``, levels concatenated row-major, ``S = sum(h * w)``.
        spatial_shapes: ``[L, 2]`` integers (height, width); a tensor or a list of pairs.
        boxes: ``[B, Q, H, L, 4]``, (cx, cy, w, h) in 0..1 of the unpadded image; sizes below 0 count as 0.
        logits: ``[B, Q, H, L, 2, 2]``, one for each quadrant (row, column) of the grid.
        points: ``[m * m, 2]`` with m even, row-major, see :func:`grid_points`.
        valid_ratios: ``[B, L, 2]``, (x, y) share of the padded level that the image covers.
        mask_output: Also return the feature map of the grid.

    Returns:
        ``output [B, Q, H * D]`` and, if asked for, ``mask_output [B, Q, m, m, H * D]``, in the dtype of ``value``.

    Raises:
        TypeError: A tensor is not floating point, or the shapes are not integers.
        ValueError: Shapes do not match, m is odd, or the levels do not add up to S.
    """
    shapes = _check(value, spatial_shapes, boxes, points, valid_ratios)
    check_float('logits', logits, value.device)
    check_shape('logits', logits, '[B, Q, H, L, 2, 2]', (*boxes.shape[:4], 2, 2))
    size = math.isqrt(points.shape[0])
    if size * size != points.shape[0] or size % 2 or size == 0:
        raise ValueError(f'instance attention needs an m x m grid with m even, got {points.shape[0]} points')
    dtype = compute_dtype(value)
    boxes, logits, points, valid_ratios = (
        boxes.to(dtype),
        logits.to(dtype),
        points.to(dtype),
        _cast(valid_ratios, dtype),
    )
    if use_native(value.device):
        output, masks = torch.ops.boltz_mm.instance_attention(
            value, shapes, boxes, logits, points, valid_ratios, mask_output
        )
        return (output, masks) if mask_output else output
    return _reference_instance_attention(value, shapes, boxes, logits, points, valid_ratios, mask_output)


def box_sampling_locations(
    boxes: Tensor, points: Tensor, *, valid_ratios: Tensor | None = None, angles: Tensor | None = None
) -> Tensor:
    """The points that the operators sample, as (x, y) in 0..1 of the padded level.

    Args:
        boxes: ``[B, Q, H, L, 4]``.
        points: ``[P, 2]``.
        valid_ratios: ``[B, L, 2]``.
        angles: ``[B, Q, H, L]`` radians.

    Returns:
        ``[B, Q, H, L, P, 2]``.
    """
    offsets = points * boxes[..., None, 2:].relu()
    if angles is not None:
        cos, sin = angles.cos()[..., None], angles.sin()[..., None]
        x, y = offsets.unbind(-1)
        offsets = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)
    locations = boxes[..., None, :2] + offsets
    return locations if valid_ratios is None else locations * valid_ratios[:, None, None, :, None].detach()


def box_attention_weights(logits: Tensor) -> Tensor:
    """Weights of box attention: softmax of ``[B, Q, H, L, P]`` over levels and points jointly."""
    return logits.flatten(3).softmax(-1).view(logits.shape)


def instance_attention_weights(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Weights of instance attention for each grid point.

    Args:
        logits: ``[B, Q, H, L, 2, 2]``.
        size: Number m of grid points along each side.

    Returns:
        Spatial and level weights, each ``[B, Q, H, L, m, m]``.
    """
    half = size // 2
    spatial = logits.flatten(3).softmax(-1).view(logits.shape) / half**2
    level = logits.softmax(3)
    spatial, level = (
        weights.repeat_interleave(half, dim=-2).repeat_interleave(half, dim=-1) for weights in (spatial, level)
    )
    return spatial, level


def _finite_locations(boxes: Tensor, points: Tensor, valid_ratios: Tensor | None, angles: Tensor | None) -> Tensor:
    """Sampling locations; a box that is not finite is moved outside, so that its gradients are 0 and not NaN."""
    boxes = torch.cat([boxes[..., :2], boxes[..., 2:].relu()], dim=-1)
    good = boxes.isfinite().all(-1)
    if angles is not None:
        good = good & angles.isfinite()
        angles = torch.where(good, angles, 0)
    boxes = torch.where(good[..., None], boxes, boxes.new_tensor([-100, -100, 0, 0]))
    return box_sampling_locations(boxes, points.detach(), valid_ratios=valid_ratios, angles=angles)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _check(value: Tensor, spatial_shapes: Shapes, boxes: Tensor, points: Tensor, valid_ratios: Tensor | None) -> Tensor:
    check_value(value)
    shapes = as_shapes_tensor(spatial_shapes, value)
    check_float('boxes', boxes, value.device)
    check_float('points', points, value.device)
    if boxes.dim() != 5:
        raise ValueError(f'boxes must have shape [B, Q, H, L, 4], got {list(boxes.shape)}')
    batch, _, heads, _ = value.shape
    check_shape('boxes', boxes, '[B, Q, H, L, 4]', (batch, boxes.shape[1], heads, shapes.shape[0], 4))
    if points.dim() != 2 or points.shape[1] != 2:
        raise ValueError(f'points must have shape [P, 2], got {list(points.shape)}')
    if valid_ratios is not None:
        check_float('valid_ratios', valid_ratios, value.device)
        check_shape('valid_ratios', valid_ratios, '[B, L, 2]', (batch, shapes.shape[0], 2))
    return shapes


def _reference_instance_attention(
    value: Tensor,
    shapes: Tensor,
    boxes: Tensor,
    logits: Tensor,
    points: Tensor,
    valid_ratios: Tensor | None,
    mask_output: bool,
) -> tuple[Tensor, Tensor] | Tensor:
    size = math.isqrt(points.shape[0])
    locations = _finite_locations(boxes, points, valid_ratios, None)
    spatial, level = (weights.flatten(-2) for weights in instance_attention_weights(logits, size))
    if not mask_output:
        return reference_deform_attention(value, shapes, locations, spatial)
    batch, queries, heads, _, count, _ = locations.shape
    depth = value.shape[3]
    output = empty_sum(value, boxes, logits).to(boxes.dtype).expand(batch * heads, depth, queries)
    masks = output[..., None].expand(-1, -1, -1, count)
    if masks.numel():
        with torch.autocast(value.device.type, enabled=False):
            for index, samples in enumerate(sample_levels(value, shapes, locations)):
                if samples is not None:
                    at_level = (
                        w[:, :, :, index].transpose(1, 2).reshape(-1, 1, queries, count) for w in (spatial, level)
                    )
                    for_output, for_masks = at_level
                    output = output + (samples * for_output).sum(-1)
                    masks = masks + samples * for_masks
    output = output.reshape(batch, heads * depth, queries).transpose(1, 2)
    masks = masks.reshape(batch, heads * depth, queries, size, size).permute(0, 2, 3, 4, 1)
    return output.to(value.dtype), masks.to(value.dtype)


def _fake_box(
    value: Tensor,
    spatial_shapes: Tensor,
    boxes: Tensor,
    logits: Tensor,
    points: Tensor,
    valid_ratios: Tensor | None,
    angles: Tensor | None,
) -> Tensor:
    return value.new_empty(value.shape[0], boxes.shape[1], value.shape[2] * value.shape[3])


def _fake_box_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    boxes: Tensor,
    logits: Tensor,
    points: Tensor,
    valid_ratios: Tensor | None,
    angles: Tensor | None,
    value_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape if value_needed else 0),
        boxes.new_empty(boxes.shape),
        logits.new_empty(logits.shape),
        boxes.new_empty(0 if angles is None else angles.shape),
    )


def _setup_box(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_box(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    value, shapes, boxes, logits, points, valid_ratios, angles = saved
    value_needed, has_angles = ctx.needs_input_grad[0], angles is not None
    sorts = value_needed and _deterministic.needed(value)
    grad_value, grad_boxes, grad_logits, grad_angles = torch.ops.boltz_mm.box_attention_backward(
        grad_output, *saved, value_needed and not sorts
    )
    if sorts:
        locations = box_sampling_locations(boxes, points, valid_ratios=valid_ratios, angles=angles)
        at_points = grad_output.unflatten(-1, value.shape[2:]).unsqueeze(3)
        parts = [(box_attention_weights(logits), at_points)]
        grad_value = _deterministic.gradient_of_value(value, shapes, locations, parts)
    grad_value = grad_value if value_needed else None
    return grad_value, None, grad_boxes, grad_logits, None, None, grad_angles if has_angles else None


def _fake_instance(
    value: Tensor,
    spatial_shapes: Tensor,
    boxes: Tensor,
    logits: Tensor,
    points: Tensor,
    valid_ratios: Tensor | None,
    mask_output: bool,
) -> tuple[Tensor, Tensor]:
    batch, queries, channels = value.shape[0], boxes.shape[1], value.shape[2] * value.shape[3]
    size = math.isqrt(points.shape[0])
    masks = value.new_empty((batch, queries, size, size, channels) if mask_output else 0)
    return value.new_empty(batch, queries, channels), masks


def _fake_instance_backward(
    grad_output: Tensor,
    grad_mask_output: Tensor | None,
    value: Tensor,
    spatial_shapes: Tensor,
    boxes: Tensor,
    logits: Tensor,
    points: Tensor,
    valid_ratios: Tensor | None,
    value_needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_value = value.new_empty(value.shape if value_needed else 0)
    return grad_value, boxes.new_empty(boxes.shape), logits.new_empty(logits.shape)


def _setup_instance(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.mask_output = inputs[6]
    ctx.set_materialize_grads(False)


def _backward_instance(
    ctx: Any, grad_output: Tensor | None, grad_mask_output: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    value, shapes, boxes, logits, points, valid_ratios = saved
    value_needed = ctx.needs_input_grad[0]
    sorts = value_needed and _deterministic.needed(value)
    grad_mask_output = grad_mask_output if ctx.mask_output else None
    if grad_output is None:
        grad_output = value.new_zeros(value.shape[0], boxes.shape[1], value.shape[2] * value.shape[3])
    grad_value, grad_boxes, grad_logits = torch.ops.boltz_mm.instance_attention_backward(
        grad_output, grad_mask_output, *saved, value_needed and not sorts
    )
    if sorts:
        locations = box_sampling_locations(boxes, points, valid_ratios=valid_ratios)
        spatial, level = instance_attention_weights(logits, math.isqrt(points.shape[0]))
        parts = [(spatial.flatten(-2), grad_output.unflatten(-1, value.shape[2:]).unsqueeze(3))]
        if grad_mask_output is not None:
            at_points = grad_mask_output.unflatten(-1, value.shape[2:]).flatten(2, 3).transpose(2, 3)
            parts.append((level.flatten(-2), at_points))
        grad_value = _deterministic.gradient_of_value(value, shapes, locations, parts)
    return grad_value if value_needed else None, None, grad_boxes, grad_logits, None, None, None


def _samples(boxes: Any, points: Any) -> int:
    batch, queries, heads, levels, _ = boxes
    return batch * queries * heads * levels * points[0]


def _box_flops(value: Any, spatial_shapes: Any, boxes: Any, logits: Any, points: Any, *args: Any, **kwargs: Any) -> int:
    """Four multiply-adds for each sample and channel; boxes and softmax are not counted."""
    return 8 * _samples(boxes, points) * value[3]


def _box_backward_flops(grad_output: Any, *args: Any, **kwargs: Any) -> int:
    """Four products with the corners and four additions to them: twice the forward pass."""
    return 2 * _box_flops(*args[:5])


def _instance_flops(
    value: Any,
    spatial_shapes: Any,
    boxes: Any,
    logits: Any,
    points: Any,
    valid_ratios: Any,
    mask_output: bool,
    **kwargs: Any,
) -> int:
    """As box attention, and with the mask output two more multiply-adds for the two sums."""
    return (12 if mask_output else 8) * _samples(boxes, points) * value[3]


def _instance_backward_flops(
    grad_output: Any,
    grad_mask_output: Any,
    value: Any,
    spatial_shapes: Any,
    boxes: Any,
    logits: Any,
    points: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    """As box attention; with the mask output products with two gradients, and their weighted sum."""
    return (16 if grad_mask_output is None else 28) * _samples(boxes, points) * value[3]


if has_native_operators():
    _registration.register(
        'box_attention', fake=_fake_box, setup_context=_setup_box, backward=_backward_box, flops=_box_flops
    )
    _registration.register_backward('box_attention_backward', fake=_fake_box_backward, flops=_box_backward_flops)
    _registration.register(
        'instance_attention',
        fake=_fake_instance,
        setup_context=_setup_instance,
        backward=_backward_instance,
        flops=_instance_flops,
    )
    _registration.register_backward(
        'instance_attention_backward', fake=_fake_instance_backward, flops=_instance_backward_flops
    )
    for _name in ('box_attention', 'box_attention_backward', 'instance_attention', 'instance_attention_backward'):
        _registration.register_vmap(_name, constant=('spatial_shapes', 'points'))
