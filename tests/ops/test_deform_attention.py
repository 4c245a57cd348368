"""Deformable attention at given points: against mmcv's operator, and what is refused."""

import importlib.util
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from boltz_mm.ops import deform_attention
from tests.ops.cases import make_case


@pytest.mark.skipif(importlib.util.find_spec('mmcv') is None, reason='mmcv is not installed')
def test_equals_mmcv(backend: str) -> None:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    case = make_case('deform', size=2, depth=8)
    outputs, gradients = case.run()
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    expected = multi_scale_deformable_attn_pytorch(leaves[0], torch.tensor(case.shapes), leaves[1], leaves[2])
    expected_gradients = torch.autograd.grad(expected, leaves, case.cotangents((expected,)))
    for ours, theirs in zip((*outputs, *gradients), (expected, *expected_gradients), strict=True):
        assert_close(ours, theirs)


def test_mask_output_by_points_in_the_query_axis(backend: str) -> None:
    """Instance attention's feature map is deformable attention with one point per query."""
    case = make_case('deform', size=2)
    value, locations, weights = case.leaves.values()
    batch, queries, heads, levels, points = weights.shape
    each = deform_attention(
        value,
        case.shapes,
        locations.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, levels, 1, 2),
        weights.permute(0, 1, 4, 2, 3).reshape(batch, -1, heads, levels, 1),
    )
    assert_close(each.view(batch, queries, points, -1).sum(2), case.run()[0][0])


def test_weights_are_used_as_they_are(backend: str) -> None:
    case = make_case('deform')
    value, locations, weights = case.leaves.values()
    plain = deform_attention(value, case.shapes, locations, weights)
    assert_close(deform_attention(value, case.shapes, locations, -3 * weights), -3 * plain)
    assert not deform_attention(value, case.shapes, locations, 0 * weights).any()


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        ({'spatial_shapes': [(7, 7), (1, 1)]}, ValueError, '50 cells, but value has 49'),
        ({'locations': torch.zeros(2, 3, 2, 3, 4)}, ValueError, r'\[B, Q, H, L, P, 2\]'),
        ({'locations': torch.zeros(2, 3, 2, 3, 4, 3)}, ValueError, 'locations must have shape'),
        ({'locations': torch.zeros(1, 3, 2, 3, 4, 2)}, ValueError, 'locations must have shape'),
        ({'weights': torch.zeros(2, 3, 2, 3, 5)}, ValueError, 'weights must have shape'),
        ({'weights': torch.zeros(2, 3, 2, 3, 4, dtype=torch.int64)}, TypeError, 'int64'),
        ({'weights': None}, TypeError, 'NoneType'),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    case = make_case('deform')
    with pytest.raises(error, match=message):
        deform_attention(**{**case.leaves, 'spatial_shapes': case.shapes} | change)
