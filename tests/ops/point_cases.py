"""Points on a canvas: full grids, and sets that are dense in some places and sparse in others."""

import torch
from torch import Tensor


def grid(height: int, width: int) -> Tensor:
    """All cells, row by row: ``[1, h * w, 2]``."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    return torch.stack([x, y], -1).view(1, -1, 2).float()


def adaptive(height: int, width: int, share: float, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Cells around some spots and those of a coarse grid, ascending: ``[B, int(h * w * share), 2]``."""
    generator = torch.Generator().manual_seed(seed)
    cells, size = grid(height, width)[0], torch.tensor([width, height])
    chosen = []
    for _ in range(batch):
        spots = torch.rand(3, 2, generator=generator) * size
        nearness = -(cells[:, None] - spots).norm(dim=-1).amin(1) / max(height, width)
        noise = torch.rand(len(cells), generator=generator) / 4
        score = nearness + noise + 9 * (cells % 8 == 0).all(-1)
        chosen.append(score.topk(int(height * width * share)).indices.sort().values)
    return cells[torch.stack(chosen)]


def shuffled(points: Tensor, seed: int = 0) -> Tensor:
    """The points of each image in another order."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(points.shape[1], generator=generator) for _ in points])
    return points.gather(1, orders[..., None].expand(-1, -1, 2))
