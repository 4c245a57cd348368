"""The gradient of value in a fixed order.  It replaces that of the CUDA kernels, but its arithmetic runs anywhere."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from boltz_mm.ops import _deterministic
from tests.ops.cases import NAMES, make_case


@pytest.fixture
def asked_for() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_needed_on_cuda_if_asked_for(asked_for: None) -> None:
    on_cuda = SimpleNamespace(device=torch.device('cuda', 0))
    assert _deterministic.needed(on_cuda)
    assert not _deterministic.needed(torch.zeros(1))
    torch.use_deterministic_algorithms(False)
    assert not _deterministic.needed(on_cuda)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('elements', [1, 1 << 26])
@pytest.mark.parametrize('shapes', [((5, 7), (3, 4), (1, 2)), ((0, 3), (4, 5)), ()])
def test_same_as_the_kernels(
    name: str, elements: int, shapes: tuple, monkeypatch: pytest.MonkeyPatch, native: None
) -> None:
    case = make_case(name, shapes=shapes, queries=5)
    case.leaves[list(case.leaves)[1]][0, 2] = float('nan')
    expected = case.run()[1]
    calls = []
    gradient_of_value = _deterministic.gradient_of_value
    monkeypatch.setattr(_deterministic, 'gradient_of_value', lambda *a: calls.append(a) or gradient_of_value(*a))
    monkeypatch.setattr(_deterministic, 'needed', lambda value: True)
    monkeypatch.setattr(_deterministic, '_ELEMENTS', elements)
    ours = case.run()[1]
    assert len(calls) == 1
    for a, b in zip(ours, expected, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', NAMES)
def test_dtype_of_value(name: str, monkeypatch: pytest.MonkeyPatch, native: None) -> None:
    case = make_case(name, torch.bfloat16)
    expected = case.run()[1][0]
    monkeypatch.setattr(_deterministic, 'needed', lambda value: True)
    ours = case.run()[1][0]
    assert ours.dtype == torch.bfloat16
    assert_close(ours, expected, rtol=1e-2, atol=1e-2)


def test_not_computed_where_value_needs_no_gradient(monkeypatch: pytest.MonkeyPatch, native: None) -> None:
    monkeypatch.setattr(_deterministic, 'needed', lambda value: True)
    monkeypatch.setattr(_deterministic, 'gradient_of_value', lambda *arguments: pytest.fail('computed'))
    case = make_case('box')
    leaves = [leaf.requires_grad_(i > 0) for i, leaf in enumerate(case.leaves.values())]
    case.function()(*leaves)[0].sum().backward()
    assert leaves[0].grad is None and leaves[1].grad is not None
