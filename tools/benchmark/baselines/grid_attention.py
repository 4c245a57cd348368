"""Deformable, box and instance attention as one would write them in PyTorch: what the operators are timed against.

The strongest plain form that we found: one ``grid_sample`` per level, weighted and added up level by level, so that
the samples of one level alone are in memory.  (mmcv's ``multi_scale_deformable_attn_pytorch`` stacks all levels first.)
Locations and weights are built in full, as the official code does.  ``tests/benchmark`` holds these functions by the
golden cases that hold the operators.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Sizes = Sequence[tuple[int, int]]


def _levels(value: Tensor, sizes: Sizes, locations: Tensor) -> list[Tensor]:
    """Samples ``[B * H, D, Q, P]`` of each level, in the dtype of the locations."""
    grid = locations * 2 - 1
    samples = []
    parts = value.to(locations.dtype).split([height * width for height, width in sizes], dim=1)
    for level, ((height, width), part) in enumerate(zip(sizes, parts, strict=True)):
        planes = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (height, width))
        at = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(planes, at, mode='bilinear', padding_mode='zeros', align_corners=False))
    return samples


def _of_level(weights: Tensor, level: int) -> Tensor:
    """``[B, Q, H, L, P]`` to ``[B * H, 1, Q, P]``."""
    return weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)


def _channels_last(output: Tensor, batch: int) -> Tensor:
    """``[B * H, D, Q, ...]`` to ``[B, Q, ..., H * D]``."""
    return output.unflatten(0, (batch, -1)).flatten(1, 2).movedim(1, -1)


def deform_attention(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """See :func:`boltz_mm.ops.deform_attention`."""
    samples = _levels(value, sizes, locations)
    output = sum((sample * _of_level(weights, level)).sum(-1) for level, sample in enumerate(samples))
    return _channels_last(output, value.shape[0]).to(value.dtype)


def _box_locations(boxes: Tensor, points: Tensor, valid_ratios: Tensor | None) -> Tensor:
    locations = boxes[..., None, :2] + points * boxes[..., None, 2:].relu()
    return locations if valid_ratios is None else locations * valid_ratios[:, None, None, :, None]


def box_attention(
    value: Tensor, sizes: Sizes, boxes: Tensor, logits: Tensor, points: Tensor, valid_ratios: Tensor | None = None
) -> Tensor:
    """See :func:`boltz_mm.ops.box_attention`."""
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    return deform_attention(value, sizes, _box_locations(boxes, points, valid_ratios), weights)


def instance_attention_at(
    value: Tensor, sizes: Sizes, locations: Tensor, spatial: Tensor, level_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Instance attention at given points, with both weights ``[B, Q, H, L, P]``; masks are ``[B, Q, P, H * D]``."""
    output, masks = 0, 0
    for level, sample in enumerate(_levels(value, sizes, locations)):
        output = output + (sample * _of_level(spatial, level)).sum(-1)
        masks = masks + sample * _of_level(level_weights, level)
    batch = value.shape[0]
    return _channels_last(output, batch).to(value.dtype), _channels_last(masks, batch).to(value.dtype)


def instance_attention(
    value: Tensor, sizes: Sizes, boxes: Tensor, logits: Tensor, points: Tensor, valid_ratios: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`boltz_mm.ops.instance_attention`."""
    size = math.isqrt(points.shape[0])
    repeated = logits.repeat_interleave(size // 2, -1).repeat_interleave(size // 2, -2).flatten(-2)
    spatial, level = repeated.flatten(3).softmax(-1).view(repeated.shape), repeated.softmax(3)
    locations = _box_locations(boxes, points, valid_ratios)
    output, masks = instance_attention_at(value, sizes, locations, spatial, level)
    return output, masks.unflatten(2, (size, size))


def mmcv_deform_attention(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """What mmcv runs on a CPU."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, torch.tensor(sizes), locations, weights)
