"""Every operator on a CUDA device against the PyTorch reference on the CPU."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from boltz_mm import ops
from boltz_mm.ops import _backend
from tests.ops.cases import NAMES, OpCase, make_case

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
Results = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def built() -> None:
    if 'cuda' not in _backend._loaded_devices:
        pytest.fail(
            'the CUDA library is not built or does not load: BOLTZ_MM_CUDA=1 python setup.py build_ext --inplace'
        )


def on_cuda(case: OpCase, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> OpCase:
    """The case on the device, its differentiable inputs changed in layout by ``change``."""
    return replace(
        case,
        leaves={name: change(leaf.cuda()) for name, leaf in case.leaves.items()},
        points=case.points.cuda(),
        ratios=None if case.ratios is None else case.ratios.cuda(),
    )


def flat(case: OpCase) -> Results:
    outputs, gradients = case.run()
    return (*outputs, *gradients)


def expected_of(case: OpCase) -> Results:
    """Outputs and gradients of the PyTorch reference on the CPU, in float64 from the same numbers."""
    exact = replace(
        case,
        leaves={name: leaf.double() for name, leaf in case.leaves.items()},
        points=case.points.double(),
        ratios=None if case.ratios is None else case.ratios.double(),
    )
    outputs = case.function()(*case.leaves.values())
    cotangents = [cotangent.double() for cotangent in case.cotangents(outputs)]
    with ops.use_backend('reference'):
        leaves = [leaf.requires_grad_() for leaf in exact.leaves.values()]
        results = exact.function()(*leaves)
        return (*results, *torch.autograd.grad(results, leaves, cotangents))


def assert_same(ours: Results, expected: Results, dtype: torch.dtype) -> None:
    for a, b in zip(ours, expected, strict=True):
        b = b.detach()
        scale = max(1.0, float(b.abs().max()) if b.numel() else 1.0)
        assert_close(a.detach().cpu().double(), b.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('depth', [1, 3, 5, 8, 32, 33, 64, 128, 264])
def test_dtypes_and_head_dims(name: str, dtype: torch.dtype, depth: int) -> None:
    case = make_case(name, dtype, depth=depth)
    ours = flat(on_cuda(case))
    assert [result.dtype for result in ours[-len(case.leaves) :]] == [leaf.dtype for leaf in case.leaves.values()]
    assert_same(ours, expected_of(case), dtype)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
    'sizes',
    [
        dict(shapes=((1, 1),), queries=1, heads=1, batch=1, depth=1),
        dict(shapes=((0, 3), (4, 5), (2, 0))),
        dict(shapes=tuple((n % 4 + 1, n % 3 + 1) for n in range(11)), depth=4),
        dict(size=34, queries=2, depth=4),
        dict(size=14, queries=1, batch=1, heads=8, depth=32),
        dict(queries=301, heads=3, depth=8),
        dict(batch=33, queries=2, depth=4),
        dict(ratios=False),
    ],
)
def test_sizes(name: str, sizes: dict) -> None:
    case = make_case(name, **sizes)
    assert_same(flat(on_cuda(case)), expected_of(case), torch.float64)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('sizes', [dict(queries=0), dict(batch=0), dict(heads=0), dict(shapes=()), dict(depth=0)])
def test_empty(name: str, sizes: dict) -> None:
    case = make_case(name, torch.float32, **sizes)
    for result in flat(on_cuda(case)):
        assert torch.equal(result, torch.zeros_like(result))
    torch.cuda.synchronize()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_any_strides(name: str, dtype: torch.dtype) -> None:
    case = make_case(name, dtype, depth=32)

    def misaligned(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2]

    def reversed_layout(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    def heads_first(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    for change in (misaligned, reversed_layout, heads_first):
        assert_same(flat(on_cuda(case, change)), expected_of(case), dtype)


@pytest.mark.parametrize('name', NAMES)
def test_places_that_are_no_numbers(name: str) -> None:
    case = make_case(name, torch.float32, depth=32)
    places = case.leaves['locations' if name == 'deform' else 'boxes']
    places[0, 1] = float('nan')
    places[1, 2, ..., 0] = float('inf')
    results = flat(on_cuda(case))
    assert torch.equal(results[0][0, 1], torch.zeros_like(results[0][0, 1]))
    assert all(result.isfinite().all() for result in results)
    with ops.use_backend('reference'):
        assert_same(results[:1], case.run(gradients=False)[0][:1], torch.float32)


@pytest.mark.parametrize('name', NAMES)
def test_only_the_gradient_of_value_may_differ_between_runs(name: str) -> None:
    case = on_cuda(make_case(name, torch.float32, queries=301, depth=32))
    outputs, gradients = case.run()
    for _ in range(3):
        again, again_gradients = case.run()
        for a, b in zip((*outputs, *gradients[1:]), (*again, *again_gradients[1:]), strict=True):
            assert torch.equal(a, b)
        assert_close(gradients[0], again_gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_deterministic_algorithms(name: str, dtype: torch.dtype) -> None:
    case = make_case(name, dtype, queries=301, depth=32)
    moved = on_cuda(case)
    try:
        torch.use_deterministic_algorithms(True)
        runs = [flat(moved) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(runs[0], expected_of(case), dtype)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize('name', NAMES)
def test_works_on_the_current_stream(name: str) -> None:
    case = make_case(name, torch.float32, queries=301, depth=32)
    expected, moved = expected_of(case), on_cuda(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # work that is not ordered after this would see inputs that are not doubled yet
        for leaf in moved.leaves.values():
            leaf.mul_(2)
        for leaf in moved.leaves.values():
            leaf.mul_(0.5)
        results = flat(moved)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(results, expected, torch.float32)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_cuda_graph(name: str, dtype: torch.dtype) -> None:
    """Captured once, forward and backward, and replayed with other inputs."""
    case, other = (make_case(name, dtype, depth=32, seed=seed) for seed in (0, 1))
    shapes = torch.tensor(case.shapes, device='cuda')
    moved = on_cuda(case)
    leaves = [leaf.requires_grad_() for leaf in moved.leaves.values()]
    points, ratios = moved.points, moved.ratios

    def call() -> Results:
        if name == 'deform':
            return (ops.deform_attention(leaves[0], shapes, leaves[1], leaves[2]),)
        if 'box' in name:
            angles = leaves[3] if name == 'box_rotated' else None
            return (ops.box_attention(leaves[0], shapes, *leaves[1:3], points, valid_ratios=ratios, angles=angles),)
        result = ops.instance_attention(*(leaves[0], shapes, *leaves[1:], points), valid_ratios=ratios,
                                        mask_output=name == 'instance')  # fmt: skip
        return result if name == 'instance' else (result,)

    cotangents = OpCase.cotangents(call())

    def step() -> Results:
        outputs = call()
        return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for leaf, new in zip(leaves, other.leaves.values(), strict=True):
            leaf.copy_(new)
        if ratios is not None:
            ratios.copy_(other.ratios)
    for _ in range(2):  # a gradient that is not cleared first would show
        graph.replay()
    assert_same(results, expected_of(other), dtype)


@pytest.mark.parametrize('name', NAMES)
def test_opcheck(name: str) -> None:
    case = on_cuda(make_case(name, torch.float32))
    shapes = torch.tensor(case.shapes, device='cuda')
    value, *others = (leaf.requires_grad_() for leaf in case.leaves.values())
    if name == 'deform':
        operator, arguments = torch.ops.boltz_mm.deform_attention, (value, shapes, *others)
    elif 'box' in name:
        angles = others[2] if name == 'box_rotated' else None
        operator, arguments = (
            torch.ops.boltz_mm.box_attention,
            (value, shapes, *others[:2], case.points, case.ratios, angles),
        )
    else:
        operator = torch.ops.boltz_mm.instance_attention
        arguments = (value, shapes, *others, case.points, case.ratios, name == 'instance')
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')
    torch.library.opcheck(operator.default, arguments, test_utils=checks)


@pytest.mark.parametrize('name', NAMES)
def test_encoder_size(name: str) -> None:
    """The sizes of an image of 800 x 1333; the CPU library is the reference, the PyTorch one needs gigabytes."""
    shapes = ((100, 167), (50, 84), (25, 42), (13, 21))
    queries, size = (22223, 2) if name in ('box', 'box_rotated', 'deform') else (300, 14)
    case = make_case(name, torch.float32, batch=1, queries=queries, heads=8, depth=32, shapes=shapes, size=size)
    outputs, gradients = on_cuda(case).run()
    expected, expected_gradients = case.run()
    assert_same(outputs, expected, torch.float32)
    for leaf, ours, theirs in zip(case.leaves, gradients, expected_gradients, strict=True):
        if leaf in ('value', 'logits', 'weights'):
            assert_same((ours,), (theirs,), torch.float32)
        else:  # jumps where a place crosses the centre of a cell: of millions, rounding puts some on the other side
            assert (ours.cpu() - theirs).norm() <= 3e-2 * theirs.norm(), leaf


@pytest.mark.parametrize('backward', [False, True])
def test_offsets_beyond_32_bits(backward: bool) -> None:
    """More than 2^31 channels: only the last cells are sampled, and nothing else may get a gradient."""
    height = width = 3000
    needed = height * width * 256 * (2 + 4 + 2 if backward else 2) * 1.1
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f'needs {needed / 2**30:.0f} GiB of device memory')
    value = torch.zeros(1, height * width, 8, 32, dtype=torch.bfloat16, device='cuda')
    assert value.numel() > 2**31
    value[:, -1] = 1
    value.requires_grad_(backward)
    boxes = torch.tensor([1 - 0.5 / width, 1 - 0.5 / height, 0, 0], device='cuda').expand(1, 1, 8, 1, 4)
    logits = torch.zeros(1, 1, 8, 1, 4, device='cuda')
    output = ops.box_attention(value, [(height, width)], boxes, logits, ops.grid_points(2, device='cuda'))
    assert_close(output, torch.ones_like(output), rtol=1e-2, atol=1e-2)
    if backward:
        output.sum().backward()
        assert_close(value.grad[0, -1].float(), torch.ones(8, 32, device='cuda'), rtol=1e-2, atol=1e-2)
        assert_close(value.grad[0, : -2 * width].abs().max().item(), 0.0)


def test_tensors_of_another_device_are_refused() -> None:
    case = on_cuda(make_case('box', torch.float32))
    shapes = torch.tensor(case.shapes, device='cuda')
    value, boxes, logits = case.leaves.values()
    with pytest.raises(RuntimeError, match='on the device of value'):
        torch.ops.boltz_mm.box_attention(value, shapes, boxes.cpu(), logits, case.points, case.ratios, None)
    with pytest.raises(RuntimeError, match='compute dtype'):
        torch.ops.boltz_mm.box_attention(value, shapes, boxes.double(), logits, case.points, case.ratios, None)


def test_shapes_on_the_device_are_not_trusted() -> None:
    """Levels that do not fit into value are empty: no memory outside of it is read or written."""
    case = on_cuda(make_case('box', torch.float32, shapes=((4, 5),), ratios=False))
    leaves = [leaf.requires_grad_() for leaf in case.leaves.values()]
    wrong = torch.tensor([[4000, 5000]], device='cuda')
    output = ops.box_attention(leaves[0], wrong, leaves[1], leaves[2], case.points)
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert all(torch.equal(result, torch.zeros_like(result)) for result in (output, *gradients))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_second_device_while_the_first_is_current() -> None:
    case = make_case('instance', torch.float32, depth=32)
    with torch.cuda.device(1):
        moved = on_cuda(case)
    assert torch.cuda.current_device() == 0
    results = flat(moved)
    assert results[0].device.index == 1
    assert_same(results, expected_of(case), torch.float32)
