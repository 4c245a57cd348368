"""Turn every golden case into tests: each operator backend, one thread and two, float64 where stored."""

from pathlib import Path

import pytest

from tests.parity.case import Case, find_cases

DEFAULT_ROOT = Path(__file__).parents[1] / 'data' / 'parity'


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if 'golden' not in metafunc.fixturenames:
        return
    given = metafunc.config.getoption('--parity-root')
    root = Path(given).resolve() if given else DEFAULT_ROOT
    folders = find_cases(root)
    if not folders:
        raise pytest.UsageError(f'no case.json below {root}')
    params = []
    for folder in folders:
        case, name = Case(folder), str(folder.relative_to(root))
        params.append(pytest.param(case, id=name if name != '.' else folder.name))
        if case.has_double:
            params.append(pytest.param(case.in_double(), id=f'{name}-float64'))
    metafunc.parametrize('golden', params)
