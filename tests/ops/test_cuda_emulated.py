"""The CUDA kernels, run thread by thread on the CPU, against the PyTorch reference and the golden numbers.

This holds the formulas, the indexes, the exchange between threads and the split into lanes, slices and rows wherever
there is a C++ compiler.  What only a device can show (memory, speed, atomics, launches) is in ``test_cuda.py``.
"""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from boltz_mm import ops
from tests.ops.emulator import Call, build, compiler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason='no C++ compiler'),
]
GOLDEN = Path(__file__).resolve().parents[1] / 'data' / 'parity' / 'boxer'
SHAPES = [(6, 9), (3, 4), (1, 1)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(scope='module')
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp('emulator'))


def rand(generator: torch.Generator, *sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*sizes, generator=generator, dtype=torch.float64).to(dtype)


def make_call(
    mode: str,
    *,
    dtype: torch.dtype = torch.float64,
    depth: int = 8,
    heads: int = 3,
    batch: int = 2,
    queries: int = 5,
    size: int = 2,
    shapes: list[tuple[int, int]] | None = None,
    extras: bool = True,
    seed: int = 0,
) -> Call:
    """A call with points inside, at the borders of and outside of the levels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES if shapes is None else shapes
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    prefix = (batch, queries, heads, len(shapes))
    cells = sum(height * width for height, width in shapes)
    value = (rand(generator, batch, cells, heads, depth) - 0.5).to(dtype)
    call = Call(mode, value, shapes)
    if mode == 'points':
        call.locations = (rand(generator, *prefix, size * size, 2) * 1.6 - 0.3).to(compute)
        call.weights = rand(generator, *prefix, size * size, dtype=compute)
        return call
    centres, sizes = rand(generator, *prefix, 2) * 1.4 - 0.2, rand(generator, *prefix, 2) * 1.2 - 0.2
    call.boxes = torch.cat([centres, sizes], -1).to(compute)
    kinds = (2, 2) if mode == 'instance' else (size * size,)
    call.logits = (rand(generator, *prefix, *kinds) * 4 - 2).to(compute)
    call.grid = ops.grid_points(size, dtype=compute)
    if extras:
        call.ratios = (rand(generator, batch, len(shapes), 2) * 0.5 + 0.5).to(compute)
        if mode == 'box':
            call.angles = (rand(generator, *prefix) * 6 - 3).to(compute)
    return call


LEAVES = {'points': ('locations', 'weights'), 'box': ('boxes', 'logits', 'angles'), 'instance': ('boxes', 'logits')}


def reference(call: Call, mask: bool = False) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Leaves in float64 and the outputs of the PyTorch reference for them."""
    leaves = {name: getattr(call, name) for name in ('value', *LEAVES[call.mode])}
    leaves = {name: x.double().requires_grad_() for name, x in leaves.items() if x is not None}
    with ops.use_backend('reference'):
        if call.mode == 'points':
            return (
                leaves,
                ops.deform_attention(leaves['value'], call.shapes, leaves['locations'], leaves['weights']),
                None,
            )
        grid = call.grid.double()
        ratios = None if call.ratios is None else call.ratios.double()
        arguments = (leaves['value'], call.shapes, leaves['boxes'], leaves['logits'], grid)
        if call.mode == 'box':
            return leaves, ops.box_attention(*arguments, valid_ratios=ratios, angles=leaves.get('angles')), None
        if not mask:
            return leaves, ops.instance_attention(*arguments, valid_ratios=ratios, mask_output=False), None
        output, masks = ops.instance_attention(*arguments, valid_ratios=ratios)
        return leaves, output, masks.flatten(2, 3)


def assert_close(ours: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    expected = expected.detach()
    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(
        ours.double(), expected.double(), rtol=tolerance, atol=tolerance * scale, msg=lambda text: f'{what}: {text}'
    )


def check(library: ctypes.CDLL, call: Call, *, mask: bool = False, slices: int = 0, seed: int = 1) -> None:
    """Forward and every gradient against the reference."""
    tolerance = TOLERANCE[call.value.dtype]
    leaves, expected, expected_masks = reference(call, mask)
    output, masks, _ = call.forward(library, mask=mask, slices=slices)
    assert_close(output, expected, tolerance, 'output')
    generator = torch.Generator().manual_seed(seed)
    grad = (rand(generator, *expected.shape) - 0.5).to(call.value.dtype)
    loss, mask_grad = (expected * grad.double()).sum(), None
    if mask:
        assert_close(masks, expected_masks, tolerance, 'mask_output')
        mask_grad = (rand(generator, *expected_masks.shape) - 0.5).to(call.value.dtype)
        loss = loss + (expected_masks * mask_grad.double()).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    computed, _ = call.backward(library, grad, mask_grad, slices=slices)
    for name, gradient in zip(leaves, gradients, strict=True):
        gradient_tolerance = max(tolerance, 5e-5) if call.value.dtype != torch.float64 else tolerance
        assert_close(computed[name], gradient, gradient_tolerance, f'gradient of {name}')


MODES = [('points', False), ('box', False), ('instance', False), ('instance', True)]


@pytest.mark.parametrize(('mode', 'mask'), MODES)
@pytest.mark.parametrize('depth', [1, 2, 3, 5, 8, 32, 33, 64, 128])
def test_head_dims(library: ctypes.CDLL, mode: str, mask: bool, depth: int) -> None:
    check(library, make_call(mode, depth=depth, size=4 if mode == 'instance' else 3), mask=mask)


@pytest.mark.parametrize(('mode', 'mask'), MODES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('depth', [5, 32, 264])
def test_dtypes(library: ctypes.CDLL, mode: str, mask: bool, dtype: torch.dtype, depth: int) -> None:
    call = make_call(mode, dtype=dtype, depth=depth, queries=2, size=2)
    plan = call.forward(library, mask=mask)[2]
    assert plan.vector == (1 if depth == 5 else 16 // dtype.itemsize)
    check(library, call, mask=mask)


@pytest.mark.parametrize(('mode', 'mask'), MODES)
@pytest.mark.parametrize('slices', [1, 2, 8, 32])
@pytest.mark.parametrize('depth', [3, 16, 64])
def test_slices(library: ctypes.CDLL, mode: str, mask: bool, slices: int, depth: int) -> None:
    """A row split over a part of a warp, a warp and several warps gives the same."""
    call = make_call(mode, depth=depth, queries=2, heads=2, size=6)
    if call.forward(library, mask=mask)[2].lanes * slices > 256:
        slices = 4
    check(library, call, mask=mask, slices=slices)


@pytest.mark.parametrize(('mode', 'mask'), MODES)
def test_own_plan_splits_a_small_problem(library: ctypes.CDLL, mode: str, mask: bool) -> None:
    call = make_call(mode, depth=8, queries=1, batch=1, size=14)
    plan = call.forward(library, mask=mask)[2]
    assert plan.slices > 1 and plan.rows == 1
    check(library, call, mask=mask)


def test_plan_of_an_encoder_keeps_rows_whole_and_queries_together(library: ctypes.CDLL) -> None:
    call = make_call('box', dtype=torch.float32, depth=32, heads=8, batch=1, queries=4200)
    plan = call.forward(library)[2]
    assert (plan.vector, plan.lanes, plan.slices, plan.rows, plan.blocks) == (4, 8, 1, 32, 8 * 132)


@pytest.mark.parametrize(('mode', 'mask'), MODES)
@pytest.mark.parametrize('levels', [1, 2, 5, 9])
def test_level_counts(library: ctypes.CDLL, mode: str, mask: bool, levels: int) -> None:
    """Also more levels than lanes, levels without cells, and levels of one row or column."""
    shapes = [(4, 5), (0, 7), (1, 6), (5, 1), (2, 2), (1, 1), (3, 2), (2, 0), (1, 2)][:levels]
    check(library, make_call(mode, depth=4, shapes=shapes, size=2), mask=mask)


@pytest.mark.parametrize(('mode', 'mask'), MODES)
def test_without_ratios_and_angles(library: ctypes.CDLL, mode: str, mask: bool) -> None:
    check(library, make_call(mode, extras=False), mask=mask)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_many_turns(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    call = make_call('box', dtype=dtype)
    call.angles *= 300
    check(library, call)


@pytest.mark.parametrize(('mode', 'mask'), MODES)
def test_value_of_any_strides(library: ctypes.CDLL, mode: str, mask: bool) -> None:
    call = make_call(mode, dtype=torch.float32, depth=8)
    call.value = call.value.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert call.forward(library, mask=mask)[2].vector == 4
    check(library, call, mask=mask)
    call.value = torch.nn.functional.pad(call.value, (1, 2))[..., 1:-2]
    assert call.forward(library, mask=mask)[2].vector == 1
    check(library, call, mask=mask)
    call.value = call.value[:1].expand(2, -1, -1, -1)
    check(library, call, mask=mask)


@pytest.mark.parametrize(('mode', 'mask'), MODES)
def test_nothing_to_do(library: ctypes.CDLL, mode: str, mask: bool) -> None:
    for sizes in ({'queries': 0}, {'batch': 0}, {'heads': 0}, {'shapes': []}, {'shapes': [(0, 3)]}):
        call = make_call(mode, **sizes)
        output, masks, _ = call.forward(library, mask=mask)
        assert torch.equal(output, torch.zeros_like(output)) and torch.equal(masks, torch.zeros_like(masks))
        mask_grad = torch.ones_like(masks) if mask else None
        for name, gradient in call.backward(library, torch.ones_like(output), mask_grad)[0].items():
            assert torch.equal(gradient, torch.zeros_like(gradient)), name


@pytest.mark.parametrize(('mode', 'mask'), MODES)
def test_nan_and_infinite_places_contribute_nothing(library: ctypes.CDLL, mode: str, mask: bool) -> None:
    call = make_call(mode, extras=False)
    places = call.locations if mode == 'points' else call.boxes
    places[0, 1] = float('nan')
    places[1, 2, ..., 0] = float('inf')
    output, masks, _ = call.forward(library, mask=mask)
    assert torch.equal(output[0, 1], torch.zeros_like(output[0, 1]))
    assert output.isfinite().all() and masks.isfinite().all()
    assert_close(output, reference(call, mask)[1], 1e-11, 'output')
    mask_grad = torch.ones_like(masks) if mask else None
    gradients = call.backward(library, torch.ones_like(output), mask_grad)[0]
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_levels_that_do_not_fit_are_taken_to_be_empty(library: ctypes.CDLL) -> None:
    """The host does not read shapes that are on the device, so the kernel may not trust them."""
    call = make_call('points', shapes=[(2, 3), (4, 5)])
    expected = call.forward(library)[0]
    call.weights[:, :, :, 1] = 0
    first_only = call.forward(library)[0]
    for wrong in ([(2, 3), (5, 5)], [(2, 3), (-4, 5)], [(2, 3), (2**31, 2**33)]):
        call = make_call('points', shapes=[(2, 3), (4, 5)])
        call.shapes = wrong
        torch.testing.assert_close(call.forward(library)[0], first_only)
    assert not torch.allclose(expected, first_only)


def test_no_gradient_of_value(library: ctypes.CDLL) -> None:
    call = make_call('box')
    grad = torch.ones(2, 5, 24, dtype=torch.float64)
    with_value, _ = call.backward(library, grad)
    without, _ = call.backward(library, grad, value=False)
    assert 'value' not in without
    for name, gradient in without.items():
        assert torch.equal(gradient, with_value[name]), name


@pytest.mark.parametrize('case', ['op_box_attn_f32', 'op_box_attn_f64', 'op_box_attn_k3_f64'])
def test_golden_box_attention(library: ctypes.CDLL, case: str) -> None:
    io = load_file(GOLDEN / case / 'io.safetensors')
    call = Call('points', io['in.value'], io['in.spatial_shapes'].tolist())
    call.locations, call.weights = io['in.sampling_locations'], io['in.attention_weights'].flatten(4)
    tolerance = 1e-10 if case.endswith('f64') else 1e-5
    assert_close(call.forward(library)[0], io['out.output'], tolerance, 'output')
    gradients, _ = call.backward(library, io['in.cotangent_output'])
    assert_close(gradients['value'], io['grad.value'], tolerance, 'gradient of value')
    assert_close(gradients['locations'], io['grad.sampling_locations'], tolerance, 'gradient of locations')
    assert_close(gradients['weights'], io['grad.attention_weights'].flatten(4), tolerance, 'gradient of weights')
