"""Sine embedding of positions against its formula, alone and in company."""

import math

import pytest
import torch

from boltz_mm.models.layers.point_position import PointSineEncoding


def test_formula() -> None:
    pos = torch.tensor([[[3.0, 5.0], [12.0, 0.0]]])
    embedded = PointSineEncoding(4, temperature=100.0)(pos)[0, 0]
    x, y = 3 / (12 + 1e-6) * 2 * math.pi, 5 / (5 + 1e-6) * 2 * math.pi
    expected = [f(v / t) for v in (x, y) for f in (math.sin, math.cos) for t in (1.0, 10.0)]
    torch.testing.assert_close(embedded, torch.tensor(expected))


def test_unnormalised() -> None:
    embedded = PointSineEncoding(2, normalize=False)(torch.tensor([[[3.0, 5.0], [12.0, 0.0]]]))
    expected = [math.sin(3), math.cos(3), math.sin(5), math.cos(5)]
    torch.testing.assert_close(embedded[0, 0], torch.tensor(expected))


@pytest.mark.parametrize('per_image', [False, True])
def test_company_counts_unless_told_otherwise(per_image: bool) -> None:
    pos = torch.stack([torch.arange(6.0).view(3, 2), 4 * torch.arange(6.0).view(3, 2)])
    encoding = PointSineEncoding(8, per_image=per_image)
    same = torch.equal(encoding(pos)[:1], encoding(pos[:1]))
    assert same == per_image


def test_a_single_token_at_the_origin_is_finite() -> None:
    assert PointSineEncoding(4)(torch.zeros(1, 1, 2)).isfinite().all()


@pytest.mark.parametrize('num_feats', [0, 3])
def test_bad_width(num_feats: int) -> None:
    with pytest.raises(ValueError, match='num_feats'):
        PointSineEncoding(num_feats)
