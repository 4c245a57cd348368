"""The operators inside of PyTorch: opcheck, compile, export, vmap, meta tensors, FLOP counts."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from boltz_mm.ops import box_attention, deform_attention, instance_attention, use_backend
from tests.ops.cases import NAMES, OpCase, make_case

pytestmark = pytest.mark.usefixtures('native')
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def _arguments(case: OpCase, requires_grad: bool) -> tuple:
    leaves = [leaf.detach().requires_grad_(requires_grad) for leaf in case.leaves.values()]
    shapes = torch.tensor(case.shapes)
    if case.name == 'deform':
        return torch.ops.boltz_mm.deform_attention, (leaves[0], shapes, *leaves[1:])
    if 'box' in case.name:
        angles = leaves[3] if case.name == 'box_rotated' else None
        return torch.ops.boltz_mm.box_attention, (leaves[0], shapes, *leaves[1:3], case.points, case.ratios, angles)
    with_mask = case.name == 'instance'
    return torch.ops.boltz_mm.instance_attention, (leaves[0], shapes, *leaves[1:], case.points, case.ratios, with_mask)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(('dtype', 'requires_grad'), [(torch.float32, True), (torch.float64, False)])
def test_opcheck(name: str, dtype: torch.dtype, requires_grad: bool) -> None:
    operator, arguments = _arguments(make_case(name, dtype), requires_grad)
    torch.library.opcheck(operator.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('value_needed', [True, False])
def test_opcheck_backward(name: str, value_needed: bool) -> None:
    operator, arguments = _arguments(make_case(name, torch.float32), False)
    results = operator(*arguments)
    gradients = (torch.ones_like(results),) if isinstance(results, torch.Tensor) else map(torch.ones_like, results)
    if 'instance' in name:
        gradients, arguments = list(gradients), arguments[:-1]
        gradients[1] = gradients[1] if name == 'instance' else None
    backward = getattr(torch.ops.boltz_mm, f'{operator.__name__}_backward')
    torch.library.opcheck(backward.default, (*gradients, *arguments, value_needed), test_utils=CHECKS)


@pytest.mark.parametrize('name', NAMES)
def test_compiles_once_for_two_sizes(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    # Sizes that differ from each other: equal ones are taken for the same size by the tracer.
    first = make_case(name, torch.float32, batch=11, queries=9)
    shapes, points = torch.tensor(first.shapes), first.points

    def run(case: OpCase, function) -> tuple:
        leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
        outputs = function(case.ratios, *leaves)
        return (*outputs, *torch.autograd.grad(outputs, leaves, case.cotangents(outputs)))

    def eager(ratios, *leaves):
        case = OpCase(name, (), {}, points, ratios)
        case.shapes = shapes
        return call(case, *leaves)

    compiled = torch.compile(eager, backend=counter, fullgraph=True, dynamic=True)
    for case in (first, make_case(name, torch.float32, batch=13, queries=17, seed=1)):
        for ours, expected in zip(run(case, compiled), run(case, eager), strict=True):
            assert_close(ours, expected)
    assert counter.frame_count == 1


def call(case: OpCase, *leaves: torch.Tensor) -> tuple:
    """The public function with the shapes as a tensor, as a model calls it."""
    value, shapes, points = leaves[0], case.shapes, case.points
    if case.name == 'deform':
        return (deform_attention(value, shapes, *leaves[1:]),)
    if 'box' in case.name:
        angles = leaves[3] if case.name == 'box_rotated' else None
        output = box_attention(value, shapes, *leaves[1:3], points, valid_ratios=case.ratios, angles=angles)
        return (output,)
    with_mask = case.name == 'instance'
    result = instance_attention(value, shapes, *leaves[1:], points, valid_ratios=case.ratios, mask_output=with_mask)
    return result if with_mask else (result,)


class _Module(torch.nn.Module):
    def __init__(self, name: str, points: torch.Tensor) -> None:
        super().__init__()
        self.name = name
        self.register_buffer('points', points)

    def forward(self, shapes: torch.Tensor, ratios: torch.Tensor, leaves: list[torch.Tensor]) -> tuple:
        return call(OpCase(self.name, shapes, {}, self.points, ratios), *leaves)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_inductor(name: str) -> None:
    case = make_case(name, torch.float32)
    module, arguments = _Module(name, case.points), (torch.tensor(case.shapes), case.ratios, list(case.leaves.values()))
    compiled = torch.compile(module, fullgraph=True)
    for ours, expected in zip(compiled(*arguments), module(*arguments), strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize('name', NAMES)
def test_export_with_any_batch(name: str) -> None:
    case = make_case(name, torch.float32)
    module = _Module(name, case.points)
    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(
        module,
        (torch.tensor(case.shapes), case.ratios, list(case.leaves.values())),
        dynamic_shapes=({}, None if name == 'deform' else {0: batch}, [{0: batch}] * len(case.leaves)),
    )
    other = make_case(name, torch.float32, batch=5, seed=3)
    arguments = (
        torch.tensor(other.shapes),
        other.ratios if name != 'deform' else case.ratios,
        list(other.leaves.values()),
    )
    for ours, expected in zip(exported.module()(*arguments), module(*arguments), strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize('name', NAMES)
def test_vmap_folds_into_the_batch(name: str) -> None:
    cases = [make_case(name, torch.float32, ratios=False, seed=seed) for seed in range(3)]
    case = cases[0]
    stacked = [torch.stack(leaves, dim=1) for leaves in zip(*(c.leaves.values() for c in cases), strict=True)]
    mapped = torch.vmap(case.function(), in_dims=1)(*stacked)
    shared = torch.vmap(case.function(), in_dims=(None, *[1] * (len(stacked) - 1)))(case.leaves['value'], *stacked[1:])
    for index, single in enumerate(cases):
        for ours, expected in zip(mapped, single.run()[0], strict=True):
            assert_close(ours[index], expected)
        single.leaves['value'] = case.leaves['value']
        for ours, expected in zip(shared, single.run()[0], strict=True):
            assert_close(ours[index], expected)


def test_vmap_over_points_is_refused() -> None:
    case = make_case('box', torch.float32)
    operator, arguments = _arguments(case, False)
    with pytest.raises(NotImplementedError, match='points'):
        torch.vmap(lambda points: operator(*arguments[:4], points, *arguments[5:]))(torch.stack([case.points] * 2))


@pytest.mark.parametrize('name', NAMES)
def test_meta_tensors(name: str) -> None:
    """Sizes that no memory holds: more than 2 ** 31 elements."""
    case, batch = make_case(name, torch.float32), 2**26
    leaves = [torch.empty((batch, *v.shape[1:]), device='meta', requires_grad=True) for v in case.leaves.values()]
    ratios = torch.empty((batch, *case.ratios.shape[1:]), device='meta')
    large = OpCase(name, torch.tensor(case.shapes).to('meta'), {}, case.points.to('meta'), ratios)
    outputs = call(large, *leaves)
    assert outputs[0].shape == (batch, 3, 10)
    gradients = torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize('name', NAMES)
def test_flops(name: str) -> None:
    case = make_case(name, torch.float32, size=4)
    samples = 2 * 3 * 2 * 3 * 16 * 5  # batch, queries, heads, levels, points, channels
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    with FlopCounterMode(display=False) as counter:
        outputs = case.function()(*leaves)
    assert counter.get_total_flops() == (12 if name == 'instance' else 8) * samples
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(outputs, case.cotangents(outputs))
    assert counter.get_total_flops() == (28 if name == 'instance' else 16) * samples


@pytest.mark.parametrize('name', NAMES)
def test_reference_and_native_agree_in_float32(name: str) -> None:
    case = make_case(name, torch.float32, depth=32, queries=50, size=4, shapes=((20, 30), (10, 15)))
    outputs, gradients = case.run()
    with use_backend('reference'):
        plain_outputs, plain_gradients = case.run()
    for ours, expected in zip((*outputs, *gradients), (*plain_outputs, *plain_gradients), strict=True):
        assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))
