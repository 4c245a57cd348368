"""The choice of the backend, and what happens without the native library."""

import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import boltz_mm
from boltz_mm.ops import _backend, available_backends, use_backend
from tests.ops.cases import make_case

CPU = torch.device('cpu')


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, '_loaded_devices', set())
    monkeypatch.setattr(_backend, '_warned', set())
    monkeypatch.delenv('BOLTZ_MM_OPS', raising=False)


def test_native_library_is_there_and_used_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('BOLTZ_MM_OPS', raising=False)
    assert available_backends() == ['reference', 'native']
    assert _backend.use_native(CPU)


def test_use_backend_nests_and_restores() -> None:
    with use_backend('reference'):
        assert not _backend.use_native(CPU)
        with use_backend('native'):
            assert _backend.use_native(CPU)
        assert not _backend.use_native(CPU)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(_backend.use_native(CPU)))
        thread.start()
        thread.join()
        assert seen == [False]
    with pytest.raises(ZeroDivisionError), use_backend('reference'):
        raise ZeroDivisionError
    assert _backend._forced is None


def test_backends_run_different_code() -> None:
    case = make_case('box', torch.float32)
    for name, expected in (('native', 1), ('reference', 0)):
        with use_backend(name), torch.profiler.profile() as profile:
            case.run(gradients=False)
        assert sum(event.key == 'boltz_mm::box_attention' for event in profile.key_averages()) == expected


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('BOLTZ_MM_OPS', 'reference')
    assert not _backend.use_native(CPU)
    with use_backend('native'):
        assert _backend.use_native(CPU)
    monkeypatch.setenv('BOLTZ_MM_OPS', 'fast')
    with pytest.raises(ValueError, match=r"BOLTZ_MM_OPS must be one of \['reference', 'native'\], got 'fast'"):
        _backend.use_native(CPU)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="got 'cuda'"), use_backend('cuda'):
        pass


def test_without_library_one_warning_and_the_same_numbers(no_library: None) -> None:
    assert available_backends() == ['reference']
    case = make_case('box')
    with pytest.warns(UserWarning, match='pip install --no-build-isolation') as caught:
        first = case.run()[0]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = case.run()[0]
    assert torch.equal(first[0], again[0])


def test_without_library_native_is_an_error(no_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match='BOLTZ_MM_OPS=reference'), use_backend('native'):
        pass
    monkeypatch.setenv('BOLTZ_MM_OPS', 'native')
    with pytest.raises(RuntimeError, match='not available'):
        make_case('box').run()


def test_without_library_reference_is_silent(no_library: None) -> None:
    with warnings.catch_warnings(), use_backend('reference'):
        warnings.simplefilter('error')
        make_case('box').run()


@pytest.fixture
def copied_operators(tmp_path: Path) -> Path:
    """A package of the operators alone, without their library, in a path with a space."""
    source, package = Path(boltz_mm.__file__).parent, tmp_path / 'a b' / 'boltz_mm'
    shutil.copytree(source / 'ops', package / 'ops', ignore=shutil.ignore_patterns('__pycache__'))
    (package / '__init__.py').touch()
    return package


def _python(code: str, package: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-W', 'always', '-c', code],
        capture_output=True,
        text=True,
        cwd=package.parent,
        env={**os.environ, 'PYTHONPATH': str(package.parent), 'OMP_NUM_THREADS': '1', **environment},
    )


USE = """
import sys, torch, boltz_mm.ops as ops
print(ops.__file__, ops.available_backends(), 'mmengine' in sys.modules)
with torch.no_grad():
    boxes, logits = torch.full((1, 1, 1, 1, 4), .5), torch.zeros(1, 1, 1, 1, 1)
    print(ops.box_attention(torch.ones(1, 1, 1, 1), [(1, 1)], boxes, logits, ops.grid_points(1)).item())
"""


def test_import_needs_torch_alone_and_is_silent(copied_operators: Path) -> None:
    done = _python('import sys, boltz_mm.ops; print("mmengine" in sys.modules)', copied_operators)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, 'False', '')


def test_package_without_library(copied_operators: Path) -> None:
    done = _python(USE, copied_operators)
    assert done.returncode == 0, done.stderr
    assert str(copied_operators) in done.stdout
    assert "['reference'] False" in done.stdout
    assert done.stdout.endswith('1.0\n')
    assert done.stderr.count('UserWarning') == 1


def test_library_that_does_not_load(copied_operators: Path) -> None:
    (copied_operators / '_C.abi3.so').write_bytes(b'no library')
    done = _python(USE, copied_operators)
    assert done.returncode == 0, done.stderr
    assert 'invalid ELF header' in done.stderr or 'file too short' in done.stderr
    assert str(copied_operators) not in re.sub(r'(?m)^.*\.py:\d+.*$', '', done.stderr)


def test_library_of_older_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, '_NEWEST', ('box_attention', 'operator_of_tomorrow'))
    monkeypatch.setattr(_backend, '_loaded_devices', set())
    monkeypatch.setattr(_backend, '_load_errors', {})
    _backend._load('_C', 'cpu')
    assert _backend.available_backends() == ['reference']
    assert 'built from older sources, without operator_of_tomorrow' in _backend._missing('cpu')


@pytest.mark.parametrize('capability', ['baseline', 'avx2', 'avx512'])
def test_every_instruction_set_gives_the_same(capability: str, tmp_path: Path) -> None:
    """Smaller instruction sets are run in a process of their own; a larger one than there is falls back."""
    code = f"""
import sys, torch
from tests.ops.cases import NAMES, make_case
torch.save([(n, d, make_case(n, d, depth=45, size=4).run()) for n in NAMES for d in
            (torch.float64, torch.float32, torch.bfloat16, torch.float16)], {str(tmp_path / 'results.pt')!r})
"""
    done = _python(code, Path(boltz_mm.__file__).parent, BOLTZ_MM_CPU_CAPABILITY=capability, BOLTZ_MM_OPS='native')
    assert done.returncode == 0, done.stderr
    for name, dtype, (outputs, gradients) in torch.load(tmp_path / 'results.pt'):
        with use_backend('reference'):
            expected_outputs, expected_gradients = make_case(name, dtype, depth=45, size=4).run()
        low = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
        for ours, expected in zip((*outputs, *gradients), (*expected_outputs, *expected_gradients), strict=True):
            scale = float(expected.detach().abs().max())
            torch.testing.assert_close(ours.detach(), expected.detach(), rtol=low, atol=low * scale)


def _bad_calls() -> list:
    value, shapes, place = torch.ones(1, 4, 2, 3), torch.tensor([[2, 2]]), torch.zeros(1, 1, 2, 1, 4, 2)
    boxes, logits, points = torch.zeros(1, 1, 2, 1, 4), torch.zeros(1, 1, 2, 1, 4), torch.zeros(4, 2)
    operators = torch.ops.boltz_mm
    return [
        lambda: operators.deform_attention(value, torch.tensor([[2, 3]]), place, logits),
        lambda: operators.deform_attention(value, torch.tensor([[2**31, 2]]), place, logits),
        lambda: operators.deform_attention(value, torch.tensor([[2, -2]]), place, logits),
        lambda: operators.deform_attention(value, shapes, place, logits[..., :3]),
        lambda: operators.deform_attention(value, shapes, place.double(), logits),
        lambda: operators.deform_attention(value.long(), shapes, place, logits),
        lambda: operators.deform_attention(value[0], shapes, place, logits),
        lambda: operators.deform_attention(value, shapes.int(), place, logits),
        lambda: operators.box_attention(value, shapes, boxes[..., :3], logits, points, None, None),
        lambda: operators.box_attention(value, shapes, boxes, logits, points, torch.ones(1, 2, 2), None),
        lambda: operators.box_attention(value, shapes, boxes, logits, points, None, torch.ones(3)),
        lambda: operators.instance_attention(value, shapes, boxes, logits, points[:3], None, True),
        lambda: operators.instance_attention_backward(
            torch.ones(1, 1, 5), None, value, shapes, boxes, logits, points, None, True
        ),
    ]


@pytest.mark.parametrize('index', range(len(_bad_calls())))
def test_kernels_check_for_themselves_and_name_no_path(index: int) -> None:
    """The operators of ``torch.ops`` raise before they read, and the message holds no path of the build machine."""
    with pytest.raises(RuntimeError) as caught:
        _bad_calls()[index]()
    message = str(caught.value)
    assert not re.search(r'(?<![\w.])/\w+/', message), message
    assert re.search(r'must|cells|range|needs', message), message


def test_library_names_no_path_of_the_build_machine() -> None:
    library = _backend._library_path('_C')
    assert library is not None
    assert str(Path(boltz_mm.__file__).parents[1]).encode() not in library.read_bytes()
