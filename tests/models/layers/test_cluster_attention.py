"""Cluster attention and the block around it; numbers are held by the golden cases."""

import pytest
import torch

from boltz_mm.models.layers.cluster_attention import ClusterAttention, ClusterBlock, Neighborhood


def tokens(batch: int = 2, count: int = 12, channels: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    pos = torch.stack([torch.randperm(36)[:count] for _ in range(batch)])
    return torch.randn(batch, count, channels), torch.stack((pos % 6, pos // 6), -1).float()


def test_all_clusters_are_all_tokens() -> None:
    feat, pos = tokens()
    attention = ClusterAttention(8, 2)
    clusters = Neighborhood(pos, torch.tensor([2, 0, 1]).expand(2, 12, 3), 4)
    everyone = attention(feat, Neighborhood(pos))
    torch.testing.assert_close(attention(feat, clusters), everyone)
    fewer = clusters._replace(nearest=clusters.nearest[..., :2])
    assert not torch.allclose(attention(feat, fewer), everyone)


def test_only_the_nearest_clusters_are_seen() -> None:
    feat, pos = tokens()
    attention = ClusterAttention(8, 2)
    near = Neighborhood(pos[:1], torch.tensor([0, 2]).expand(1, 12, 2), 4).expand(2)
    assert near.pos.shape == (2, 12, 2)
    before = attention(feat, near)
    feat[:, 4:8] += 1  # the middle cluster: its tokens' own queries change, nobody else sees them
    after = attention(feat, near)
    others = [0, 1, 2, 3, 8, 9, 10, 11]
    torch.testing.assert_close(after[:, others], before[:, others])
    assert not torch.allclose(after[:, 4:8], before[:, 4:8])


def test_offsets_are_clamped_on_request() -> None:
    feat, pos = tokens(batch=1)
    far = pos.clone()
    far[:, 0, 0] += 1000
    free, clamped = ClusterAttention(8, 2), ClusterAttention(8, 2, max_offset=3)
    clamped.load_state_dict(free.state_dict())
    assert not torch.allclose(free(feat, Neighborhood(pos)), free(feat, Neighborhood(far)))
    # Token 0 lies at least 3 cells to the right of all others, however far.
    near = far.clone()
    near[:, 0, 0] -= 900
    torch.testing.assert_close(clamped(feat, Neighborhood(near)), clamped(feat, Neighborhood(far)))


@pytest.mark.parametrize('layer_scale', [0.0, 0.5])
def test_a_block_is_the_same_in_training_and_evaluation_without_draws(layer_scale: float) -> None:
    feat, pos = tokens()
    block = ClusterBlock(8, 2, layer_scale=layer_scale)
    assert ('gamma1' in dict(block.named_parameters())) == bool(layer_scale)
    torch.testing.assert_close(block.train()(feat, Neighborhood(pos)), block.eval()(feat, Neighborhood(pos)))
    noisy = ClusterBlock(8, 2, drop_rate=0.5).train()
    assert not torch.allclose(noisy(feat, Neighborhood(pos)), noisy(feat, Neighborhood(pos)))


def test_heads_have_to_divide_the_channels() -> None:
    with pytest.raises(ValueError, match='embed_dims 8 is not a multiple of num_heads 3'):
        ClusterAttention(8, 3)
