"""The pixel decoder: independence of token order, precision, small images, errors."""

import pytest
import torch

from boltz_mm.models.heads.point_pixel_decoder import PointPixelDecoder
from boltz_mm.models.layers.point_tables import grid_positions
from boltz_mm.structures import PointFeature

WIDTHS = [6, 8, 10, 12]


def levels_of(canvas: tuple[int, int], *sizes: int, batch: int = 2) -> list[PointFeature]:
    grid = grid_positions(canvas)
    levels = []
    for n, width in zip((len(grid), *sizes), WIDTHS, strict=False):
        pos = torch.stack([grid[torch.randperm(len(grid))[:n]] for _ in range(batch)])
        levels.append(PointFeature(torch.randn(batch, n, width), pos, canvas))
    return levels


def decoder_of(**kwargs) -> PointPixelDecoder:
    torch.manual_seed(0)
    settings = dict(in_channels=WIDTHS, feat_channels=16, out_channels=12, num_heads=4, num_layers=2)
    decoder = PointPixelDecoder(**{**settings, 'feedforward_channels': 8, **kwargs})
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return decoder.eval()


def test_shapes() -> None:
    canvas = (7, 9)
    features, memory, shape = decoder_of()(levels_of(canvas, 20, 9, 5))
    assert features.shape == (2, 63, 12)
    assert [m.feat.shape for m in memory] == [(2, 5, 16), (2, 9, 16), (2, 20, 16)]
    assert shape == canvas


def test_order_of_the_finest_level_matters_near_corners_only() -> None:
    decoder, levels = decoder_of(), levels_of((7, 9), 20, 9, 5)
    order = torch.randperm(63)
    turned = levels[0]._replace(feat=levels[0].feat[:, order], pos=levels[0].pos[:, order])
    a, b = (decoder([finest, *levels[1:]]) for finest in (levels[0], turned))
    same = torch.isclose(a.mask_features, b.mask_features, rtol=1e-4, atol=1e-5).all(-1).all(0).view(7, 9)
    assert same[2:-2].all()
    assert same[:, 2:-2].all()
    torch.testing.assert_close([m.feat for m in a.memory], [m.feat for m in b.memory])


def test_an_image_on_its_own_where_asked_for() -> None:
    levels = levels_of((7, 9), 20, 9, 5)
    for level in levels[1:]:
        level.pos[0].clamp_(max=4)  # the images reach differently far
    alone = [PointFeature(level.feat[:1], level.pos[:1], level.shape) for level in levels]
    for per_image in (False, True):
        decoder = decoder_of(per_image=per_image)
        same = torch.allclose(decoder(levels).mask_features[0], decoder(alone).mask_features[0], atol=1e-5)
        assert same == per_image


@pytest.mark.parametrize(('autocast', 'dtype'), [(False, torch.float32), (True, torch.bfloat16)])
def test_leaves_autocast_unless_told_otherwise(autocast: bool, dtype: torch.dtype) -> None:
    levels = levels_of((7, 9), 20, 9, 5)
    decoder = decoder_of(autocast=autocast)
    expected = decoder(levels).mask_features
    halved = [level._replace(feat=level.feat.bfloat16()) for level in levels]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = decoder(halved).mask_features
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(('canvas', 'sizes'), [((1, 1), (1, 1, 1)), ((1, 12), (3, 2, 1)), ((2, 2), (1, 1, 1))])
def test_small_images(canvas: tuple[int, int], sizes: tuple[int, ...]) -> None:
    decoder = decoder_of()
    out = decoder(levels_of(canvas, *sizes))
    assert out.mask_features.isfinite().all()
    out.mask_features.sum().backward()


def test_starts_as_officially() -> None:
    decoder = PointPixelDecoder(WIDTHS, feat_channels=16, out_channels=12, num_heads=4, num_layers=1)
    assert not decoder.input_proj[0][0].bias.any()
    bound = (3 / 16) ** 0.5
    assert 0.8 * bound < decoder.mask_features.weight.abs().max() <= bound
    assert not decoder.mask_features.bias.any()


@pytest.mark.parametrize(
    ('bad', 'message'),
    [({'in_channels': [6]}, 'at least 2 levels'), ({'feat_channels': 18, 'num_heads': 3}, 'multiple of 4')],
)
def test_bad_settings(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_of(**bad)


def test_bad_levels() -> None:
    decoder, levels = decoder_of(), levels_of((7, 9), 20, 9, 5)
    with pytest.raises(ValueError, match='expected 4 levels, got 3'):
        decoder(levels[:3])
    short = levels[0]._replace(feat=levels[0].feat[:, 1:], pos=levels[0].pos[:, 1:])
    with pytest.raises(ValueError, match='a full grid of 7 x 9 cells has 63 tokens, got 62'):
        decoder([short, *levels[1:]])
