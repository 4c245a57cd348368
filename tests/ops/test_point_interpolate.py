"""Interpolation between points, weighted samples of points, points to images."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from boltz_mm.ops import (
    inverse_distance_interpolate,
    inverse_distance_weights,
    points_to_image,
    weighted_point_sampling,
)
from tests.ops.point_deform_cases import (
    cells,
    cotangent,
    gather_interpolation,
    interpolation,
    nearest,
    run_interpolation,
)

SIZES = {
    'usual': dict(queries=300, tokens=40, channels=100),
    'few_channels': dict(channels=1, batch=1),
    'one_neighbour': dict(neighbours=1, power=2.0),
    'six_neighbours': dict(neighbours=6, power=2.6, channels=33),
    'wide': dict(channels=260, power=1.0),
}


@pytest.mark.parametrize('size', SIZES)
def test_equals_gathers(size: str, backend: str) -> None:
    arguments = interpolation(**SIZES[size])
    for ours, expected in zip(
        run_interpolation(arguments), gather_interpolation(arguments, torch.float64), strict=True
    ):
        assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_all_gradients(backend: str) -> None:
    """Positions get theirs too, on the way of the reference."""
    arguments = interpolation(power=2.6)
    # Away from the tokens, where the distance has no derivative of use.
    arguments['query_pos'] = arguments['query_pos'] + 0.1
    wanted = ('feat', 'pos', 'query_pos', 'power')
    for ours, expected in zip(
        run_interpolation(arguments, wanted), gather_interpolation(arguments, torch.float64, wanted), strict=True
    ):
        assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_gradcheck(backend: str) -> None:
    arguments = interpolation(power=2.6, channels=3, queries=4)
    arguments['query_pos'] = arguments['query_pos'] + 0.3
    constants = {name: arguments[name] for name in ('pos', 'query_pos', 'index')}
    leaves = [arguments[name].detach().requires_grad_() for name in ('feat', 'power')]

    def function(feat: Tensor, power: Tensor) -> Tensor:
        return inverse_distance_interpolate(feat, **constants, power=power)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_off(dtype: torch.dtype, backend: str) -> None:
    arguments = interpolation(dtype, **SIZES['usual'])
    results, exact = run_interpolation(arguments), gather_interpolation(arguments, torch.float64)
    assert [r.dtype for r in results] == [dtype, dtype, torch.float32]
    for ours, expected in zip(results[:2], exact[:2], strict=True):
        assert _worst(ours, expected) <= 2 * _worst(expected.to(dtype), expected) + 1e-6
    assert_close(results[2].double(), exact[2], rtol=1e-4, atol=1e-3)


def _worst(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach().double()).abs().max())


def test_any_strides_and_index_types(backend: str) -> None:
    arguments = interpolation(torch.float32)
    plain = run_interpolation(arguments)
    moved = {
        name: x.clone() if name == 'power' else x.transpose(0, -1).contiguous().transpose(0, -1)
        for name, x in arguments.items()
    }
    moved['index'] = moved['index'].int()
    for ours, expected in zip(run_interpolation(moved), plain, strict=True):
        assert_close(ours, expected)


def test_fixed_power_and_features_alone(backend: str) -> None:
    arguments = interpolation(torch.float32)
    expected = run_interpolation(arguments, ('feat',))
    feat = arguments['feat'].detach().requires_grad_()
    output = inverse_distance_interpolate(**(arguments | dict(feat=feat, power=3)))
    output.backward(cotangent(output))
    assert_close(output, expected[0], rtol=1e-6, atol=1e-6)
    assert_close(feat.grad, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dimension', ['batch', 'queries', 'channels'])
def test_empty(dimension: str, backend: str) -> None:
    arguments = interpolation()
    cut = {'batch': lambda x: x[:0], 'queries': lambda x: x[:, :0], 'channels': lambda x: x[..., :0]}
    touched = {'batch': ('feat', 'pos', 'query_pos', 'index'), 'queries': ('query_pos', 'index'), 'channels': ('feat',)}
    arguments |= {name: cut[dimension](arguments[name]) for name in touched[dimension]}
    output, feat, power = run_interpolation(arguments)
    assert output.shape == (*arguments['index'].shape[:2], arguments['feat'].shape[2])
    assert feat.shape == arguments['feat'].shape
    assert not output.any()
    assert not feat.any()
    assert not power.any()


def test_same_bits_on_any_number_of_threads(native: None, threads: None) -> None:
    arguments = interpolation(torch.float32, queries=900, channels=70, power=3.1)
    results = []
    for count in (1, 2, 5, 1):
        torch.set_num_threads(count)
        results.append(run_interpolation(arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_interpolation_errors(backend: str) -> None:
    arguments = interpolation()
    for bad in (-1, 9):
        index = arguments['index'].clone()
        index[1, 2, 3] = bad
        with pytest.raises(RuntimeError, match='index'):
            inverse_distance_interpolate(**(arguments | dict(index=index)))
    for message, changed in {
        'index must have shape': dict(index=arguments['index'][:1]),
        'pos must have shape': dict(pos=arguments['pos'][:, :4]),
        'query_pos must have shape': dict(query_pos=arguments['query_pos'][:, :4]),
        'feat must have three dimensions': dict(feat=arguments['feat'][0]),
    }.items():
        with pytest.raises(ValueError, match=message):
            inverse_distance_interpolate(**(arguments | changed))
    with pytest.raises(TypeError, match='index must be int64 or int32'):
        inverse_distance_interpolate(**(arguments | dict(index=arguments['index'].double())))


@pytest.mark.parametrize('power', [3.0, 1.0, 0.5])
def test_weights_on_a_token_are_differentiable(power: float) -> None:
    query = torch.zeros(1, 2, requires_grad=True)
    neighbours = torch.tensor([[[0.0, 0], [3, 4], [1, 1]]], requires_grad=True)
    exponent = torch.tensor([power], requires_grad=True)
    weights = inverse_distance_weights(query, neighbours, exponent)
    assert_close(weights, torch.tensor([[1.0, 0, 0]]))
    (weights * torch.tensor([1.0, 2, 3])).sum().backward()
    for gradient in (query.grad, neighbours.grad, exponent.grad):
        assert gradient.isfinite().all()


def test_weights_far_away() -> None:
    """Some neighbours beyond the range of float32 weigh 0; where all are, the weights are 0 and not NaN."""
    query = torch.tensor([[0.0, 0], [1e30, 0]], requires_grad=True)
    neighbours = torch.tensor([[1.0, 0], [1e20, 0]]).expand(2, 2, 2)
    exponent = torch.tensor([3.0], requires_grad=True)
    weights = inverse_distance_weights(query, neighbours, exponent)
    assert_close(weights, torch.tensor([[1.0, 0], [0, 0]]))
    weights[:, 0].sum().backward()
    assert query.grad.isfinite().all()
    assert exponent.grad.isfinite().all()


def test_sampling_equals_einsum(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(13, (3, 7, 5, 4), generator=generator, dtype=torch.int32)
    leaves = [
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in (index.shape, index.shape[:3], (3, 13, 6))
    ]
    weights, attn, value = leaves
    output = weighted_point_sampling(index, *leaves)
    rows = value[torch.arange(3)[:, None, None, None], index.long()]
    expected = torch.einsum('bnmk,bnm,bnmkc->bnc', weights, attn, rows)
    assert_close(output, expected)
    for ours, theirs in zip(
        torch.autograd.grad(output, leaves, cotangent(output)),
        torch.autograd.grad(expected, leaves, cotangent(output)),
        strict=True,
    ):
        assert_close(ours, theirs)
    low = weighted_point_sampling(index.long(), weights.float(), attn.float(), value.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close(low.double(), expected, rtol=2e-2, atol=5e-2)
    assert weighted_point_sampling(index[:, :0], weights[:, :0], attn[:, :0], value).shape == (3, 0, 6)
    index[1, 2, 3, 0] = 13
    with pytest.raises(RuntimeError, match='out of range'):
        weighted_point_sampling(index, *leaves)


def test_points_to_image() -> None:
    pos = cells((3, 5))[torch.randperm(15)][:9].expand(2, -1, -1).clone()
    pos[1] = pos[1].flip(0)
    feat = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, 4, 3, 5, dtype=torch.float64)
    for b in range(2):
        for n in range(9):
            x, y = pos[b, n].long().tolist()
            expected[b, :, y, x] = feat[b, n].detach()
    for features in (feat, feat.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(points_to_image(features, pos, (3, 5)), expected)
        weights = torch.randn_like(expected)
        (gradient,) = torch.autograd.grad((points_to_image(features, pos, (3, 5)) * weights).sum(), feat)
        place = pos.long()
        assert torch.equal(gradient, weights[torch.arange(2)[:, None], :, place[..., 1], place[..., 0]])
    assert points_to_image(feat[:, :0], pos[:, :0], (3, 5)).shape == (2, 4, 3, 5)
    with pytest.raises(ValueError, match='outside of a canvas of height 2 and width 5'):
        points_to_image(feat, pos, (2, 5))
    with pytest.raises(ValueError, match='pos must have shape'):
        points_to_image(feat, pos[:, 1:], (3, 5))


def test_interpolating_the_grid_gives_the_grid(backend: str) -> None:
    """On a token its feature, to float32 precision: what attention masks rely on."""
    grid = cells((5, 6)).float()[None]
    feat = torch.randn(1, 30, 7)
    index = nearest(grid[0], grid[0], 4)[None]
    assert_close(inverse_distance_interpolate(feat, grid, grid, index, 3.0), feat, rtol=1e-6, atol=1e-6)
