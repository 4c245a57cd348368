"""Choice of tokens and merging of neighbourhoods."""

import pytest
import torch
from torch import Tensor

from boltz_mm.models.layers.cluster_attention import Neighborhood
from boltz_mm.models.layers.cluster_merging import (
    ClusterMerging,
    count_reserved,
    grid_prior,
    is_multiple,
    select_tokens,
)


def places(*xy: tuple[int, int]) -> Tensor:
    return torch.tensor([xy], dtype=torch.float32)


@pytest.mark.parametrize(
    ('offset', 'step'),
    [((1, 0), 2), ((1, 1), 4), ((2, 0), 4), ((1, 2), 8), ((2, 2), 8), ((4, 0), 8), ((3, 4), 16), ((0, 8), 16)],
)
def test_prior_steps_with_the_distance_to_the_nearest_token(offset: tuple[int, int], step: int) -> None:
    for place in ((16, 32), (16 + step // 2, 32), (16, 32 + step // 2), (16 + step, 32 - step)):
        pos = places(place, (place[0] + offset[0], place[1] + offset[1]))
        expected = place[0] % step == 0 and place[1] % step == 0
        assert grid_prior(pos, 4, (64, 64))[0, 0] == expected


def test_prior_of_the_full_grid_and_of_one_token() -> None:
    assert grid_prior(places((0, 0), (1, 0), (2, 3), (4, 2)), 2, (4, 5)).tolist() == [[1, 0, 0, 1]]
    assert grid_prior(places((3, 3)), 8, (4, 4)).tolist() == [[1]]


def test_reserved_tokens_are_counted() -> None:
    for shape in ((1, 1), (7, 10), (16, 33)):
        y, x = torch.meshgrid(*(torch.arange(size) for size in shape), indexing='ij')
        grid = torch.stack((x, y), -1).view(1, -1, 2).float()
        for stride in (2, 4, 8):
            assert is_multiple(grid, 2 * stride).sum() == count_reserved(shape, stride)


def test_selection_is_by_score_with_the_reserved_last() -> None:
    score = torch.tensor([[0.1, 3.0, 2.0, 0.5, 2.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    assert select_tokens(score, 3).tolist() == [[1, 2, 4], [0, 1, 2]]
    reserved = torch.zeros(2, 6, dtype=torch.bool)
    reserved[0, [0, 2]] = reserved[1, [1, 5]] = True
    assert select_tokens(score, 4, reserved).tolist() == [[1, 4, 0, 2], [0, 2, 1, 5]]
    assert select_tokens(score, 2, reserved).tolist() == [[0, 2], [1, 5]]
    assert select_tokens(score, 6, reserved).tolist() == [[1, 4, 5, 3, 0, 2], [0, 2, 3, 4, 1, 5]]
    for value in (torch.nan, torch.inf, -torch.inf):
        strange = torch.full((1, 6), value)
        assert select_tokens(strange, 3, reserved[:1]).tolist() == [[1, 0, 2]]
    with pytest.raises(ValueError, match='cannot keep 7 of 6 tokens'):
        select_tokens(score, 7)


def test_at_least_the_reserved_tokens_are_kept() -> None:
    merging = ClusterMerging(4, 6, ds_rate=0.2)
    assert merging.num_kept(15, (18, 24), 8) == count_reserved((18, 24), 8) == 4
    assert merging.num_kept(100, (18, 24), 4) == 20
    assert ClusterMerging(4, 6, reserve=False).num_kept(3, (4, 4), 2) == 1


def test_importance_learns_from_the_features_alone() -> None:
    torch.manual_seed(0)
    merging = ClusterMerging(4, 6)
    pos = places(*((x, y) for y in range(4) for x in range(4)))
    feat, importance = torch.randn(1, 16, 4), (torch.rand(1, 16) * 0.1).requires_grad_()
    kept = merging.select(pos, importance, (4, 4), 2)
    assert (kept[0].sort().values.tolist(), kept.requires_grad) == ([0, 2, 8, 10], False)
    assert (importance[0, kept[0, :3]].diff() < 0).all()
    new_pos, merged = merging(feat, Neighborhood(pos), kept, importance)
    assert torch.equal(new_pos[0], pos[0, kept[0]])
    assert merged.shape == (1, 4, 6)
    merged.square().sum().backward()
    assert (importance.grad != 0).all()  # global neighbourhood: every token is merged into each
    # All members of clusters of 4 are all tokens: the same result.
    nearest = torch.arange(4).expand(1, 16, 4)
    again = merging(feat, Neighborhood(pos, nearest, 4), kept, importance)[1]
    torch.testing.assert_close(again, merged)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r'ds_rate must be in \(0, 1\], got 0'):
        ClusterMerging(4, 4, ds_rate=0)
