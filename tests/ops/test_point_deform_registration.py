"""The operators between points inside of PyTorch: opcheck, compile, vmap, FLOP counts, memory, instruction sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import boltz_mm
from boltz_mm.ops import _deterministic, inverse_distance_interpolate, point_interpolate, use_backend
from tests.ops.point_deform_cases import PointCase, cotangent, interpolation, make_case, run_interpolation
from tools.benchmark.timing import extra_bytes

pytestmark = pytest.mark.usefixtures('native')
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.boltz_mm


def _arguments(case: PointCase, requires_grad: bool = False) -> tuple:
    value, *rest = [leaf.detach().requires_grad_(requires_grad) for leaf in case.leaves.values()]
    return value, case.positions, list(case.sizes), case.tables, *case.canvas, case.query_pos, *rest


def test_opcheck() -> None:
    arguments = _arguments(make_case(torch.float32), requires_grad=True)
    torch.library.opcheck(OPS.point_deform_attention.default, arguments, test_utils=CHECKS)
    given = interpolation(torch.float32)
    leaves = [x.requires_grad_(name in ('feat', 'power')) for name, x in given.items()]
    torch.library.opcheck(OPS.inverse_distance_interpolate.default, leaves, test_utils=CHECKS)


@pytest.mark.parametrize('needed', [True, False])
def test_opcheck_backward(needed: bool) -> None:
    arguments = _arguments(make_case(torch.float32))
    grad = torch.ones_like(OPS.point_deform_attention(*arguments))
    backward = OPS.point_deform_attention_backward.default
    torch.library.opcheck(backward, (grad, *arguments, needed, needed), test_utils=CHECKS)
    leaves = list(interpolation(torch.float32).values())
    grad = torch.ones_like(OPS.inverse_distance_interpolate(*leaves))
    backward = OPS.inverse_distance_interpolate_backward.default
    torch.library.opcheck(backward, (grad, *leaves, needed, needed), test_utils=CHECKS)


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    case, given = make_case(torch.float32), interpolation(torch.float32)
    constants = {name: given[name] for name in ('pos', 'query_pos', 'index')}

    def both(value: Tensor, offsets: Tensor, logits: Tensor, power: Tensor, feat: Tensor) -> tuple[Tensor, Tensor]:
        first = case.function(value, offsets, logits, power)
        return first, inverse_distance_interpolate(feat, **constants, power=power)

    compiled = torch.compile(both, backend='aot_eager', fullgraph=True)
    results = []
    for function in (compiled, both):
        leaves = [x.detach().clone().requires_grad_() for x in (*case.leaves.values(), given['feat'])]
        outputs = function(*leaves)
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, [cotangent(o) for o in outputs])))
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected)


def test_vmap() -> None:
    cases = [make_case(torch.float32, seed=seed) for seed in (0, 1, 2)]
    power = cases[0].leaves['power']
    stacked = [torch.stack([c.leaves[name] for c in cases]) for name in ('value', 'offsets', 'logits')]
    mapped = torch.vmap(lambda *leaves: cases[0].function(*leaves, power))(*stacked)
    for index in range(3):
        assert_close(mapped[index], cases[0].function(*(leaf[index] for leaf in stacked), power))


def test_second_derivative_is_refused() -> None:
    case = make_case()
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    (grad,) = torch.autograd.grad(case.function(*leaves).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated once only'):
        grad.sum().backward()


def test_flops() -> None:
    case, given = make_case(torch.float32), interpolation(torch.float32)
    # B N H L P K D, and B N k C
    samples, channels = 2 * 5 * 2 * 2 * 3 * 4 * 5, 2 * 11 * 4 * 5
    for run, forward in ((case.run, 2 * samples), (lambda: run_interpolation(given), 2 * channels)):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == 3 * forward


def test_backward_holds_inputs_and_gradients_alone() -> None:
    """Far less memory than one gathered row of value for each neighbour of each sample takes."""
    case = make_case(torch.float32, batch=1, queries=500, heads=8, depth=32, canvas=(16, 16), sizes=(16, 64), points=4)
    gathered = 500 * 8 * 2 * 4 * 4 * 32 * 4
    gradients = sum(leaf.nbytes for leaf in case.leaves.values())
    assert extra_bytes(case.run, 'cpu') < 3 * gradients + 2**20 < gathered / 4


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_gradients_added_up_in_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes the place of the kernels on CUDA where deterministic algorithms are asked for."""
    case, given = make_case(dtype), interpolation(dtype)
    expected = [*case.run(), *run_interpolation(given)]
    monkeypatch.setattr(_deterministic, 'needed', lambda value: True)
    monkeypatch.setattr(point_interpolate, '_ELEMENTS', 4000)  # several parts
    for ours, theirs in zip([*case.run(), *run_interpolation(given)], expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize('capability', ['baseline', 'avx2', 'avx512'])
def test_every_instruction_set_gives_the_same(capability: str, tmp_path: Path) -> None:
    """Smaller instruction sets are run in a process of their own; a larger one than there is falls back."""
    code = f"""
import torch
from tests.ops.point_deform_cases import interpolation, make_case, run_interpolation
torch.save([(dtype, power, make_case(dtype, depth=45, power=power).run(),
             run_interpolation(interpolation(dtype, channels=77, power=power)))
            for dtype in {list(DTYPES)} for power in (3.0, 2.6)], {str(tmp_path / 'results.pt')!r})
"""
    root = Path(boltz_mm.__file__).parents[1]
    environment = os.environ | {'BOLTZ_MM_CPU_CAPABILITY': capability, 'BOLTZ_MM_OPS': 'native'}
    environment['PYTHONPATH'] = os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])])
    subprocess.run([sys.executable, '-c', code], check=True, env=environment, cwd=root, timeout=300)
    for dtype, power, attention, interpolated in torch.load(tmp_path / 'results.pt'):
        with use_backend('reference'):
            expected = make_case(dtype, depth=45, power=power).run()
            expected += run_interpolation(interpolation(dtype, channels=77, power=power))
        low = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
        for ours, theirs in zip([*attention, *interpolated], expected, strict=True):
            scale = 1 + float(theirs.detach().abs().max())
            assert_close(ours.detach(), theirs.detach(), rtol=low, atol=low * scale)


def test_kernels_check_for_themselves() -> None:
    """The operators of ``torch.ops`` raise before they read."""
    value, positions, sizes, tables, height, width, *rest = _arguments(make_case(torch.float32))
    given = interpolation(torch.float32)
    feat, pos, query, index, power = given.values()
    calls = [
        lambda: OPS.point_deform_attention(value, positions, [7, 13], tables, height, width, *rest),
        lambda: OPS.point_deform_attention(value, positions, [-7, 26], tables, height, width, *rest),
        lambda: OPS.point_deform_attention(value, positions, sizes, tables[:1], height, width, *rest),
        lambda: OPS.point_deform_attention(value, positions, sizes, tables, height + 1, width, *rest),
        lambda: OPS.point_deform_attention(value, positions, sizes, tables, 2**31, 2**31, *rest),
        lambda: OPS.point_deform_attention(value, positions.double(), sizes, tables, height, width, *rest),
        lambda: OPS.point_deform_attention(value[0], positions, sizes, tables, height, width, *rest),
        lambda: OPS.point_deform_attention(value, positions, sizes, tables.half(), height, width, *rest),
        lambda: OPS.inverse_distance_interpolate(feat, pos, query, index + 9, power),
        lambda: OPS.inverse_distance_interpolate(feat, pos[:, 1:], query, index, power),
        lambda: OPS.inverse_distance_interpolate(feat, pos, query, index, power.expand(2)),
        lambda: OPS.inverse_distance_interpolate_backward(feat, feat, pos, query, index, power, True, True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r'must|add up'):
            call()
