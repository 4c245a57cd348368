"""The torchvision repair: on a stand-in with and without a working binary, and on the real stack."""

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, *paths: Path) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter that finds ``paths`` first; every warning is an error."""
    lines = [f'import sys; sys.path[:0] = {[str(path) for path in (*paths, ROOT)]!r}', textwrap.dedent(code)]
    return subprocess.run(
        [sys.executable, '-W', 'error', '-c', '\n'.join(lines)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A package ``torchvision`` that is built like the real one; ``WORKS`` says whether its binary loads."""
    package = tmp_path / 'torchvision'
    package.mkdir()
    (package / '__init__.py').write_text(
        'from . import extension\nfrom torchvision import _autograd_registrations, _meta_registrations\n'
    )
    (package / '_autograd_registrations.py').write_text('')
    (package / 'extension.py').write_text(
        textwrap.dedent(
            """
            import os, torch
            WORKS = os.environ.get('WORKS') == '1'
            if WORKS:
                LIB = torch.library.Library('torchvision', 'DEF')
                for name in ('nms', 'qnms'):
                    LIB.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
            def _has_ops():
                return WORKS
            """
        )
    )
    (package / '_meta_registrations.py').write_text(
        textwrap.dedent(
            """
            import torch
            for name in ('nms', 'qnms'):
                torch.library.register_fake(f'torchvision::{name}')(lambda dets, scores, iou_threshold: dets)
            """
        )
    )
    return tmp_path


def test_broken_binary_is_mended_silently(stand_in: Path) -> None:
    without = run_python('import torchvision', stand_in)
    assert 'torchvision::nms does not exist' in without.stderr
    mended = run_python('import boltz_mm, torchvision; torch = torchvision.extension.torch', stand_in)
    assert (mended.returncode, mended.stdout, mended.stderr) == (0, '', '')


def test_working_binary_is_left_alone(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('WORKS', '1')
    code = 'import boltz_mm, torchvision; from boltz_mm.utils import compat; assert not compat._libraries'
    result = run_python(code, stand_in)
    assert (result.returncode, result.stderr) == (0, '')


def test_declaring_twice_declares_once() -> None:
    code = """
        from boltz_mm.utils.compat import declare_torchvision_schemas as declare
        assert declare() and not declare()
    """
    result = run_python(code)
    assert (result.returncode, result.stderr) == (0, '')


def test_watching_twice_watches_once() -> None:
    code = """
        import boltz_mm
        from boltz_mm.utils.compat import TorchvisionRepair, install_torchvision_repair
        install_torchvision_repair()
        assert sum(isinstance(finder, TorchvisionRepair) for finder in sys.meta_path) == 1
        assert importlib.util.find_spec('no_such_module_here') is None
    """
    result = run_python('import importlib.util' + textwrap.dedent(code))
    assert (result.returncode, result.stderr) == (0, '')


@pytest.mark.slow
@pytest.mark.parametrize('module', ['mmdet.models', 'mmseg.models', 'mmpretrain.models'])
def test_the_stack_imports_after_us(module: str) -> None:
    if importlib.util.find_spec(module.partition('.')[0]) is None:
        pytest.skip(f'{module} is not installed')
    result = subprocess.run(
        [sys.executable, '-c', f'import boltz_mm, {module}'], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
