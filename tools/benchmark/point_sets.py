"""Point sets to time operators on: all cells of a canvas, and tokens as AutoFocusFormer keeps them."""

import torch
from torch import Tensor


def grid(height: int, width: int) -> Tensor:
    """All cells, row by row: ``[1, h * w, 2]``, (x, y)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    return torch.stack([x, y], -1).view(1, -1, 2).float()


def adaptive(height: int, width: int, share: float) -> Tensor:
    """A share of the cells: those of a coarse grid, and the others around three spots, ascending."""
    cells = grid(height, width)[0]
    spots = torch.rand(3, 2) * torch.tensor([width, height])
    score = torch.rand(len(cells)) / 4 - torch.cdist(cells, spots).amin(1) / max(height, width)
    score += 9 * (cells % 8 == 0).all(-1)
    return cells[score.topk(int(len(cells) * share)).indices.sort().values][None]
