"""Building the operators: without a compiler, without torch, and under the sanitizers."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get('CXX', 'g++'))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a build needs, in a path with a space."""
    copy = tmp_path / 'a b'
    shutil.copytree(ROOT / 'ops', copy / 'ops')
    ignored = shutil.ignore_patterns('__pycache__', '*.so')
    shutil.copytree(ROOT / 'boltz_mm' / 'ops', copy / 'boltz_mm' / 'ops', ignore=ignored)
    (copy / 'boltz_mm' / '__init__.py').touch()
    shutil.copy(ROOT / 'boltz_mm' / 'version.py', copy / 'boltz_mm')
    shutil.copy(ROOT / 'setup.py', copy)
    return copy


def build(source: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, 'setup.py', '-q', 'build_ext', '--inplace'],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, 'BOLTZ_MM_CUDA': '0', **environment},
    )


def test_without_compiler_one_warning(source: Path) -> None:
    done = build(source, CXX='/nonexistent/c++', CC='/nonexistent/cc')
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('WARNING: boltz_mm._C could not be built') == 1
    assert 'runs on the PyTorch reference' in done.stderr
    assert not list(source.rglob('*.so'))


def test_failing_compiler_one_warning(source: Path) -> None:
    shutil.rmtree(source / 'ops' / 'cpu')
    (source / 'ops' / 'registration.cpp').write_text('no program')
    done = build(source)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('WARNING: boltz_mm._C could not be built') == 1
    assert not list((source / 'boltz_mm').rglob('*.so'))


def test_without_torch_one_sentence(source: Path, tmp_path: Path) -> None:
    hidden = tmp_path / 'hidden'
    hidden.mkdir()
    (hidden / 'torch.py').write_text('raise ModuleNotFoundError("No module named torch")')
    done = build(source, PYTHONPATH=str(hidden))
    assert done.returncode != 0
    assert 'run `pip install torch setuptools wheel`, then `pip install --no-build-isolation .`' in done.stderr
    assert 'Traceback' not in done.stderr


def test_unknown_choice_about_cuda_is_refused(source: Path) -> None:
    done = build(source, BOLTZ_MM_CUDA='yes')
    assert done.returncode != 0
    assert "BOLTZ_MM_CUDA must be auto, 0 or 1, got 'yes'" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason='no C++ compiler')
def test_built_library_is_one_for_all_versions(source: Path) -> None:
    """It builds in a path with a space, and uses neither Python nor C++ interfaces of torch that change."""
    done = build(source)
    assert done.returncode == 0, done.stderr
    (library,) = (source / 'boltz_mm').glob('_C*.so')
    assert library.name == '_C.abi3.so'
    assert str(source).encode() not in library.read_bytes()
    symbols = subprocess.run(['nm', '-D', '--undefined-only', '-C', library], capture_output=True, text=True)
    if symbols.returncode:
        pytest.skip('nm is not there')
    foreign = [line.split(maxsplit=1)[1] for line in symbols.stdout.splitlines()]
    assert any('torch_parallel_for' in symbol for symbol in foreign)
    assert not [symbol for symbol in foreign if symbol.startswith(('at::', 'c10::', 'torch::', 'Py', '_Py'))]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or sys.platform != 'linux', reason='needs GCC on Linux')
def test_sanitizers(source: Path) -> None:
    """The operators' own tests with address and undefined-behaviour checks, for each instruction set."""
    torch_folder = Path(importlib.util.find_spec('torch').origin).parent
    flags = ['-std=c++20', '-O1', '-fPIC', '-ffp-contract=fast', '-Wno-psabi', '-fsanitize=address,undefined']
    flags += ['-fno-sanitize-recover=undefined', '-DTORCH_TARGET_VERSION=0x020a000000000000']
    flags += [f'-I{torch_folder / "include"}', f'-I{sysconfig.get_path("include")}']
    sources = [source / 'ops' / 'registration.cpp', *(source / 'ops' / 'cpu').glob('*.cpp')]
    building = [
        subprocess.Popen([COMPILER, *flags, '-c', str(file), '-o', str(file.with_suffix('.o'))]) for file in sources
    ]
    assert not any(process.wait() for process in building)
    objects = [str(file.with_suffix('.o')) for file in sources]
    libraries = [f'-L{torch_folder / "lib"}', '-lc10', '-ltorch', '-ltorch_cpu']
    target = source / 'boltz_mm' / '_C.abi3.so'
    subprocess.run([COMPILER, '-shared', *flags, *objects, *libraries, '-o', str(target)], check=True)
    shutil.copytree(ROOT / 'tests' / 'ops', source / 'tests' / 'ops')
    (source / 'tests' / '__init__.py').touch()
    (source / 'pytest.ini').write_text('[pytest]\nmarkers = slow: slow\npythonpath = .\n')
    runtime = [
        subprocess.check_output([COMPILER, f'-print-file-name={name}'], text=True).strip()
        for name in ('libasan.so', 'libubsan.so')
    ]
    for capability in ('baseline', 'avx2', 'avx512'):
        done = subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-k', 'native or no_places or same_bits',
             'tests/ops/test_operators.py', 'tests/ops/test_box_attention.py', 'tests/ops/test_neighbors.py',
             'tests/ops/test_clustering.py'],
            cwd=source,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                'PYTHONPATH': str(source),
                'LD_PRELOAD': ':'.join(runtime),
                'ASAN_OPTIONS': 'detect_leaks=0',
                'OMP_NUM_THREADS': '1',
                'BOLTZ_MM_CPU_CAPABILITY': capability,
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert ' passed' in done.stdout
