"""Inputs of the operators for tests, and two independent references: plain loops, and gathers in any dtype."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boltz_mm.ops import (
    box_attention,
    box_attention_weights,
    box_sampling_locations,
    deform_attention,
    grid_points,
    instance_attention,
    instance_attention_weights,
)

NAMES = ('box', 'box_rotated', 'instance', 'instance_output', 'deform')
SHAPES = ((5, 7), (3, 4), (1, 2))
Outputs = tuple[Tensor, ...]


@dataclass
class OpCase:
    """An operator with inputs.

    Attributes:
        name: One of ``NAMES``.
        shapes: Level sizes.
        leaves: Differentiable inputs by name, ``value`` first.
        points: Grid of the boxes.
        ratios: Valid ratios or ``None``.
    """

    name: str
    shapes: Sequence[tuple[int, int]]
    leaves: dict[str, Tensor]
    points: Tensor
    ratios: Tensor | None

    def function(self) -> Callable[..., Outputs]:
        """The public operator as a function of the leaves alone."""
        shapes, points, ratios = torch.tensor(self.shapes, dtype=torch.int64).reshape(-1, 2), self.points, self.ratios
        if self.name == 'deform':
            return lambda *leaves: (deform_attention(leaves[0], shapes, *leaves[1:]),)
        if self.name in ('box', 'box_rotated'):
            return lambda value, boxes, logits, angles=None: (
                box_attention(value, shapes, boxes, logits, points, valid_ratios=ratios, angles=angles),
            )
        with_mask = self.name == 'instance'

        def run(value: Tensor, boxes: Tensor, logits: Tensor) -> Outputs:
            result = instance_attention(
                value, shapes, boxes, logits, points, valid_ratios=ratios, mask_output=with_mask
            )
            return result if with_mask else (result,)

        return run

    def run(self, *, gradients: bool = True) -> tuple[Outputs, list[Tensor]]:
        """Outputs, and gradients of a fixed random projection of them for every leaf."""
        leaves = [leaf.detach().requires_grad_(gradients) for leaf in self.leaves.values()]
        outputs = self.function()(*leaves)
        if not gradients:
            return outputs, []
        return outputs, list(torch.autograd.grad(outputs, leaves, self.cotangents(outputs)))

    @staticmethod
    def cotangents(outputs: Outputs) -> Outputs:
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs)


def make_case(
    name: str,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    queries: int = 3,
    heads: int = 2,
    depth: int = 5,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    size: int = 2,
    ratios: bool = True,
    seed: int = 0,
) -> OpCase:
    """Random inputs: points inside, at the border and outside; box sizes on both sides of 0."""
    generator = torch.Generator().manual_seed(seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    levels, cells = len(shapes), sum(height * width for height, width in shapes)
    prefix = (batch, queries, heads, levels)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(compute)

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, dtype=torch.float64).to(compute)

    leaves = {'value': normal(batch, cells, heads, depth).to(dtype)}
    if name == 'deform':
        leaves['locations'] = uniform(*prefix, size * size, 2) * 1.6 - 0.3
        leaves['weights'] = normal(*prefix, size * size)
    else:
        leaves['boxes'] = torch.cat([uniform(*prefix, 2) * 1.2 - 0.1, uniform(*prefix, 2) * 0.9 - 0.1], -1)
        leaves['logits'] = normal(*prefix, size * size) if 'box' in name else normal(*prefix, 2, 2)
    if name == 'box_rotated':
        leaves['angles'] = normal(*prefix) * 2
    valid = 0.5 + 0.5 * uniform(batch, levels, 2) if ratios else None
    return OpCase(name, shapes, leaves, grid_points(size, dtype=compute), valid)


def sampling_of(case: OpCase, leaves: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Locations, weights of the output, and weights of the mask output over the levels, for all points."""
    if case.name == 'deform':
        return leaves[1], leaves[2], None
    angles = leaves[3] if case.name == 'box_rotated' else None
    locations = box_sampling_locations(leaves[1], case.points, valid_ratios=case.ratios, angles=angles)
    if 'box' in case.name:
        return locations, box_attention_weights(leaves[2]), None
    spatial, level = instance_attention_weights(leaves[2], math.isqrt(case.points.shape[0]))
    return locations, spatial.flatten(-2), level.flatten(-2) if case.name == 'instance' else None


def loop_reference(case: OpCase) -> Outputs:
    """The formula in plain Python numbers, one point and channel after the other."""
    value = case.leaves['value'].double().tolist()
    locations, weights, level_weights = (
        None if t is None else t.double().tolist() for t in sampling_of(case, list(case.leaves.values()))
    )
    batch, _, heads, depth = case.leaves['value'].shape
    queries, count = case.leaves[list(case.leaves)[1]].shape[1], len(locations[0][0][0][0])
    output = torch.zeros(batch, queries, heads, depth, dtype=torch.float64)
    masks = torch.zeros(batch, queries, count, heads, depth, dtype=torch.float64)
    starts = [0]
    for height, width in case.shapes:
        starts.append(starts[-1] + height * width)
    for b, q, h, d in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads, depth))).tolist():
        for level, (height, width) in enumerate(case.shapes):
            for p, (x, y) in enumerate(locations[b][q][h][level]):
                x, y = x * width - 0.5, y * height - 0.5
                if not (-1 < x < width and -1 < y < height):
                    continue
                sample = 0.0
                for row in (math.floor(y), math.floor(y) + 1):
                    for column in (math.floor(x), math.floor(x) + 1):
                        if 0 <= row < height and 0 <= column < width:
                            share = (1 - abs(y - row)) * (1 - abs(x - column))
                            sample += share * value[b][starts[level] + row * width + column][h][d]
                output[b, q, h, d] += weights[b][q][h][level][p] * sample
                if level_weights is not None:
                    masks[b, q, p, h, d] += level_weights[b][q][h][level][p] * sample
    size = math.isqrt(count)
    first = output.flatten(2)
    return (first,) if level_weights is None else (first, masks.view(batch, queries, size, size, -1))


def gather_reference(case: OpCase, leaves: list[Tensor], dtype: torch.dtype) -> Outputs:
    """The formula with gathers: coordinates in the compute dtype, interpolation and sums in ``dtype``."""
    locations, weights, level_weights = sampling_of(case, leaves)
    value = leaves[0].to(dtype)
    batch, queries, heads, _, count, _ = locations.shape
    output, masks, start = 0, 0, 0
    for level, (height, width) in enumerate(case.shapes):
        if height * width == 0:
            continue
        part = value[:, start : start + height * width].permute(0, 2, 1, 3).flatten(0, 1)  # [B * H, cells, D]
        start += height * width
        at = locations[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B * H, Q, P, 2]
        x, y = at[..., 0] * width - 0.5, at[..., 1] * height - 0.5
        samples = 0
        for row in (y.floor(), y.floor() + 1):
            for column in (x.floor(), x.floor() + 1):
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                index = torch.where(inside, row * width + column, 0).long().flatten(1)
                share = torch.where(inside, (1 - (y - row).abs()) * (1 - (x - column).abs()), 0).to(dtype)
                corner = part.gather(1, index[..., None].expand(-1, -1, part.shape[-1]))
                samples = samples + share[..., None] * corner.view(*share.shape, -1)
        scale = [
            None if w is None else w[:, :, :, level].transpose(1, 2).flatten(0, 1).to(dtype)[..., None]
            for w in (weights, level_weights)
        ]
        output = output + (samples * scale[0]).sum(2)
        masks = masks if scale[1] is None else masks + samples * scale[1]
    output = output.view(batch, heads, queries, -1).transpose(1, 2).flatten(2)
    if level_weights is None:
        return (output,)
    size = math.isqrt(count)
    masks = masks.view(batch, heads, queries, size, size, -1).permute(0, 2, 3, 4, 1, 5).flatten(4)
    return output, masks
