"""The masked decoder: its attention, its masks, and what it leaves out at inference."""

import pytest
import torch
from torch import Tensor, nn

from boltz_mm.models.layers.point_masked_decoder import MaskableAttention, PointMaskedDecoder, allowed_tokens
from boltz_mm.models.layers.point_tables import cell_index, grid_positions
from boltz_mm.ops import inverse_distance_interpolate, knn_points
from boltz_mm.structures import PointFeature

CANVAS = (6, 8)


def memory_of(*sizes: int, batch: int = 2, width: int = 16) -> list[PointFeature]:
    grid = grid_positions(CANVAS)
    levels = []
    for n in sizes:
        pos = torch.stack([grid[torch.randperm(len(grid))[:n]] for _ in range(batch)])
        levels.append(PointFeature(torch.randn(batch, n, width), pos, CANVAS))
    return levels


def decoder_of(**kwargs) -> PointMaskedDecoder:
    torch.manual_seed(0)
    settings = dict(in_channels=16, embed_dims=16, out_channels=12, num_queries=5, num_heads=4, num_layers=4)
    return PointMaskedDecoder(3, **{**settings, 'feedforward_channels': 8, **kwargs})


def test_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = MaskableAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 5, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    allowed = torch.rand(2, 5, 9) > 0.5
    allowed[..., 0] = True
    expected, _ = theirs(query, key, value, attn_mask=~allowed.repeat_interleave(4, dim=0))
    torch.testing.assert_close(ours(query, key, value, allowed), expected)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0])


def test_queries_with_an_empty_mask_see_everything() -> None:
    logits = torch.tensor([[[1.0, -1.0, 0.0], [-1.0, -2.0, -3.0]]])
    assert allowed_tokens(logits).tolist() == [[[True, False, True], [True, True, True]]]


def test_reading_a_cell_is_the_official_interpolation() -> None:
    torch.manual_seed(0)
    [level] = memory_of(20)
    image = torch.randn(2, 48, 5)
    grid = grid_positions(CANVAS).expand(2, -1, -1)
    index = knn_points(level.pos, grid, 4)
    interpolated = inverse_distance_interpolate(image, grid, level.pos, index, 3.0)
    read = image.gather(1, cell_index(level.pos, CANVAS)[..., None].expand(-1, -1, 5))
    torch.testing.assert_close(read, interpolated, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('num_layers', [0, 1, 4])
def test_the_last_prediction_alone_is_the_same(num_layers: int) -> None:
    decoder, memory = decoder_of(num_layers=num_layers), memory_of(4, 10, 30)
    features = torch.randn(2, 48, 12)
    classes, masks = decoder(memory, features, CANVAS)
    assert len(classes) == len(masks) == num_layers + 1
    assert masks[0].shape == (2, 5, *CANVAS)
    [last_class], [last_mask] = decoder(memory, features, CANVAS, last_only=True)
    torch.testing.assert_close((last_class, last_mask), (classes[-1], masks[-1]))


def test_attention_masks_have_no_gradient_but_all_parameters_do() -> None:
    decoder, memory = decoder_of(enforce_input_project=True), memory_of(4, 10, 30)
    features = torch.randn(2, 48, 12, requires_grad=True)
    classes, masks = decoder(memory, features, CANVAS)
    assert torch.autograd.grad(classes[-1].sum(), features, retain_graph=True, allow_unused=True) == (None,)
    sum(value.square().sum() for value in (*classes, *masks)).backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_token_order_does_not_matter() -> None:
    decoder, memory = decoder_of(), memory_of(4, 10, 30)
    features = torch.randn(2, 48, 12)

    def turned(level: PointFeature) -> PointFeature:
        return level._replace(feat=level.feat.flip(1), pos=level.pos.flip(1))

    a, b = (decoder(levels, features, CANVAS) for levels in (memory, [turned(level) for level in memory]))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_works_under_autocast() -> None:
    decoder, memory = decoder_of(), memory_of(4, 10, 30)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        classes, masks = decoder(memory, torch.randn(2, 48, 12), CANVAS)
    assert all(value.isfinite().all() for value in (*classes, *masks))


def test_bad_width() -> None:
    with pytest.raises(ValueError, match='embed_dims must be a multiple of 4'):
        decoder_of(embed_dims=18)


def test_attention_starts_from_xavier() -> None:
    decoder = decoder_of()
    weight: Tensor = decoder.transformer_cross_attention_layers[0].multihead_attn.in_proj_weight
    bound = (6 / (16 + 48)) ** 0.5
    assert 0.9 * bound < weight.abs().max() <= bound
