"""Attention between points as a chain of gathers, as the official tests of AutoFocusFormer write it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(
    value: Tensor,
    positions: Tensor,
    sizes: Sequence[int],
    tables: Tensor,
    canvas: tuple[int, int],
    query_pos: Tensor,
    offsets: Tensor,
    logits: Tensor,
    power: Tensor,
) -> Tensor:
    """The formula of :func:`boltz_mm.ops.point_deform_attention`, for one image and the same arguments."""
    batch, queries, heads, levels, points, _ = offsets.shape
    if batch != 1:
        raise ValueError(f'this form takes one image, got {batch}')
    at = query_pos[:, :, None, None, None] + offsets
    limits = torch.tensor([canvas[1] - 1, canvas[0] - 1], device=at.device)
    cell = at.detach().round().long().clamp(min=torch.zeros_like(limits), max=limits)
    cell = cell[..., 1] * canvas[1] + cell[..., 0]
    starts = [sum(sizes[:level]) for level in range(levels)]
    token = torch.stack([tables[0, i].long()[cell[:, :, :, i]] + starts[i] for i in range(levels)], 3)
    squared = (at.unsqueeze(-2) - positions[0][token]).square().sum(-1)
    nearness = 1 / (squared.pow(power) + 1e-11)
    share = nearness / nearness.sum(-1, keepdim=True)
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    rows = value[0][token, torch.arange(heads, device=at.device)[:, None, None, None]]
    mixed = (share.to(rows.dtype)[..., None] * rows).sum(-2)
    return (weights.to(rows.dtype)[..., None] * mixed).sum((3, 4)).flatten(2)


def interpolate(feat: Tensor, pos: Tensor, query_pos: Tensor, index: Tensor, power: float) -> Tensor:
    """The formula of :func:`boltz_mm.ops.inverse_distance_interpolate`, for one image."""
    squared = (query_pos[0, :, None] - pos[0][index[0]]).square().sum(-1)
    nearness = 1 / (squared.pow(power) + 1e-11)
    share = nearness / nearness.sum(-1, keepdim=True)
    return (share.to(feat.dtype)[..., None] * feat[0][index[0]]).sum(1)[None]
