"""Tokens to feature maps."""

import pytest
import torch
from torch import Tensor

from boltz_mm.models.necks.points_to_grid import PointsToGrid, cell_centres
from boltz_mm.structures import PointFeature

SHAPE = (7, 10)


def tokens(count: int, channels: int = 3, batch: int = 2, shape: tuple[int, int] = SHAPE) -> PointFeature:
    """Random places, no two alike in an image."""
    torch.manual_seed(count)
    cells = torch.stack([torch.randperm(shape[0] * shape[1])[:count] for _ in range(batch)])
    pos = torch.stack((cells % shape[1], cells // shape[1]), dim=-1).float()
    return PointFeature(torch.randn(batch, count, channels), pos, shape)


def interpolated(points: PointFeature, centre: Tensor, image: int, power: float) -> Tensor:
    """One cell by definition, in float64; ``centre`` is (x, y)."""
    squared = (points.pos[image].double() - centre.double()).square().sum(-1)
    nearest = squared.argsort(stable=True)[:4]
    weights = 1 / (squared[nearest] ** power + 1e-11)
    return (weights[:, None] * points.feat[image, nearest].double()).sum(0) / weights.sum()


@pytest.mark.parametrize(('level', 'count', 'power'), [(1, 17, 3.0), (2, 4, 0.5), (3, 3, 2.0), (2, 1, 3.0)])
def test_a_cell_is_the_weighted_mean_of_its_nearest_tokens(level: int, count: int, power: float) -> None:
    points = tokens(count)
    (image,) = PointsToGrid([level], power)([points])
    step = 2**level
    assert image.shape == (2, 3, -(-7 // step), -(-10 // step))
    for b, y, x in ((0, 0, 0), (1, 0, 1), (1, image.shape[2] - 1, image.shape[3] - 1)):
        centre = torch.tensor([x * step + (step - 1) / 2, y * step + (step - 1) / 2])
        wanted = interpolated(points, centre, b, power).float()
        torch.testing.assert_close(image[b, :, y, x], wanted, rtol=1e-5, atol=1e-6)


def test_level_0_puts_every_token_in_its_place() -> None:
    points = tokens(70)
    (image,) = PointsToGrid()([points])
    x, y = points.pos[1].long().unbind(-1)
    assert torch.equal(image[1, :, y, x].T, points.feat[1])
    with pytest.raises(ValueError, match='a token for each of 7 x 10 cells, got 69'):
        PointsToGrid()([tokens(69)])


def test_cell_centres_are_those_of_the_pixels() -> None:
    centres = cell_centres((3, 5), 2)
    assert centres.tolist() == [[[x, y] for y in (0.5, 2.5) for x in (0.5, 2.5, 4.5)]]
    # Pixel i of a map of stride 4 has its centre at 4 i + 1.5; one of stride 8 at 8 i + 3.5.
    assert (4 * centres[0, 1, 0] + 1.5).item() == 8 * 1 + 3.5


def test_gradients_reach_the_tokens_and_settings_are_checked() -> None:
    points = tokens(9)._replace(feat=tokens(9).feat.requires_grad_())
    neck = PointsToGrid([1])
    neck([points])[0].sum().backward()
    # Each cell hands out a weight of 1.
    torch.testing.assert_close(points.feat.grad.sum(1), torch.full((2, 3), 20.0))
    assert len(neck.size_cache) == 1
    assert not neck.state_dict()
    with pytest.raises(ValueError, match='expected 1 levels of tokens, got 2'):
        neck([points, points])
    with pytest.raises(ValueError, match='power must be positive, got 0'):
        PointsToGrid(power=0)
    with pytest.raises(ValueError, match='levels must not be negative'):
        PointsToGrid([0, -1])
