"""Our numbers against those of the official implementations.

Run the carried cases with ``pytest tests/parity``, any other folder with ``pytest tests/parity --parity-root DIR``.
"""

from collections import OrderedDict

import pytest
import torch
from mmengine.registry import DefaultScope

from boltz_mm.ops import available_backends, use_backend
from tests.parity.case import Case
from tests.parity.compare import mismatch
from tests.parity.registry import find_handler


@pytest.fixture(params=[1, 2], ids=['1thread', '2threads'])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def default_scope(monkeypatch: pytest.MonkeyPatch):
    """No case sees the default scope that another one has set."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())


@pytest.mark.parametrize('backend', available_backends())
def test_parity(golden: Case, backend: str, threads: int) -> None:
    run = find_handler(golden)
    with use_backend(backend):
        produced = run(golden)
    problems = []
    for name in golden.names_to_hold():
        if name not in produced:
            problems.append(f'{name}: the handler gives no value')
            continue
        problem = mismatch(produced[name], golden.stored[name], golden.check[name])
        if problem:
            problems.append(f'{name}: {problem}')
    assert golden.names_to_hold(), f'{golden.folder} checks nothing'
    assert not problems, '\n'.join(problems)
