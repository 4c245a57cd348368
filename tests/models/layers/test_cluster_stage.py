"""Stages and patch embedding; numbers are held by the golden cases."""

import pytest
import torch

from boltz_mm.models.layers.cluster_stage import ClusterStage, PatchEmbed, grid_positions


def test_neighbourhoods_from_all_tokens_to_one() -> None:
    pos = grid_positions((6, 8)).expand(2, -1, -1)
    everyone = ClusterStage(8, 1, 2, cluster_size=4, nbhd_size=48).cluster(pos, (6, 8))
    assert everyone.order is None
    assert everyone.neighborhood.nearest is None
    clustered = ClusterStage(8, 1, 2, cluster_size=5, nbhd_size=12).cluster(pos, (6, 8))
    # 12 / 5 rounds to 2 clusters; the order is one of all tokens.
    assert clustered.neighborhood.nearest.shape == (2, 48, 2)
    assert torch.equal(clustered.order.sort(dim=1).values[1], torch.arange(48))
    assert torch.equal(clustered.neighborhood.pos[0], pos[0, clustered.order[0]])
    # Halves round to even, at most all clusters are taken.
    assert ClusterStage(8, 1, 2, cluster_size=4, nbhd_size=10).cluster(pos, (6, 8)).neighborhood.nearest.shape[-1] == 2
    assert ClusterStage(8, 1, 2, cluster_size=40, nbhd_size=47).cluster(pos, (6, 8)).neighborhood.nearest.shape[-1] == 1
    single = ClusterStage(8, 1, 2, cluster_size=1, nbhd_size=3).cluster(pos, (6, 8))
    assert single.order is None
    assert torch.equal(single.neighborhood.nearest[0, :, 0], torch.arange(48, dtype=torch.int32))


def test_a_known_clustering_gives_the_same() -> None:
    torch.manual_seed(0)
    stage = ClusterStage(8, 2, 2, cluster_size=4, nbhd_size=12, out_channels=12).eval()
    pos, feat = grid_positions((6, 8)).expand(2, -1, -1), torch.randn(2, 48, 8)
    known = stage.cluster(pos[:1], (6, 8)).expand(2)
    out = stage(pos, feat, (6, 8), 2)
    again = stage(pos, feat[:, known.order[0]], (6, 8), 2, known)
    assert torch.equal(out.kept, again.kept)
    torch.testing.assert_close(out.next_feat, again.next_feat)
    assert out.next_feat.shape == (2, 12, 12)
    assert ((out.importance > 0) & (out.importance < 1)).all()


def test_global_stages_downsample() -> None:
    stage = ClusterStage(8, 1, 2, nbhd_size=48, out_channels=12)
    out = stage(grid_positions((4, 4)), torch.randn(1, 16, 8), (4, 4), 2)
    assert out.neighborhood.nearest is None
    assert out.next_feat.shape == (1, 4, 12)
    last = ClusterStage(8, 1, 2)
    out = last(grid_positions((4, 4)), torch.randn(1, 16, 8), (4, 4), 16)
    assert (out.importance, out.kept, out.next_feat is out.feat) == (None, None, True)
    with pytest.raises(ValueError, match='has no importance scores'):
        last.importance(out.feat)


def test_importance_is_float32_at_least() -> None:
    stage = ClusterStage(8, 1, 2, out_channels=12)
    assert stage.importance(torch.randn(1, 5, 8)).shape == (1, 5)
    assert stage.bfloat16().importance(torch.randn(1, 5, 8).bfloat16()).dtype == torch.float32
    assert stage.double().importance(torch.randn(1, 5, 8).double()).dtype == torch.float64


@pytest.mark.parametrize('size', [(1, 1), (4, 5), (30, 37), (31, 2)])
def test_patches_of_any_size_in_any_order(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, *size)
    embed = PatchEmbed(3, 8).eval()
    height, width = embed.grid_shape(image)
    tokens = embed(image)
    assert tokens.shape == (2, height * width, 8)
    order = torch.randperm(height * width)
    torch.testing.assert_close(embed(image, order), tokens[:, order])
    padded = PatchEmbed(3, 8, pad_to_stride=True).eval()
    padded.load_state_dict(embed.state_dict())
    larger = torch.zeros(2, 3, 4 * height, 4 * width)
    larger[..., : size[0], : size[1]] = image
    torch.testing.assert_close(padded(image), embed(larger))


def test_positions_are_row_by_row() -> None:
    assert grid_positions((2, 3)).tolist() == [[[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]]
