"""Cluster attention and CLUSTEN's products: against gathers, in all dtypes, inside of PyTorch, and what is refused."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from boltz_mm.ops import cluster_attention, cluster_av, cluster_qk, use_backend
from tests.ops.cluster_cases import CASES, LEAVES, ClusterCase, make_case

CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def assert_same(ours: tuple[Tensor, dict], expected: tuple[Tensor, dict], **tolerance: float) -> None:
    assert_close(ours[0], expected[0].to(ours[0]), **tolerance)
    for name, gradient in expected[1].items():
        assert_close(ours[1][name], gradient.to(ours[1][name]), msg=lambda text, n=name: f'{n}: {text}', **tolerance)


@pytest.mark.parametrize('name', CASES)
def test_equals_gathers(name: str, backend: str) -> None:
    case = make_case(name)
    assert_same(case.run(), case.expected())
    single = make_case(name, torch.float32)
    assert_same(single.run(), single.expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_16_bits_lose_at_most_twice_what_rounding_loses(dtype: torch.dtype, backend: str) -> None:
    case = make_case('wide', dtype)
    ours, exact = case.run(), case.expected()
    assert ours[0].dtype == dtype
    for name in ('output', *LEAVES):
        result, truth = (ours[0], exact[0]) if name == 'output' else (ours[1][name], exact[1][name])
        if name == 'output' or name in LEAVES[:3]:
            rounding = (truth.to(dtype).double() - truth).abs().max()
            assert (result.double() - truth).abs().max() <= 2 * rounding + 1e-6, name
        else:
            assert_close(result.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['partial', 'single', 'global', 'plain'])
def test_gradcheck(name: str, backend: str) -> None:
    case = make_case(name, batch=1, queries=3, keys=6, depth=3, lists=None if name == 'global' else 2)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in case.leaves.values()]

    def run(*values: Tensor) -> Tensor:
        return cluster_attention(**dict(zip(case.leaves, values, strict=True)), **case.others)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize('name', ['partial', 'odd', 'more_queries'])
def test_same_bits_on_any_number_of_threads(name: str, native: None, threads: None) -> None:
    case, results = make_case(name, torch.float32, queries=333), []
    for count in (1, 2, 5, 1):
        torch.set_num_threads(count)
        output, gradients = case.run()
        results.append([output, *gradients.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_backward_in_several_chunks(native: None) -> None:
    """More probabilities than backward holds at a time, with images that begin and end inside of a chunk."""
    case = make_case('partial', torch.float32, batch=3, queries=3500, keys=1201, heads=2, depth=8, lists=16)
    assert_same(case.run(), case.expected(), rtol=1e-4, atol=1e-4)


INSTRUCTION_SETS = """
import torch
from tests.ops.cluster_cases import make_case
for name in ('partial', 'odd', 'wide', 'single', 'global'):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        case = make_case(name, dtype)
        output, gradients = case.run()
        exact, exact_gradients = case.expected()
        bound = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
        for ours, theirs in ((output, exact), *((gradients[n], exact_gradients[n]) for n in gradients)):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=bound, atol=bound)
"""


@pytest.mark.slow
@pytest.mark.parametrize('capability', ['baseline', 'avx2'])
def test_smaller_instruction_sets(capability: str, native: None) -> None:
    environment = os.environ | {'BOLTZ_MM_CPU_CAPABILITY': capability, 'BOLTZ_MM_OPS': 'native'}
    subprocess.run([sys.executable, '-c', INSTRUCTION_SETS], env=environment, check=True, timeout=120)


def test_any_strides(backend: str) -> None:
    case = make_case('partial', torch.float32)
    plain = case.run()
    for view in (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack([torch.full_like(t, math.nan), t], -1)[..., 1],
    ):
        leaves = {name: view(leaf) for name, leaf in case.leaves.items()}
        others = {k: view(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.others.items()}
        others['nearest'] = case.others['nearest'].transpose(1, 2).contiguous().transpose(1, 2)
        assert_same(ClusterCase(leaves, others).run(), plain)


def test_index_types_and_expanded_images_are_equal(backend: str) -> None:
    case = make_case('bounded', torch.float32)
    plain = case.run()
    wide = {k: v.expand(2, -1, -1) for k, v in case.others.items() if isinstance(v, Tensor)}
    assert_same(case.run(nearest=case.others['nearest'].long()), plain)
    assert_same(case.run(**wide), plain)


@pytest.mark.parametrize(
    'sizes',
    [{'batch': 0}, {'queries': 0}, {'heads': 0}, {'depth': 0}, {'lists': 0}, {'keys': 0, 'lists': None}],
    ids=['batch', 'queries', 'heads', 'depth', 'lists', 'keys'],
)
@pytest.mark.parametrize('blank', [True, False])
def test_empty(sizes: dict[str, Any], blank: bool, backend: str) -> None:
    case = make_case('partial', torch.float32, blank=blank, **sizes)
    output, gradients = case.run()
    query = case.leaves['query']
    assert output.shape == (*query.shape[:2], query.shape[2] * query.shape[3])
    if blank and output.numel():  # nothing else is seen
        assert_close(output, case.leaves['blank_value'].flatten().expand_as(output))
    assert all(gradients[name].shape == leaf.shape for name, leaf in case.leaves.items())
    assert not gradients['key'].any()
    assert not gradients['query'].any()
    if not blank:
        assert not output.any()


def test_nan_stays_with_the_queries_that_see_it(backend: str) -> None:
    case = make_case('partial', torch.float32)
    clean = case.run()[0]
    for name in ('key', 'value', 'query'):
        leaves = {k: v.clone() for k, v in case.leaves.items()}
        leaves[name][0, 9] = math.nan
        output = ClusterCase(leaves, case.others).run()[0]
        # Key 9 is in cluster 1.
        sees = torch.arange(11) == 9 if name == 'query' else (case.others['nearest'][0] == 1).any(-1)
        assert sees.any()
        assert not sees.all()
        assert output[0, sees].isnan().all()
        assert_close(output[0, ~sees], clean[0, ~sees])
        assert_close(output[1], clean[1])


def test_large_logits(backend: str) -> None:
    """Differences that exp cannot hold, and a query that a padded slot would win."""
    case = make_case('partial', torch.float32)
    case.leaves['query'] = case.leaves['query'] * 300
    assert_same(case.run(), case.expected(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize('bad', [-1, 4, 2**31 - 1])
def test_refuses_ids_out_of_range(bad: int, backend: str) -> None:
    case = make_case('partial')
    nearest = case.others['nearest'].clone()
    nearest[1, 10, 2] = bad
    with pytest.raises(RuntimeError, match='nearest is out of range'):
        case.run(nearest=nearest)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    'query_rank': ({'query': torch.zeros(2, 11, 32)}, ValueError, r'query must have shape \[B, N, H, D\]'),
    'key': ({'key': torch.zeros(2, 29, 3, 16)}, ValueError, 'key must have shape'),
    'value': ({'value': torch.zeros(2, 28, 2, 16)}, ValueError, 'value must have shape'),
    'value_type': ({'value': torch.zeros(2, 29, 2, 16, dtype=torch.int64)}, TypeError, 'int64'),
    'position': ({'key_pos': torch.zeros(2, 28, 2)}, ValueError, 'key_pos must have shape'),
    'position_batch': ({'query_pos': torch.zeros(3, 11, 2)}, ValueError, 'B = 1 or 2'),
    'nearest_type': ({'nearest': torch.zeros(2, 11, 3)}, TypeError, 'nearest must be an int32 or int64'),
    'nearest': ({'nearest': torch.zeros(2, 10, 3, dtype=torch.int32)}, ValueError, 'nearest must have shape'),
    'size': ({'cluster_size': 0}, ValueError, 'cluster_size must be at least 1, got 0'),
    'bound': ({'max_offset': -1}, ValueError, 'max_offset must not be negative'),
    'blank': ({'blank_value': None}, ValueError, 'given together'),
    'bias': ({'bias_weight': torch.zeros(2, 4)}, ValueError, 'bias_weight must have shape'),
    'device': ({'key': torch.zeros(2, 29, 2, 16, device='meta')}, ValueError, 'key is on meta'),
}


@pytest.mark.parametrize('what', REFUSED)
def test_refuses(what: str, backend: str) -> None:
    change, error, message = REFUSED[what]
    case = make_case('partial', torch.float32)
    with pytest.raises(error, match=message):
        cluster_attention(**{**case.leaves, **case.others, **change})


def _arguments(case: ClusterCase) -> tuple[Any, ...]:
    leaves, others = case.leaves, case.others
    bound = math.inf if others['max_offset'] is None else float(others['max_offset'])
    rows, parameters = (leaves[name] for name in LEAVES[:3]), (leaves.get(name) for name in LEAVES[3:])
    places = (others[name] for name in ('query_pos', 'key_pos', 'nearest', 'cluster_size'))
    return *rows, *places, *parameters, others['scale'], bound


@pytest.mark.parametrize('name', ['partial', 'plain', 'global'])
def test_opcheck(name: str, native: None) -> None:
    case = make_case(name, torch.float32)
    arguments = _arguments(case)
    needing = [a.detach().requires_grad_() if a is not None and i in (0, 1, 2, 7, 8, 9, 10) else a
               for i, a in enumerate(arguments)]  # fmt: skip
    torch.library.opcheck(torch.ops.boltz_mm.cluster_attention.default, tuple(needing), test_utils=CHECKS)
    output, normalizer = torch.ops.boltz_mm.cluster_attention(*arguments)
    backward = torch.ops.boltz_mm.cluster_attention_backward.default
    nearest = arguments[5]
    order = None if nearest is None else nearest.flatten(1).argsort(stable=True)  # which CUDA asks for
    torch.library.opcheck(backward, (torch.ones_like(output), normalizer, *arguments, order), test_utils=CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['partial', 'global'])
def test_compiles_without_a_break(name: str, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(cluster_attention, backend='aot_eager', fullgraph=True, dynamic=True)
    case = make_case(name, torch.float32)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.leaves.items()}
    output = compiled(**leaves, **case.others)
    assert_same((output, case.gradients(output, leaves)), case.run())


def test_differentiated_once(native: None) -> None:
    case = make_case('partial')
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.leaves.items()}
    output = cluster_attention(**leaves, **case.others)
    (gradient,) = torch.autograd.grad(output.sum(), [leaves['query']], create_graph=True)
    with pytest.raises(RuntimeError, match='once only'):
        gradient.sum().backward()


def test_flops(native: None) -> None:
    case = make_case('partial', torch.float32)
    with FlopCounterMode(display=False) as counter:
        case.run()
    assert counter.get_total_flops() == (4 + 10) * 2 * 11 * 2 * 24 * 16


def test_autocast_changes_nothing(backend: str) -> None:
    case = make_case('partial', torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        output = cluster_attention(**case.leaves, **case.others)
    assert_close(output, case.run()[0], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- CLUSTEN's products ----


def _rows(dtype: torch.dtype, count: int = 5, depth: int = 19) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query, attn, key = (
        torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((7, depth), (7, count), (11, depth))
    )
    index = torch.randint(10, (2, 7, count), generator=generator)  # row 10 is named by nobody
    return query, attn, key, index


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_products_equal_gathers(dtype: torch.dtype, backend: str) -> None:
    query, attn, key, index = _rows(dtype)
    around = key.double()[torch.arange(2)[:, None, None], :, index].permute(0, 3, 1, 2, 4)  # [B, H, N, K, C]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, expected in (
        (cluster_qk(query, key, index), (query.double()[:, :, :, None] * around).sum(-1)),
        (cluster_av(attn, key, index.int()), (attn.double()[..., None] * around).sum(-2)),
    ):
        assert ours.dtype == dtype
        assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_products_gradcheck(backend: str) -> None:
    query, attn, key, index = (t.requires_grad_() if t.is_floating_point() else t for t in _rows(torch.float64))
    assert torch.autograd.gradcheck(lambda q, k: cluster_qk(q, k, index), (query, key), fast_mode=True)
    assert torch.autograd.gradcheck(lambda a, v: cluster_av(a, v, index), (attn, key), fast_mode=True)


def test_products_have_all_derivatives(native: None) -> None:
    query, attn, key, index = (t.requires_grad_() if t.is_floating_point() else t for t in _rows(torch.float64))
    assert torch.autograd.gradgradcheck(lambda q, k: cluster_qk(q, k, index), (query, key), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda a, v: cluster_av(a, v, index), (attn, key), fast_mode=True)


def test_products_opcheck(native: None) -> None:
    query, attn, key, index = (t.requires_grad_() if t.is_floating_point() else t for t in _rows(torch.float32))
    for operator, arguments in (
        (torch.ops.boltz_mm.neighbor_products, (query, key, index)),
        (torch.ops.boltz_mm.neighbor_sums, (attn, key, index)),
        (torch.ops.boltz_mm.neighbor_spread, (attn, query, index, 11)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize('many', [1500, 0])
def test_products_with_any_number_of_neighbours(many: int, backend: str) -> None:
    """The official kernels leave zeros beyond 1024 neighbours, and for two channels."""
    query, attn, key, index = _rows(torch.float32, many, 2)
    products = cluster_qk(query, key, index)
    assert products.shape == (2, 3, 7, many)
    if many:
        assert_close(products[1, 2, 3, -1], (query[1, 2, 3] * key[1, 2, index[1, 3, -1]]).sum())
        assert_close(cluster_av(torch.ones_like(attn), key[..., :1] * 0 + 1, index), torch.full((2, 3, 7, 1), 1500.0))


def test_products_refuse(backend: str) -> None:
    query, attn, key, index = _rows(torch.float32)
    with pytest.raises(ValueError, match='key must have shape'):
        cluster_qk(query, key[..., :3], index)
    with pytest.raises(ValueError, match='index must have shape'):
        cluster_av(attn[..., :2], key, index)
    with pytest.raises(TypeError, match='int32 or int64'):
        cluster_qk(query, key, index.float())
    for bad in (11, -1):
        index[1, 6, 4] = bad
        with pytest.raises(RuntimeError, match='index is out of range'):
            cluster_qk(query, key, index)
        with pytest.raises(RuntimeError, match='index is out of range'):
            cluster_av(attn, key, index)


@pytest.mark.parametrize('name', ['partial', 'wide', 'global'])
def test_reference_and_native_agree(name: str, native: None) -> None:
    case = make_case(name, torch.float32, depth=32, queries=50)
    ours = case.run()
    with use_backend('reference'):
        assert_same(ours, case.run(), rtol=1e-4, atol=1e-4)
