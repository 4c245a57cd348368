"""What every operator promises, held for each of them on each backend."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.ops.cases import NAMES, OpCase, gather_reference, loop_reference, make_case

EXTREMES = {
    'one_cell': dict(shapes=((1, 1),), queries=1, heads=1, batch=1, depth=1),
    'one_row': dict(shapes=((1, 9), (7, 1)), heads=1, depth=3),
    'empty_levels': dict(shapes=((0, 3), (4, 5), (2, 0))),
    'depth32': dict(depth=32),
    'depth33': dict(depth=33, queries=5),
    'depth64': dict(depth=64, heads=1),
    'depth128': dict(depth=128, heads=1, batch=1),
    'large_grid': dict(size=34, queries=2, depth=4),
    'many_queries': dict(queries=301, heads=3, depth=8),
    'odd_batch': dict(batch=33, queries=2, depth=4),
    'no_ratios': dict(ratios=False),
}


@pytest.mark.parametrize('name', NAMES)
def test_forward_equals_loops(name: str, backend: str) -> None:
    case = make_case(name)
    for ours, expected in zip(case.run()[0], loop_reference(case), strict=True):
        assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('extreme', EXTREMES)
def test_equals_gathers(name: str, extreme: str, backend: str) -> None:
    case = make_case(name, **EXTREMES[extreme])
    outputs, gradients = case.run()
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    expected = gather_reference(case, leaves, torch.float64)
    expected_gradients = torch.autograd.grad(expected, leaves, case.cotangents(expected))
    for ours, theirs in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', NAMES)
def test_gradcheck(name: str, backend: str) -> None:
    case = make_case(name, queries=2, depth=2, shapes=((3, 4), (2, 2)))
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    assert torch.autograd.gradcheck(case.function(), leaves, fast_mode=False)


@pytest.mark.parametrize('name', NAMES)
def test_second_derivative_is_refused(name: str, native: None) -> None:
    case = make_case(name)
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    output = case.function()(*leaves)[0].sum()
    (grad,) = torch.autograd.grad(output, leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated once only'):
        grad.sum().backward()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('skipped', [0, 1, 2])
def test_gradients_of_some_inputs_alone(name: str, skipped: int, backend: str) -> None:
    case = make_case(name)
    _, all_gradients = case.run()
    leaves = [leaf.detach().requires_grad_(i != skipped) for i, leaf in enumerate(case.leaves.values())]
    outputs = case.function()(*leaves)
    torch.autograd.backward(outputs, case.cotangents(outputs))
    for i, (leaf, expected) in enumerate(zip(leaves, all_gradients, strict=True)):
        if i == skipped:
            assert leaf.grad is None
        else:
            assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)


def test_one_output_of_instance_attention_alone(backend: str) -> None:
    case = make_case('instance')
    for chosen in (0, 1):
        leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
        outputs = case.function()(*leaves)
        ours = torch.autograd.grad(outputs[chosen], leaves, case.cotangents(outputs)[chosen])
        plain = gather_reference(case, leaves, torch.float64)
        expected = torch.autograd.grad(plain[chosen], leaves, case.cotangents(outputs)[chosen])
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, b, rtol=1e-10, atol=1e-10)


def _worst(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach().double()).abs().max())


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_off(name: str, dtype: torch.dtype, backend: str) -> None:
    case = make_case(name, dtype, depth=32, queries=20, shapes=((16, 20), (8, 10)))
    outputs, gradients = case.run()
    assert all(output.dtype == dtype for output in outputs)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in case.leaves.values()]

    def plain(precision: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
        results = gather_reference(case, leaves, precision)
        cotangents = [c.to(dtype).to(precision) for c in case.cotangents(outputs)]
        return (*results, *torch.autograd.grad(results, leaves, cotangents))

    for ours, exact, low in zip((*outputs, *gradients), plain(torch.float32), plain(dtype), strict=True):
        assert _worst(ours, exact) <= 2 * _worst(low, exact) + 1e-6


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_any_strides(name: str, dtype: torch.dtype, backend: str) -> None:
    case = make_case(name, dtype)
    plain = case.run()

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def offset(t: Tensor) -> Tensor:
        return torch.cat([t.new_full((1, *t.shape[1:]), math.nan), t])[1:]

    def strided(t: Tensor) -> Tensor:
        return torch.stack([torch.full_like(t, math.nan), t], -1)[..., 1]

    def swapped(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    for view in (transposed, offset, strided, swapped):
        moved = OpCase(case.name, case.shapes, {k: view(v) for k, v in case.leaves.items()}, case.points, case.ratios)
        outputs, gradients = moved.run()
        for ours, expected in zip((*outputs, *gradients), (*plain[0], *plain[1]), strict=True):
            assert_close(ours, expected)


@pytest.mark.parametrize('name', NAMES)
def test_expanded_inputs(name: str, backend: str) -> None:
    case = make_case(name, batch=1)
    wide = {k: v.expand(3, *v.shape[1:]) for k, v in case.leaves.items()}
    ratios = case.ratios.expand(3, -1, -1)
    outputs, _ = OpCase(case.name, case.shapes, wide, case.points, ratios).run(gradients=False)
    for ours, expected in zip(outputs, case.run()[0], strict=True):
        assert_close(ours, expected.expand_as(ours))
    # A gradient that is one number for all elements, as of a sum.
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    torch.autograd.backward([output.sum() for output in case.function()(*leaves)])
    contiguous = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    results = case.function()(*contiguous)
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    for a, b in zip(leaves, contiguous, strict=True):
        assert_close(a.grad, b.grad)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
    'sizes',
    [dict(batch=0), dict(queries=0), dict(heads=0), dict(shapes=()), dict(shapes=((0, 0), (3, 0))), dict(depth=0)],
    ids=['batch', 'queries', 'heads', 'levels', 'cells', 'depth'],
)
def test_empty(name: str, sizes: dict, backend: str) -> None:
    case = make_case(name, **sizes)
    outputs, gradients = case.run()
    queries, (batch, _, heads, depth) = sizes.get('queries', 3), case.leaves['value'].shape
    assert outputs[0].shape == (batch, queries, heads * depth)
    if name == 'instance':
        assert outputs[1].shape == (batch, queries, 2, 2, heads * depth)
    assert all(not output.any() for output in outputs)
    for leaf, gradient in zip(case.leaves.values(), gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_places_that_are_no_places(name: str, bad: float, backend: str) -> None:
    """A query whose points are nowhere gets 0; its neighbours and all gradients stay what they were."""
    case = make_case(name, torch.float32)
    place = 'locations' if name == 'deform' else 'boxes'
    moved = OpCase(name, case.shapes, dict(case.leaves), case.points, case.ratios)
    moved.leaves[place] = case.leaves[place].clone()
    moved.leaves[place][0, 1] = bad
    for ours, expected in zip(moved.run()[0], case.run()[0], strict=True):
        assert not ours[0, 1].any()
        ours[0, 1] = expected[0, 1] = 0
        assert_close(ours, expected)
    gradients = moved.run()[1]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][0, 1].any()


@pytest.mark.parametrize('name', NAMES)
def test_same_bits_on_any_number_of_threads(name: str, native: None, threads: None) -> None:
    # Large enough to be copied head by head, and cut into several tasks.
    case = make_case(name, torch.float32, queries=150, heads=3, depth=8)
    results = []
    for count in (1, 2, 3, 8, 16, 1):  # 16 is more than twice the maps: nothing is copied
        torch.set_num_threads(count)
        outputs, gradients = case.run()
        results.append((*outputs, *gradients))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize('name', NAMES)
def test_runs_where_determinism_is_demanded(name: str, native: None) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        make_case(name, torch.float32).run()
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize('name', NAMES)
def test_autocast_keeps_dtypes(name: str, backend: str) -> None:
    """Nothing is cast: a bfloat16 value (of a linear layer) and float32 boxes give a bfloat16 output."""
    for dtype in (torch.bfloat16, torch.float32):
        case = make_case(name, dtype, size=4)
        outputs, gradients = case.run()
        with torch.autocast('cpu', torch.bfloat16):
            cast_outputs, cast_gradients = case.run()
        assert all(output.dtype == dtype for output in cast_outputs)
        for ours, expected in zip((*cast_outputs, *cast_gradients), (*outputs, *gradients), strict=True):
            assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize('name', NAMES)
def test_mixed_dtypes_compute_in_the_dtype_of_value(name: str, backend: str) -> None:
    case = make_case(name, torch.float32)
    second = list(case.leaves)[2]
    mixed = OpCase(name, case.shapes, case.leaves | {second: case.leaves[second].double()}, case.points, case.ratios)
    outputs, gradients = mixed.run()
    assert outputs[0].dtype == torch.float32
    assert gradients[2].dtype == torch.float64
    for ours, expected in zip(outputs, case.run()[0], strict=True):
        assert_close(ours, expected)
