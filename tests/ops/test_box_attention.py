"""Box and instance attention: grids, geometry, weights, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from boltz_mm.ops import (
    box_attention,
    box_attention_weights,
    box_sampling_locations,
    grid_points,
    instance_attention,
    instance_attention_weights,
    use_backend,
)
from tests.ops.cases import OpCase, make_case


def test_grid_points_are_row_major_and_rounded_to_float32() -> None:
    assert grid_points(2).tolist() == [[-0.25, -0.25], [0.25, -0.25], [-0.25, 0.25], [0.25, 0.25]]
    assert grid_points(3, scale=2).tolist()[1] == [0, -0.5]
    third = grid_points(3, dtype=torch.float64)[2, 0].item()
    assert third == torch.tensor(1 / 3, dtype=torch.float32).item() != 1 / 3


@pytest.mark.parametrize(('size', 'scale'), [(0, None), (-1, None), (2, 0.0), (2, -1.0), (2, math.nan)])
def test_grid_points_refuses(size: int, scale: float | None) -> None:
    with pytest.raises(ValueError, match='positive'):
        grid_points(size, scale=scale)


def _one_level(height: int, width: int, box: tuple[float, ...]) -> dict[str, Any]:
    """Value is the index of the cell; one query with one box; one point in the middle of the box."""
    value = torch.arange(height * width, dtype=torch.float64).view(1, -1, 1, 1)
    boxes = torch.tensor(box, dtype=torch.float64).view(1, 1, 1, 1, 4)
    logits = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
    return {'value': value, 'spatial_shapes': [(height, width)], 'boxes': boxes, 'logits': logits}


@pytest.mark.parametrize('cell', [(0, 0), (2, 3), (4, 6)])
def test_centre_of_a_cell_gives_the_cell(cell: tuple[int, int], backend: str) -> None:
    row, column = cell
    inputs = _one_level(5, 7, ((column + 0.5) / 7, (row + 0.5) / 5, 0.3, 0.3))
    output = box_attention(**inputs, points=grid_points(1, dtype=torch.float64))
    assert_close(output.item(), row * 7.0 + column)


def test_border_fades_to_zero(backend: str) -> None:
    """Half a cell outside of the level counts with one half less, one cell outside with nothing."""
    points = grid_points(1, dtype=torch.float64)
    for offset, expected in ((0.5, 6.0), (0.0, 3.0), (-0.5, 0.0), (-0.75, 0.0)):
        inputs = _one_level(1, 7, (1 - offset / 7, 0.5, 0.1, 0.1))
        assert_close(box_attention(**inputs, points=points).item(), expected)


def test_valid_ratio_maps_to_the_padded_level(backend: str) -> None:
    points = grid_points(1, dtype=torch.float64)
    inputs = _one_level(1, 8, (0.75, 0.5, 0.1, 0.1))
    ratio = torch.tensor([[[0.5, 1.0]]], dtype=torch.float64)
    assert_close(box_attention(**inputs, points=points, valid_ratios=ratio).item(), 0.75 * 0.5 * 8 - 0.5)


def test_rotation_turns_the_grid(backend: str) -> None:
    """A quarter of a turn takes the point right of the centre to the point below it."""
    inputs = _one_level(9, 9, (0.5, 0.5, 4 / 9, 4 / 9))
    point = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    quarter = torch.full((1, 1, 1, 1), math.pi / 2, dtype=torch.float64)
    assert_close(box_attention(**inputs, points=point).item(), 4 * 9 + 6.0)
    assert_close(box_attention(**inputs, points=point, angles=quarter).item(), 6 * 9 + 4.0)


@pytest.mark.parametrize('name', ['box', 'box_rotated', 'instance'])
def test_sizes_below_zero_collapse_to_the_centre(name: str, backend: str) -> None:
    case = make_case(name)
    sizes = case.leaves['boxes'][..., 2:]
    case.leaves['boxes'] = torch.cat([case.leaves['boxes'][..., :2], torch.where(sizes < 0.3, -sizes.abs(), sizes)], -1)
    outputs, gradients = case.run()
    clamped = OpCase(name, case.shapes, dict(case.leaves), case.points, case.ratios)
    clamped.leaves['boxes'] = torch.cat([case.leaves['boxes'][..., :2], case.leaves['boxes'][..., 2:].relu()], -1)
    for ours, expected in zip(outputs, clamped.run()[0], strict=True):
        assert_close(ours, expected)
    below = case.leaves['boxes'][..., 2:] <= 0
    assert below.any()
    assert not gradients[1][..., 2:][below].any()
    assert gradients[1][..., 2:][~below].any()
    # A size of exactly 0 has no gradient either, as relu has none.
    assert not clamped.run()[1][1][..., 2:][below].any()


def test_uniform_logits_average(backend: str) -> None:
    case = make_case('box', shapes=((6, 6),), ratios=False)
    case.leaves['value'] = torch.ones_like(case.leaves['value'])
    case.leaves['boxes'] = torch.full_like(case.leaves['boxes'], 0.5)
    (output,), _ = case.run()
    assert_close(output, torch.ones_like(output))


@pytest.mark.parametrize('shift', [0.0, 80.0, -80.0, 1e4])
def test_large_logits(shift: float, backend: str) -> None:
    for name in ('box', 'instance'):
        case = make_case(name, torch.float32)
        plain = case.run()[0]
        case.leaves['logits'] = case.leaves['logits'] + shift
        for ours, expected in zip(case.run()[0], plain, strict=True):
            assert_close(ours, expected, rtol=2e-3 if shift == 1e4 else 1e-4, atol=1e-3 if shift == 1e4 else 1e-5)


def test_masked_logits_get_no_weight(backend: str) -> None:
    case = make_case('box', torch.float32)
    case.leaves['logits'][..., 1:] = -math.inf
    (output,), gradients = case.run()
    kept = OpCase('box', case.shapes, dict(case.leaves), case.points[:1], case.ratios)
    kept.leaves['logits'] = case.leaves['logits'][..., :1]
    assert_close(output, kept.run()[0][0])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_nan_logit_stays_in_its_row(backend: str) -> None:
    for name in ('box', 'instance'):
        case = make_case(name, torch.float32)
        case.leaves['boxes'][..., :2] = 0.5
        plain = case.run()[0]
        case.leaves['logits'][0, 1, 0] = math.nan
        for ours, expected in zip(case.run()[0], plain, strict=True):
            head = ours[0, 1].view(-1, 2, 5)[:, 0]
            assert head.isnan().all()
            head[:] = expected[0, 1].view(-1, 2, 5)[:, 0]
            assert_close(ours, expected)


def test_weights_of_the_references() -> None:
    logits = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)
    assert_close(box_attention_weights(logits).sum((-1, -2)), torch.ones(2, 3, 2, dtype=torch.float64))
    spatial, level = instance_attention_weights(logits.view(2, 3, 2, 3, 2, 2), 6)
    assert spatial.shape == level.shape == (2, 3, 2, 3, 6, 6)
    assert_close(spatial.sum((-1, -2, -3)), torch.ones(2, 3, 2, dtype=torch.float64))
    assert_close(level.sum(3), torch.ones(2, 3, 2, 6, 6, dtype=torch.float64))
    repeated = logits.view(2, 3, 2, 3, 2, 2).repeat_interleave(3, -1).repeat_interleave(3, -2)
    assert_close(spatial, repeated.flatten(3).softmax(-1).view_as(repeated))
    assert_close(level, repeated.softmax(3))


def test_locations_reach_the_operator() -> None:
    case = make_case('box_rotated')
    boxes, angles = case.leaves['boxes'], case.leaves['angles']
    locations = box_sampling_locations(boxes, case.points, valid_ratios=case.ratios, angles=angles)
    assert locations.shape == (2, 3, 2, 3, 4, 2)
    assert_close(locations.mean(-2), boxes[..., :2] * case.ratios[:, None, None])


def test_one_grid_point_per_quadrant(backend: str) -> None:
    """At m = 2 each point has a logit of its own, so the output is that of box attention."""
    case = make_case('instance')
    value, boxes, logits = case.leaves.values()
    output, masks = instance_attention(value, case.shapes, boxes, logits, case.points, valid_ratios=case.ratios)
    plain = box_attention(value, case.shapes, boxes, logits.flatten(4), case.points, valid_ratios=case.ratios)
    assert_close(output, plain)
    assert masks.shape == (2, 3, 2, 2, 10)
    alone = instance_attention(
        value, case.shapes, boxes, logits, case.points, valid_ratios=case.ratios, mask_output=False
    )
    assert_close(alone, output)


def test_valid_ratios_and_points_get_no_gradient(backend: str) -> None:
    case = make_case('box')
    ratios, points = case.ratios.clone().requires_grad_(), case.points.clone().requires_grad_()
    value, boxes, logits = (leaf.requires_grad_() for leaf in case.leaves.values())
    box_attention(value, case.shapes, boxes, logits, points, valid_ratios=ratios).sum().backward()
    assert ratios.grad is None
    assert points.grad is None


Change = Callable[[dict[str, Any]], Any]
REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    'levels': (lambda i: i | {'spatial_shapes': [(5, 7), (3, 4)]}, ValueError, '47 cells, but value has 49'),
    'levels_tensor': (lambda i: i | {'spatial_shapes': torch.tensor([[5, 7]])}, ValueError, '35 cells'),
    'negative_levels': (lambda i: i | {'spatial_shapes': [(-7, -7)]}, ValueError, 'negative'),
    'level_rank': (lambda i: i | {'spatial_shapes': torch.tensor([5, 7])}, ValueError, r'\[L, 2\]'),
    'level_dtype': (lambda i: i | {'spatial_shapes': torch.ones(3, 2)}, TypeError, 'float32'),
    'value_rank': (lambda i: i | {'value': i['value'][0]}, ValueError, r'\[B, S, H, D\]'),
    'value_dtype': (lambda i: i | {'value': i['value'].long()}, TypeError, 'int64'),
    'value_type': (lambda i: i | {'value': [1.0]}, TypeError, 'list'),
    'boxes_rank': (lambda i: i | {'boxes': i['boxes'][0]}, ValueError, r'\[B, Q, H, L, 4\]'),
    'boxes_shape': (lambda i: i | {'boxes': i['boxes'][..., :3]}, ValueError, 'boxes must have shape'),
    'boxes_heads': (lambda i: i | {'boxes': i['boxes'][:, :, :1]}, ValueError, 'boxes must have shape'),
    'boxes_device': (lambda i: i | {'boxes': i['boxes'].to('meta')}, ValueError, 'boxes is on meta'),
    'logits': (lambda i: i | {'logits': i['logits'][:, :2]}, ValueError, 'logits must have shape'),
    'points': (lambda i: i | {'points': i['points'].T}, ValueError, r'points must have shape \[P, 2\]'),
    'ratios': (lambda i: i | {'valid_ratios': i['valid_ratios'][:1]}, ValueError, 'valid_ratios must have shape'),
}


def _inputs(name: str) -> dict[str, Tensor]:
    case = make_case(name)
    return {**case.leaves, 'spatial_shapes': case.shapes, 'points': case.points, 'valid_ratios': case.ratios}


@pytest.mark.parametrize('operator', [box_attention, instance_attention], ids=['box', 'instance'])
@pytest.mark.parametrize('what', REFUSED)
def test_refuses(what: str, operator: Callable[..., Any], backend: str) -> None:
    change, error, message = REFUSED[what]
    inputs = _inputs('box' if operator is box_attention else 'instance')
    with pytest.raises(error, match=message):
        operator(**change(inputs))


def test_refuses_angles_of_another_shape(backend: str) -> None:
    with pytest.raises(ValueError, match='angles must have shape'):
        box_attention(**_inputs('box'), angles=torch.zeros(2, 3, 2, 1))


@pytest.mark.parametrize('size', [1, 3])
def test_instance_attention_refuses_odd_grids(size: int, backend: str) -> None:
    with pytest.raises(ValueError, match='m even'):
        instance_attention(**_inputs('instance') | {'points': grid_points(size)})


def test_integer_level_shapes_of_both_widths(backend: str) -> None:
    inputs = _inputs('box')
    expected = box_attention(**inputs)
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(
            box_attention(**inputs | {'spatial_shapes': torch.tensor(inputs['spatial_shapes'], dtype=dtype)}), expected
        )


def test_float16_coordinates_are_not_needed() -> None:
    """The documented loss: boxes in float16 are off by more than 100 times what float32 boxes are."""
    errors = []
    for dtype in (torch.float32, torch.float16):
        case = make_case('box', shapes=((120, 200),), size=2, ratios=False, queries=50)
        exact = case.run()[0][0]
        with use_backend('reference'):
            value, boxes, logits = (leaf.float() for leaf in case.leaves.values())
            ours = box_attention(value, case.shapes, boxes.to(dtype), logits, case.points.float())
        errors.append((ours - exact).abs().max().item())
    assert errors[1] > 100 * errors[0]
