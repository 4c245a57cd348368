"""Neighbour tables against a search over everything."""

import pytest
import torch
from torch import Tensor

from boltz_mm.models.layers.point_tables import (
    cell_index,
    grid_neighbors,
    grid_positions,
    nearest_tables,
    token_of_cell,
)

CANVASES = [
    (1, 1),
    (1, 12),
    (2, 3),
    (3, 3),
    (2, 9),
    (5, 7),
    (9, 16),
    (4, 30),
    (1, 40),
    (2, 25),
    (3, 33),
    (12, 13),
    (14, 31),
]


def search(query: Tensor, points: Tensor, k: int) -> Tensor:
    """All distances, stable order."""
    return (query[:, None] - points[None]).square().sum(-1).sqrt().sort(dim=1, stable=True).indices[:, :k]


def shuffled_grid(canvas: tuple[int, int], batch: int = 2) -> Tensor:
    grid = grid_positions(canvas)
    return torch.stack([grid[torch.randperm(len(grid))] for _ in range(batch)])


def test_tokens_and_cells_are_inverse() -> None:
    torch.manual_seed(0)
    pos = shuffled_grid((5, 7))
    tokens = token_of_cell(pos, (5, 7))
    cells = cell_index(pos, (5, 7))
    assert torch.equal(tokens.gather(1, cells), torch.arange(35).expand(2, -1))
    assert torch.equal(pos[1, tokens[1]], grid_positions((5, 7)))


def test_a_grid_with_holes_is_refused() -> None:
    with pytest.raises(ValueError, match='a full grid of 5 x 7 cells has 35 tokens, got 34'):
        token_of_cell(grid_positions((5, 7))[None, 1:], (5, 7))


@pytest.mark.parametrize('canvas', CANVASES)
@pytest.mark.parametrize('k', [4, 9])
def test_neighbors_of_a_grid_are_those_of_a_search_among_its_tokens(canvas: tuple[int, int], k: int) -> None:
    torch.manual_seed(1)
    pos = shuffled_grid(canvas)
    tokens = token_of_cell(pos, canvas)
    k_found = min(k, pos.shape[1])
    ordered = grid_neighbors(tokens, canvas, k, ordered=True)
    usual = grid_neighbors(tokens, canvas, k)
    for image in range(len(pos)):
        # Our rows are cells and name cells, those of the search are tokens and name tokens.
        expected = search(pos[image], pos[image], k_found)[tokens[image]]
        assert torch.equal(tokens[image][ordered[image]], expected)
        assert torch.equal(usual[image].sort(dim=1).values, ordered[image].sort(dim=1).values)


@pytest.mark.parametrize('k', [0, 10])
def test_bad_count(k: int) -> None:
    with pytest.raises(ValueError, match=r'k must be within 1\.\.9'):
        grid_neighbors(torch.arange(20)[None], (4, 5), k)


def test_tables_of_levels() -> None:
    torch.manual_seed(2)
    canvas, positions = (6, 9), [shuffled_grid((6, 9))[:, :n] for n in (5, 20)]
    tables = nearest_tables(positions, canvas)
    assert tables.shape == (2, 2, 54, 4)
    assert tables.dtype == torch.int32
    for level, pos in enumerate(positions):
        for image in range(2):
            expected = search(grid_positions(canvas), pos[image], 4)
            assert torch.equal(tables[image, level].long(), expected)


@pytest.mark.parametrize(('count', 'expected'), [(1, [0, 0, 0, 0]), (2, [1, 0, 1, 0]), (3, [1, 2, 0, 1])])
def test_few_tokens_repeat_from_the_nearest(count: int, expected: list[int]) -> None:
    pos = torch.tensor([[[5.0, 0.0], [1.0, 0.0], [2.0, 0.0]]])[:, :count]
    assert nearest_tables([pos], (1, 6))[0, 0, 0].tolist() == expected


def test_a_level_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match='level 1 has no tokens'):
        nearest_tables([torch.zeros(1, 2, 2), torch.zeros(1, 0, 2)], (3, 3))
