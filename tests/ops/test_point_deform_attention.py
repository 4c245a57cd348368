"""Attention between points: formula, gradients, dtypes, layouts, borders, errors."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from boltz_mm.ops import point_deform_attention
from tests.ops.point_deform_cases import PointCase, cotangent, loop_attention, make_case

SIZES = {
    'usual': dict(batch=2, queries=40, heads=8, depth=32, canvas=(16, 16), sizes=(4, 16, 64), points=4),
    'one': dict(batch=1, queries=1, heads=1, depth=1, canvas=(1, 1), sizes=(1,), points=1, neighbours=1),
    'five_neighbours': dict(neighbours=5, depth=33, queries=70, power=2.7),
    'one_neighbour': dict(neighbours=1, depth=64, power=2.0),
    'wide': dict(depth=130, heads=1, batch=1, power=1.0),
    'many_samples': dict(points=150, queries=2, sizes=(7, 9, 5)),
    'weak_power': dict(power=1.3),
    'odd_batch': dict(batch=17, queries=2, depth=4, sizes=(5, 6, 4, 9)),
}


def test_equals_loops(backend: str) -> None:
    for power in (3.0, 2.6):
        case = make_case(power=power)
        assert_close(case.function(*case.leaves.values()), loop_attention(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('size', SIZES)
def test_equals_gathers(size: str, backend: str) -> None:
    case = make_case(**SIZES[size])
    for ours, expected in zip(case.run(), case.gathered(torch.float64), strict=True):
        assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('power', [3.0, 2.0, 3.1])
def test_float32_is_as_near_as_the_gathers(power: float, backend: str) -> None:
    case = make_case(torch.float32, **SIZES['usual'] | dict(power=power))
    exact, plain = case.gathered(torch.float64), case.gathered(torch.float32)
    # The gradient of the power is one sum of 30,000 products, whose rounding is a matter of luck.
    for ours, expected, theirs, slack in zip(case.run(), exact, plain, (1e-6,) * 4 + (5e-5,), strict=True):
        assert _worst(ours, expected) <= 2 * _worst(theirs, expected) + slack


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_off(dtype: torch.dtype, backend: str) -> None:
    case = make_case(dtype, **SIZES['usual'])
    results = case.run()
    assert [r.dtype for r in results] == [dtype, *(leaf.dtype for leaf in case.leaves.values())]
    # Only value is of the low dtype in the plain form too: rounded places would be in other cells.
    mixed = case.gathered(torch.float32)
    low = [mixed[0].to(dtype), mixed[1].to(dtype), *mixed[2:]]
    for ours, expected, theirs in zip(results, case.gathered(torch.float64), low, strict=True):
        assert _worst(ours, expected) <= 2 * _worst(theirs, expected) + 1e-6


def _worst(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach().double()).abs().max())


@pytest.mark.parametrize('power', [3.0, 2.6])
def test_gradcheck(power: float, backend: str) -> None:
    case = make_case(queries=2, depth=2, points=2, power=power)
    # Off the tokens, where differences are not what they are at a distance.
    offsets = case.leaves['offsets'] + 0.23
    offsets = torch.where((offsets - offsets.round()).abs() > 0.4, offsets - 0.2, offsets)
    case = case.with_leaves(offsets=offsets)
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    assert torch.autograd.gradcheck(case.function, leaves, eps=1e-7, atol=1e-4, rtol=1e-3)


def test_fixed_power_and_query_positions(backend: str) -> None:
    case = make_case(power=2.0)
    expected = case.run()
    leaves = [case.leaves[name].detach().requires_grad_() for name in ('value', 'offsets', 'logits')]
    query_pos = case.query_pos.clone().requires_grad_()
    moved = replace(case, query_pos=query_pos)
    output = moved.function(*leaves, 2)
    output.backward(cotangent(expected[0]))
    assert_close(output, expected[0])
    for leaf, gradient in zip(leaves, expected[1:4], strict=True):
        assert_close(leaf.grad, gradient)
    assert_close(query_pos.grad, expected[2].sum((2, 3, 4)))


def test_gradients_of_some_inputs_alone(backend: str) -> None:
    case = make_case()
    expected = case.run()
    for chosen in range(4):
        leaves = [leaf.detach().requires_grad_(i == chosen) for i, leaf in enumerate(case.leaves.values())]
        output = case.function(*leaves)
        output.backward(cotangent(output))
        assert [leaf.grad is not None for leaf in leaves] == [i == chosen for i in range(4)]
        assert_close(leaves[chosen].grad, expected[chosen + 1])


def _level(token_x: list[float], offset: float, width: int = 64, power: float = 3.0) -> PointCase:
    """One query at x = 0 on a canvas of one row, and tokens all of which are neighbours of all cells."""
    count = len(token_x)
    positions = torch.tensor([[[x, 0.0] for x in token_x]])
    tables = torch.arange(count).expand(1, 1, width, count)
    leaves = {
        'value': torch.eye(count).view(1, count, 1, count),
        'offsets': torch.tensor([offset, 0.0]).view(1, 1, 1, 1, 1, 2),
        'logits': torch.zeros(1, 1, 1, 1, 1),
        'power': torch.tensor([power]),
    }
    return PointCase((1, width), (count,), positions, tables, torch.zeros(1, 1, 2), leaves)


def test_halves_round_to_even(backend: str) -> None:
    tables = torch.arange(5).view(1, 1, 5, 1)
    for x, expected in ((0.5, 0), (1.5, 2), (2.5, 2), (3.5, 4), (-0.5, 0), (-7.0, 0), (4.5, 4), (1e9, 4), (1e30, 4)):
        case = _level([0, 1, 2, 3, 4], x, power=1.0)
        case.canvas, case.tables = (1, 5), tables
        output = case.function(*case.leaves.values())
        # At 1e30 the distance is beyond the range of float32: nothing is left to be added.
        assert_close(output[0, 0], torch.eye(5)[expected] * (x < 1e20))


@pytest.mark.parametrize('power', [3.0, 2.6, 1.0, 0.5])
def test_sample_on_a_token(power: float, backend: str) -> None:
    """It is the token; nothing flows to the place or, from that token, to the power, for any power."""
    case = _level([3, 0, 9, 20], 3.0, power=power)
    output, value, offsets, _, power_gradient = case.run()
    assert_close(output[0, 0], torch.eye(4)[0])
    assert value.isfinite().all()
    assert power_gradient.isfinite().all()
    assert_close(offsets, torch.zeros_like(offsets), rtol=0, atol=1e-6)


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e30, 1e8])
def test_places_that_are_no_places(bad: float, backend: str) -> None:
    """A sample that is not finite, or beyond the range of d^3 in float32, adds nothing; no gradient is NaN."""
    case = make_case(torch.float32)
    offsets = case.leaves['offsets'].clone()
    offsets[0, 1, :, 0, 1] = bad
    results = case.with_leaves(offsets=offsets).run()
    assert all(result.isfinite().all() for result in results)
    assert not results[2][0, 1, :, 0, 1].any()
    # The sample keeps its part of the softmax.
    exact = make_case(torch.float32)
    weights = exact.leaves['logits'][0, 1].flatten(1).double().softmax(-1).view(2, 2, 3)
    assert_close(results[0][0, 0], exact.run()[0][0, 0])
    assert float(weights[:, 0, 1].min()) > 1e-3
    assert _worst(results[0][0, 1], exact.run()[0][0, 1]) > 1e-3


def test_nan_in_logits_is_not_hidden(backend: str) -> None:
    case = make_case(torch.float32)
    case.leaves['logits'][0, 1] = math.nan
    output = case.function(*case.leaves.values())
    assert output[0, 1].isnan().all()
    assert output[0, 0].isfinite().all()


@pytest.mark.parametrize('bad', [-1, 12, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize('dtype', [torch.int32, torch.int64])
def test_a_table_with_other_entries_raises(bad: int, dtype: torch.dtype, backend: str) -> None:
    case = make_case()
    case.tables = case.tables.to(dtype)
    case.tables[1, 1, 5, 2] = bad
    with pytest.raises(RuntimeError, match='tables must hold tokens of their level: level 1 has 12 tokens'):
        case.function(*case.leaves.values())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_any_strides_and_index_types(dtype: torch.dtype, backend: str) -> None:
    case = make_case(dtype)
    plain = case.run()

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def strided(t: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(t), t], -1)[..., 1]

    def swapped(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    for view in (transposed, strided, swapped):
        leaves = {name: leaf if name == 'power' else view(leaf) for name, leaf in case.leaves.items()}
        moved = PointCase(
            case.canvas, case.sizes, view(case.positions), view(case.tables.int()), view(case.query_pos), leaves
        )
        for ours, expected in zip(moved.run(), plain, strict=True):
            assert_close(ours, expected)


def test_constants_shared_by_the_images(backend: str) -> None:
    case = make_case()
    first = replace(case, positions=case.positions[:1], tables=case.tables[:1], query_pos=case.query_pos[:1])
    copies = [x.expand(2, *x.shape[1:]).contiguous() for x in (first.positions, first.tables, first.query_pos)]
    for ours, expected in zip(
        first.run(), replace(case, positions=copies[0], tables=copies[1], query_pos=copies[2]).run(), strict=True
    ):
        assert_close(ours, expected)


@pytest.mark.parametrize(
    'sizes', [dict(batch=0), dict(queries=0), dict(heads=0), dict(sizes=()), dict(points=0), dict(depth=0)], ids=str
)
def test_empty(sizes: dict, backend: str) -> None:
    case = make_case(**sizes)
    output, *gradients = case.run()
    batch, _, heads, depth = case.leaves['value'].shape
    assert output.shape == (batch, sizes.get('queries', 5), heads * depth)
    assert not output.any()
    for leaf, gradient in zip(case.leaves.values(), gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


def test_same_bits_on_any_number_of_threads(native: None, threads: None) -> None:
    case = make_case(torch.float32, queries=150, heads=3, depth=8, power=3.1)
    results = []
    for count in (1, 2, 3, 16, 1):
        torch.set_num_threads(count)
        results.append(case.run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_changes_nothing(backend: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        case = make_case(dtype)
        plain = case.run()
        with torch.autocast('cpu', torch.bfloat16):
            cast = case.run()
        for ours, expected in zip(cast, plain, strict=True):
            assert_close(ours, expected, rtol=0, atol=0)


def test_errors(backend: str) -> None:
    case = make_case()
    value, offsets, logits, power = case.leaves.values()

    def call(**changed: object) -> Tensor:
        arguments = dict(value=value, positions=case.positions, level_sizes=case.sizes, tables=case.tables,
                         canvas=case.canvas, query_pos=case.query_pos, offsets=offsets, logits=logits,
                         power=power)  # fmt: skip
        return point_deform_attention(**(arguments | changed))

    wrong = {
        r'level_sizes \[7, 11\] must add up to the 19 tokens': dict(level_sizes=[7, 11]),
        'canvas must be a positive': dict(canvas=(0, 9)),
        r'tables must have shape \[B, L, h \* w, K\] = \[2, 2, 45, 4\]': dict(canvas=(5, 9)),
        r'offsets must have shape \[B, N, H, L, P, 2\]': dict(offsets=offsets[..., 0]),
        'logits must have shape': dict(logits=logits[..., :1]),
        'positions must have shape': dict(positions=case.positions[:, 1:]),
        'query_pos must have shape': dict(query_pos=case.query_pos[:, 1:]),
        'power must have one element': dict(power=power.expand(2)),
    }
    for message, changed in wrong.items():
        with pytest.raises(ValueError, match=message):
            call(**changed)
    for message, changed in {
        'tables must be int64 or int32': dict(tables=case.tables.float()),
        'power must be a number': dict(power='3'),
        'offsets must be float64': dict(offsets=offsets.long()),
    }.items():
        with pytest.raises(TypeError, match=message):
            call(**changed)
