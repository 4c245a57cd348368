"""The gradient of ``value`` added up in a fixed order, for ``torch.use_deterministic_algorithms`` on CUDA.

The CUDA kernels add it up atomically, so that its last digits may differ from run to run; everything else that they
compute is always the same.  Where deterministic algorithms are asked for, this takes the place of that part: the four
corners of every sample go through ``index_add_``, which then sorts.  It is slower, and needs memory for the samples of
one level and some queries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_ELEMENTS = 1 << 26  # of the samples that are in memory at a time


def needed(value: Tensor) -> bool:
    """Whether the kernels for the device of ``value`` do not give what was asked for."""
    return value.device.type == 'cuda' and torch.are_deterministic_algorithms_enabled()


def gradient_of_value(
    value: Tensor, spatial_shapes: Tensor, locations: Tensor, parts: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """The gradient of ``value [B, S, H, D]``, in its dtype.

    Args:
        value: ``[B, S, H, D]``; its numbers do not matter.
        spatial_shapes: ``[L, 2]`` int64.
        locations: ``[B, Q, H, L, P, 2]`` in the compute dtype.
        parts: Weights ``[B, Q, H, L, P]`` of the samples in an output, and the gradient of that output for each point
            ``[B, Q, H, P or 1, D]``.
    """
    batch, cells, heads, depth = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    sums = locations.new_zeros(batch * cells * heads, depth)
    step = max(1, _ELEMENTS // max(1, batch * heads * points * depth))
    first_cells = spatial_shapes.prod(1).cumsum(0) - spatial_shapes.prod(1)
    for level in range(spatial_shapes.shape[0]):
        for first in range(0, queries, step):
            chosen = slice(first, first + step)
            gradient = torch.stack(
                [weights[:, chosen, :, level, :, None] * grads[:, chosen].to(sums.dtype) for weights, grads in parts]
            )
            place = cells, first_cells[level], spatial_shapes[level]
            _add_samples(sums, place, locations[:, chosen, :, level], gradient.sum(0))
    return sums.view(batch, cells, heads, depth).to(value.dtype)


def _add_samples(sums: Tensor, place: tuple[int, Tensor, Tensor], locations: Tensor, gradient: Tensor) -> None:
    """Add the gradient of some samples of one level to the cells around them.

    The sizes of the level stay on the device, to be neither waited for nor traced.

    Args:
        sums: ``[B * S * H, D]``, changed in place.
        place: S, and the first cell and the (height, width) of the level.
        locations: ``[B, q, H, P, 2]``.
        gradient: ``[B, q, H, P, D]``.
    """
    cells, first_cell, shape = place
    height, width = shape.unbind()
    batch, _, heads = locations.shape[:3]
    size = shape.flip(0).to(locations.dtype)
    at = locations * size - 0.5
    inside = ((at > -1) & (at < size)).all(-1, keepdim=True)
    at = torch.where(inside, at, 0)
    corner = at.floor()
    fraction, corner = at - corner, corner.long()
    head = torch.arange(heads, device=sums.device)[:, None]
    image = torch.arange(batch, device=sums.device)[:, None, None, None]
    for row_step, column_step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        column, row = corner[..., 0] + column_step, corner[..., 1] + row_step
        cell = first_cell + row * width + column
        exists = inside[..., 0] & (column >= 0) & (column < width) & (row >= 0) & (row < height) & (cell < cells)
        share_x = fraction[..., 0] if column_step else 1 - fraction[..., 0]
        share_y = fraction[..., 1] if row_step else 1 - fraction[..., 1]
        added = torch.where(exists[..., None], (share_x * share_y)[..., None] * gradient, 0)
        index = torch.where(exists, (image * cells + cell) * heads + head, 0)
        sums.index_add_(0, index.flatten(), added.flatten(0, -2))
