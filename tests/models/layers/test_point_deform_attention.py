"""Deformable attention between points: one query by hand, and how it starts."""

import pytest
import torch

from boltz_mm.models.layers.point_deform_attention import PointDeformAttention, PointDeformEncoder, PointLevels
from boltz_mm.models.layers.point_tables import grid_positions, nearest_tables

CANVAS = (5, 6)


def levels_of(*sizes: int) -> PointLevels:
    grid = grid_positions(CANVAS)
    positions = [grid[torch.randperm(len(grid))[:n]][None] for n in sizes]
    return PointLevels(torch.cat(positions, dim=1), list(sizes), nearest_tables(positions, CANVAS), CANVAS)


def test_one_token_by_hand() -> None:
    torch.manual_seed(0)
    levels = levels_of(4, 12)
    attention = PointDeformAttention(8, num_levels=2, num_heads=2, num_points=3, power=1.5).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    query, value = torch.randn(2, 1, 16, 8, dtype=torch.float64)
    with torch.no_grad():
        out = attention(query, value, levels._replace(pos=levels.pos.double()))[0, 7]

        pos, values = levels.pos[0].double(), attention.value_proj(value)[0].view(16, 2, 4)
        offsets = attention.sampling_offsets(query)[0, 7].view(2, 2, 3, 2)
        weights = attention.attention_weights(query)[0, 7].view(2, 6).softmax(-1).view(2, 2, 3)
        heads = []
        for head in range(2):
            total = torch.zeros(4, dtype=torch.float64)
            for level, start in enumerate((0, 4)):
                for point in range(3):
                    place = pos[7] + offsets[head, level, point]
                    x, y = (int(c.round().clamp(0, n - 1)) for c, n in zip(place, (6, 5), strict=True))
                    near = start + levels.tables[0, level, y * 6 + x].long()
                    u = 1 / (((place - pos[near]) ** 2).sum(-1) ** attention.shepard_power + 1e-11)
                    sample = ((u / u.sum())[:, None] * values[near, head]).sum(0)
                    total += weights[head, level, point] * sample
            heads.append(total)
        torch.testing.assert_close(out, attention.output_proj(torch.cat(heads)))


def test_start_is_a_star_of_equal_weights() -> None:
    attention = PointDeformAttention(16, num_levels=3, num_heads=8, num_points=4)
    places = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    assert torch.equal(places[:, 0], places[:, 2])
    torch.testing.assert_close(places.abs().amax(-1)[:, 0], torch.arange(1.0, 5).expand(8, -1))
    torch.testing.assert_close(places[1, 0, 0], torch.tensor([1.0, 1.0]))
    assert not attention.attention_weights.weight.any()


def test_a_fixed_power_is_no_parameter() -> None:
    attention = PointDeformAttention(8, num_heads=2, power=2.0, learnable_power=False)
    assert attention.shepard_power == 2.0
    assert 'shepard_power' not in dict(attention.named_parameters())


def test_heads_have_to_divide_channels() -> None:
    with pytest.raises(ValueError, match='embed_dims must be a multiple of num_heads, got 10 and 4'):
        PointDeformAttention(10, num_heads=4)


def test_gradients_reach_every_parameter_of_an_encoder() -> None:
    torch.manual_seed(0)
    levels = levels_of(4, 6, 12)
    encoder = PointDeformEncoder(2, embed_dims=8, feedforward_channels=8, num_heads=2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    encoder(torch.randn(1, 22, 8), torch.randn(1, 22, 8), levels).square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []
