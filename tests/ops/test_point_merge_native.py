"""The native ``point_merge`` and ``cluster_wf`` inside of PyTorch: opcheck, compile, vmap, FLOPs, threads, variants."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from boltz_mm import ops
from tests.ops.test_point_merge import KINDS, MergeCase, make_case

pytestmark = pytest.mark.usefixtures('native')
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def _arguments(case: MergeCase, requires_grad: bool) -> tuple:
    leaves = {k: v.detach().requires_grad_(requires_grad) for k, v in case.leaves.items()}
    if case.kind == 'given':
        return torch.ops.boltz_mm.cluster_wf, (leaves['weights'], leaves['feat'], case.rows)
    nearest, size = case.kwargs.get('nearest'), case.kwargs.get('cluster_size', 1)
    parameters = [leaves[name] for name in ('weight', 'bias', 'norm_weight', 'norm_bias')]
    return torch.ops.boltz_mm.point_merge, (
        leaves['feat'],
        case.kwargs['query_pos'],
        case.kwargs['key_pos'],
        case.rows if nearest is None else nearest,
        size,
        *parameters,
        1e-5,
        leaves.get('importance'),
        case.kwargs.get('sign', 1),
        case.kwargs.get('max_offset'),
    )


@pytest.mark.parametrize('kind', ['given', 'clusters', 'rows'])
@pytest.mark.parametrize(('dtype', 'requires_grad'), [(torch.float32, True), (torch.bfloat16, False)])
def test_opcheck(kind: str, dtype: torch.dtype, requires_grad: bool) -> None:
    case = make_case(kind, dtype, shared=True, importance=requires_grad)
    operator, arguments = _arguments(case, requires_grad)
    torch.library.opcheck(operator.default, arguments, test_utils=CHECKS)
    if not requires_grad:
        backward = getattr(torch.ops.boltz_mm, f'{operator.__name__}_backward')
        torch.library.opcheck(
            backward.default, (torch.ones_like(operator(*arguments)), *arguments, None), test_utils=CHECKS
        )


@pytest.mark.parametrize('kind', KINDS)
def test_compiles_to_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    case = make_case(kind, torch.float32)
    compiled = torch.compile(case.function(), backend='aot_eager', fullgraph=True)
    for ours, expected in zip(case.run(compiled), case.run(), strict=True):
        assert_close(ours, expected)


def test_compiles_to_one_graph_on_the_reference() -> None:
    torch._dynamo.reset()
    case = make_case('clusters', torch.float32)
    expected = case.run()
    with ops.use_backend('reference'):
        compiled = torch.compile(case.function(), backend='aot_eager', fullgraph=True)
        for ours, theirs in zip(case.run(compiled), expected, strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_second_derivative_is_refused(kind: str) -> None:
    case = make_case(kind)
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    (grad,) = torch.autograd.grad(case.function()(*leaves).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated once only'):
        grad.sum().backward()


@pytest.mark.parametrize('kind', KINDS)
def test_same_bits_on_any_number_of_threads(kind: str, threads: None) -> None:
    case = make_case(kind, torch.float32, rows=205, points=150, channels=20)
    results = []
    for count in (1, 2, 5, 1):
        torch.set_num_threads(count)
        results.append(case.run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('capability', ['baseline', 'avx2'])
def test_smaller_instruction_sets(capability: str) -> None:
    """The other variants in the library hold the same tests."""
    chosen = 'test_equals_gathers and native and (inner4 or inner9 or many_points) or test_float32 or test_low'
    subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/ops/test_point_merge.py', '-k', chosen],
        env={**os.environ, 'BOLTZ_MM_CPU_CAPABILITY': capability},
        check=True,
        timeout=300,
    )


def test_vmap_folds_into_the_batch() -> None:
    case = make_case('clusters', torch.float32, batch=6)
    given = {k: v.unflatten(0, (3, 2)) for k, v in case.kwargs.items() if isinstance(v, torch.Tensor)}
    names = ('feat', 'importance')
    constant = {k: v for k, v in case.leaves.items() if k not in names} | {'cluster_size': case.kwargs['cluster_size']}

    def run(feat: torch.Tensor, importance: torch.Tensor, given: dict) -> torch.Tensor:
        return ops.point_merge(feat, importance=importance, **given, **constant)

    mapped = [case.leaves[name].unflatten(0, (3, 2)) for name in names]
    assert_close(torch.vmap(run)(*mapped, given).flatten(0, 1), case.run()[0])


def test_flops_and_shapes_on_meta() -> None:
    case = make_case('clusters', torch.float32, points=5, count=2, cluster_size=4, channels=5, inner=3)
    with FlopCounterMode(display=False) as counter:
        case.run()
    assert counter.get_total_flops() == 3 * 2 * (2 * 5 * 8 * 3 * 5)
    with FlopCounterMode(display=False) as counter:
        make_case('all', torch.float32).run()
    assert counter.get_total_flops() == 3 * 2 * (2 * 5 * 11 * 3 * 5)
    leaves = {k: v.to('meta') for k, v in case.leaves.items()}
    kwargs = {k: v.to('meta') if isinstance(v, torch.Tensor) else v for k, v in case.kwargs.items()}
    assert ops.point_merge(**leaves, **kwargs).shape == (2, 5, 15)


def test_only_inputs_are_kept_for_backward() -> None:
    """Nothing of the size of the neighbours times channels, nor of the weights, is saved."""
    case = make_case('clusters', torch.float32, points=300, count=6, rows=200, channels=16, inner=4)
    saved: list[int] = []
    leaves = {k: v.detach().requires_grad_() for k, v in case.leaves.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ops.point_merge(**leaves, **case.kwargs)
    assert max(saved) == case.leaves['feat'].numel()
