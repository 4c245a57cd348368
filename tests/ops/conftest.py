"""Fixtures of the operator tests."""

from collections.abc import Iterator

import pytest
import torch

from boltz_mm.ops import available_backends, use_backend


@pytest.fixture(params=available_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def native() -> Iterator[None]:
    if 'native' not in available_backends():
        pytest.fail('the native library is not built')
    with use_backend('native'):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
