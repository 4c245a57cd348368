"""Cluster attention on a CUDA device against the formula with gathers, on the CPU and in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from boltz_mm.ops import _backend, use_backend
from tests.ops.cluster_cases import CASES, ClusterCase, make_case
from tests.ops.test_cluster_attention import CHECKS, _arguments, assert_same

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def built() -> None:
    if 'cuda' not in _backend._loaded_devices:
        pytest.fail(
            'the CUDA library is not built or does not load: BOLTZ_MM_CUDA=1 python setup.py build_ext --inplace'
        )


def on_cuda(case: ClusterCase) -> ClusterCase:
    others = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in case.others.items()}
    return ClusterCase({name: leaf.cuda() for name, leaf in case.leaves.items()}, others)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_equals_gathers(name: str, dtype: torch.dtype) -> None:
    case, bound = make_case(name, dtype, queries=70), TOLERANCE[dtype]
    assert_same(on_cuda(case).run(), case.expected(), rtol=bound, atol=bound)


@pytest.mark.parametrize('depth', [1, 3, 8, 17, 24, 32, 48, 64, 65, 128, 300])
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_head_widths(depth: int, dtype: torch.dtype) -> None:
    bound = TOLERANCE[dtype]
    for name in ('partial', 'global'):
        case = make_case(name, dtype, depth=depth, keys=77, scale=depth**-0.5)
        assert_same(on_cuda(case).run(), case.expected(), rtol=bound, atol=bound)


@pytest.mark.parametrize('sizes', [{'queries': 40000, 'heads': 3, 'lists': 6}, {'queries': 700, 'batch': 300}])
def test_more_than_65535_rows(sizes: dict[str, int]) -> None:
    """Many blocks, parts and sections, against the reference on the device."""
    case = on_cuda(make_case('partial', torch.float32, keys=4001, depth=32, scale=0.2, **sizes))
    ours = case.run()
    with use_backend('reference'):
        assert_same(ours, case.run(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    'sizes',
    [{'batch': 0}, {'queries': 0}, {'heads': 0}, {'depth': 0}, {'lists': 0}, {'keys': 0, 'lists': None}],
    ids=['batch', 'queries', 'heads', 'depth', 'lists', 'keys'],
)
@pytest.mark.parametrize('blank', [True, False])
def test_empty(sizes: dict[str, Any], blank: bool) -> None:
    case = make_case('partial', torch.float32, blank=blank, **sizes)
    assert_same(on_cuda(case).run(), case.run())


def test_any_strides() -> None:
    case = on_cuda(make_case('partial', torch.float32))
    plain = case.run()
    leaves = {name: leaf.transpose(0, -1).contiguous().transpose(0, -1) for name, leaf in case.leaves.items()}
    assert_same(ClusterCase(leaves, case.others).run(), plain)


def test_ids_out_of_range_count_as_nothing() -> None:
    case = on_cuda(make_case('partial'))
    nearest = case.others['nearest'].long()
    outside = torch.tensor([-1, 4, 2**62], device='cuda').expand(*nearest.shape[:2], 3)
    assert_same(case.run(nearest=torch.cat([outside, nearest], -1)), case.run())


def test_nan_stays_with_the_queries_that_see_it() -> None:
    case = on_cuda(make_case('partial', torch.float32))
    clean = case.run()[0]
    case.leaves['key'] = case.leaves['key'].clone()
    case.leaves['key'][0, 9] = torch.nan  # in cluster 1
    output, sees = case.run()[0], (case.others['nearest'][0] == 1).any(-1)
    assert output[0, sees].isnan().all()
    assert_close(output[0, ~sees], clean[0, ~sees])
    assert_close(output[1], clean[1])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_same_bits_in_every_run(dtype: torch.dtype) -> None:
    case = on_cuda(make_case('partial', dtype, queries=5000, keys=1999, depth=32))
    (output, gradients), (other, others) = case.run(), case.run()
    assert torch.equal(output, other)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize('name', ['partial', 'global'])
def test_graph_and_streams(name: str) -> None:
    """Nothing waits for the device, forward and backward, and all work is on the current stream."""
    case = on_cuda(make_case(name, torch.float32, queries=300))
    leaves = {key: leaf.detach().clone().requires_grad_() for key, leaf in case.leaves.items()}
    cotangent = torch.randn(2, 300, 32, device='cuda')

    def run() -> tuple[Tensor, ...]:
        output = ClusterCase(leaves, case.others).output()
        return output.detach(), *torch.autograd.grad(output, list(leaves.values()), cotangent)

    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('name', ['partial', 'plain', 'global'])
def test_opcheck(name: str) -> None:
    case = on_cuda(make_case(name, torch.float32))
    arguments = _arguments(case)
    needing = [a.detach().requires_grad_() if a is not None and i in (0, 1, 2, 7, 8, 9, 10) else a
               for i, a in enumerate(arguments)]  # fmt: skip
    torch.library.opcheck(torch.ops.boltz_mm.cluster_attention.default, tuple(needing), test_utils=CHECKS)
