"""Inputs of the operators that sample between points, and two independent references: plain loops, and gathers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boltz_mm.ops import inverse_distance_interpolate, point_deform_attention

EPSILON = 1e-11


@dataclass
class PointCase:
    """Attention between points: constants, and the differentiable ``value, offsets, logits, power``."""

    canvas: tuple[int, int]
    sizes: Sequence[int]
    positions: Tensor
    tables: Tensor
    query_pos: Tensor
    leaves: dict[str, Tensor]

    def function(self, value: Tensor, offsets: Tensor, logits: Tensor, power: Tensor | float) -> Tensor:
        constants = self.positions, self.sizes, self.tables, self.canvas, self.query_pos
        return point_deform_attention(value, *constants, offsets, logits, power)

    def run(self) -> list[Tensor]:
        """The output, and gradients of a fixed random projection of it for every leaf."""
        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves.values()]
        output = self.function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, cotangent(output))]

    def gathered(self, dtype: torch.dtype) -> list[Tensor]:
        """The same with gathers and PyTorch's derivatives, in another dtype."""
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves.values()]
        output = gather_attention(self, *leaves)
        value = self.leaves['value']
        return [output, *torch.autograd.grad(output, leaves, cotangent(output).to(value.dtype).to(dtype))]

    def with_leaves(self, **leaves: Tensor) -> 'PointCase':
        return replace(self, leaves=self.leaves | leaves)


def cotangent(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


def cells(canvas: tuple[int, int]) -> Tensor:
    """All places (x, y) of a canvas, row by row: ``[h * w, 2]`` float64."""
    y, x = torch.meshgrid(torch.arange(canvas[0]), torch.arange(canvas[1]), indexing='ij')
    return torch.stack([x, y], -1).reshape(-1, 2).double()


def nearest(query: Tensor, points: Tensor, count: int) -> Tensor:
    """Indices of the nearest points, ties to the first."""
    return (query[:, None] - points).square().sum(-1).sort(dim=-1, stable=True).indices[:, :count]


def make_case(
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    queries: int = 5,
    heads: int = 2,
    depth: int = 5,
    canvas: tuple[int, int] = (6, 9),
    sizes: Sequence[int] = (7, 12),
    points: int = 3,
    neighbours: int = 4,
    power: float = 3.0,
    seed: int = 0,
) -> PointCase:
    """Tokens at distinct places; samples on tokens, between them and outside, none near the border of two cells."""
    generator = torch.Generator().manual_seed(seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    grid = cells(canvas)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    images = [
        [grid[torch.randperm(len(grid), generator=generator)[:size]] for size in sizes] for _ in range(max(1, batch))
    ]
    positions = torch.stack([torch.cat([grid[:0], *levels]) for levels in images])[:batch]
    tables = torch.stack(
        [
            torch.stack([nearest(grid, level, neighbours) for level in levels])
            if sizes
            else torch.zeros(0, len(grid), neighbours, dtype=torch.int64)
            for levels in images
        ]
    )[:batch]
    query_pos = grid[torch.randint(len(grid), (batch, queries), generator=generator)]
    prefix = (batch, queries, heads, len(sizes), points)
    offsets = normal(*prefix, 2) * 3
    offsets = offsets.round() + (offsets - offsets.round()) * 0.8
    offsets[..., :1, :] = offsets[..., :1, :].round()  # on the grid, some at a token
    leaves = {
        'value': normal(batch, sum(sizes), heads, depth).to(dtype),
        'offsets': offsets.to(compute),
        'logits': normal(*prefix).to(compute),
        'power': torch.tensor([power], dtype=compute),
    }
    return PointCase(canvas, tuple(sizes), positions.to(compute), tables, query_pos.to(compute), leaves)


def gather_attention(case: PointCase, value: Tensor, offsets: Tensor, logits: Tensor, power: Tensor) -> Tensor:
    """The formula with every intermediate, in the dtype of ``value``."""
    batch, queries, heads, levels, points, _ = offsets.shape
    at = case.query_pos.to(value)[:, :, None, None, None] + offsets
    corner = torch.tensor([case.canvas[1] - 1, case.canvas[0] - 1])
    cell = at.detach().round().clamp(min=torch.zeros(2).to(at), max=corner.to(at)).long()
    cell = cell[..., 1] * case.canvas[1] + cell[..., 0]
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    output = value.new_zeros(batch, queries, heads, value.shape[3])
    start = 0
    for level, size in enumerate(case.sizes):
        for image in range(batch):
            token = case.tables[image, level].long()[cell[image, :, :, level]] + start
            place = case.positions[image].to(value)[token]
            squared = (at[image, :, :, level, :, None] - place).square().sum(-1)
            nearness = 1 / (squared.pow(power) + EPSILON)
            share = nearness / nearness.sum(-1, keepdim=True)
            rows = value[image].transpose(0, 1)[torch.arange(heads)[:, None, None], token]
            mixed = (share * weights[image, :, :, level, :, None])[..., None] * rows
            output[image] = output[image] + mixed.sum((2, 3))
        start += size
    return output.flatten(2)


def loop_attention(case: PointCase) -> Tensor:
    """The formula in plain Python numbers, one number after the other."""
    value, offsets, logits, power = (leaf.double().tolist() for leaf in case.leaves.values())
    batch, queries, heads, levels, points = case.leaves['logits'].shape
    height, width = case.canvas
    output = torch.zeros(batch, queries, heads, case.leaves['value'].shape[3], dtype=torch.float64)
    for b in range(batch):
        for n in range(queries):
            for h in range(heads):
                numbers = [[math.exp(x) for x in row] for row in logits[b][n][h]]
                total = sum(map(sum, numbers))
                start = 0
                for level in range(levels):
                    for p in range(points):
                        x, y = (case.query_pos[b, n, i].item() + offsets[b][n][h][level][p][i] for i in (0, 1))
                        column, row = min(max(round(x), 0), width - 1), min(max(round(y), 0), height - 1)
                        tokens = case.tables[b, level, row * width + column].tolist()
                        places = [case.positions[b, start + token].tolist() for token in tokens]
                        near = [1 / (((x - u) ** 2 + (y - v) ** 2) ** power[0] + EPSILON) for u, v in places]
                        for token, share in zip(tokens, near, strict=True):
                            scale = numbers[level][p] / total * share / sum(near)
                            output[b, n, h] += scale * torch.tensor(value[b][start + token][h], dtype=torch.float64)
                    start += case.sizes[level]
    return output.flatten(2)


def interpolation(
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    queries: int = 11,
    tokens: int = 9,
    channels: int = 5,
    neighbours: int = 4,
    power: float = 3.0,
) -> dict[str, Tensor]:
    """Arguments of :func:`inverse_distance_interpolate`; the first queries lie on tokens."""
    generator = torch.Generator().manual_seed(3)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    pos = torch.stack([cells((6, 8))[torch.randperm(48, generator=generator)[:tokens]] for _ in range(batch)])
    query = torch.rand(batch, queries, 2, generator=generator, dtype=torch.float64) * 7
    query[:, :3] = pos[:, :3]
    index = torch.stack([nearest(q, p, neighbours) for q, p in zip(query, pos, strict=True)])
    feat = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64).to(dtype)
    number = torch.tensor([power], dtype=compute)
    return dict(feat=feat, pos=pos.to(compute), query_pos=query.to(compute), index=index, power=number)


def run_interpolation(arguments: dict[str, Tensor], wanted: Sequence[str] = ('feat', 'power')) -> list[Tensor]:
    """The output, and gradients of a fixed random projection of it."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
    output = inverse_distance_interpolate(**(arguments | leaves))
    return [output, *torch.autograd.grad(output, list(leaves.values()), cotangent(output))]


def gather_interpolation(arguments: dict[str, Tensor], dtype: torch.dtype, wanted: Sequence[str] = ('feat', 'power')):
    """The same with gathers and PyTorch's derivatives, in another dtype."""
    moved = {name: x.detach().to(dtype) if x.is_floating_point() else x for name, x in arguments.items()}
    leaves = {name: moved[name].requires_grad_() for name in wanted}
    feat, pos, query, index, power = (moved | leaves).values()
    image = torch.arange(len(feat))[:, None, None]
    squared = (query[:, :, None] - pos[image, index]).square().sum(-1)
    nearness = 1 / (squared.pow(power) + EPSILON)
    output = ((nearness / nearness.sum(-1, keepdim=True))[..., None] * feat[image, index]).sum(2)
    gradient = cotangent(output).to(arguments['feat'].dtype).to(dtype)
    return [output, *torch.autograd.grad(output, list(leaves.values()), gradient)]
