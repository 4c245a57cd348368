"""The set-up script: its checks and sentences, and whole runs on a small stand-in of the checkout.

The stand-in has distributions of the same kinds (a wheel to resolve, a source distribution without dependencies, one
to compile as onedl-mmcv) and a ``torch`` that only knows its version; pip finds them in a folder instead of an index.
"""

import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'tools' / 'misc' / 'setup_env.py'


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location('setup_env', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Checks and sentences


def test_an_unsupported_python_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script.interpreter() == sys.executable
    monkeypatch.setattr(script, 'OLDEST', (9, 11))
    monkeypatch.setattr(script.shutil, 'which', lambda name: None)
    with pytest.raises(script.SetupError, match='is not supported here: install Python'):
        script.interpreter()


def test_another_python_on_the_path_is_taken(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, 'NEWEST', (3, 12))
    monkeypatch.setattr(script.sys, 'version_info', (3, 14, 0))
    monkeypatch.setattr(script.shutil, 'which', lambda name: f'/opt/{name}' if name == 'python3.12' else None)
    assert script.interpreter() == '/opt/python3.12'


def test_no_compiler(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(script.SetupError, match=r'no C\+\+ compiler found: install'):
        script.check_compiler()
    monkeypatch.setenv('CXX', str(tmp_path / 'none'))
    with pytest.raises(script.SetupError, match='cannot be run'):
        script.check_compiler()


def test_missing_python_headers(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script.check_compiler()
    monkeypatch.setattr(script.sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    monkeypatch.setenv('CPATH', '')
    with pytest.raises(script.SetupError, match="Python's C headers are missing"):
        script.check_compiler()


def test_too_little_space(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script.check_space(tmp_path) if shutil.disk_usage(tmp_path).free > 2**33 else None
    monkeypatch.setattr(script, 'NEEDED_GIB', 1e9)
    with pytest.raises(script.SetupError, match='GiB free; the set-up needs'):
        script.check_space(tmp_path)


def test_constraints_have_no_local_versions(script: ModuleType) -> None:
    lines = [line for line in (ROOT / 'constraints.txt').read_text().splitlines() if not line.startswith('#')]
    assert all('==' in line and '+' not in line for line in lines)
    assert script.pinned('torch') == '2.13.0'
    with pytest.raises(script.SetupError, match='no version of no-such-thing'):
        script.pinned('no-such-thing')


def test_every_requirement_is_pinned(script: ModuleType) -> None:
    for file in (ROOT / 'requirements').glob('*.txt'):
        for line in file.read_text().splitlines():
            if line and not line.startswith(('#', '-r')):
                aliases = {line, line.replace('-', '_'), {'pillow': 'pillow', 'pyyaml': 'PyYAML'}.get(line, line)}
                assert any(f'\n{name}==' in (ROOT / 'constraints.txt').read_text() for name in aliases), line


def test_wheel_folder_follows_the_cache_variable(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', '/somewhere/else')
    folder = script.cache_folder()
    assert folder.parent == Path('/somewhere/else/boltz_mm/wheels')
    assert sys.implementation.cache_tag in folder.name and 'torch2.13.0' in folder.name
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert script.cache_folder().parent == Path.home() / '.cache' / 'boltz_mm' / 'wheels'


@pytest.mark.parametrize(
    ('output', 'sentence'),
    [
        ("OSError: [Errno 28] No space left on device: '/x'", 'the disk is full'),
        ('Retrying after NewConnectionError(...)\nERROR: No matching distribution found for a', 'no package index'),
        ('ERROR: No matching distribution found for torch==2.13.0 (from x)', 'does not have torch==2.13.0'),
        ('g++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('SyntaxError: invalid syntax', None),
    ],
)
def test_reasons(script: ModuleType, output: str, sentence: str | None) -> None:
    reason = script.reason(output)
    assert reason is None if sentence is None else sentence in reason


def test_unexplained_failure_names_the_log(script: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / 'log'
    with pytest.raises(script.SetupError, match=f'its output is in {log}; its last words: strange'):
        script.run([sys.executable, '-c', "print('strange'); raise SystemExit(1)"], log)


def test_stamp(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, 'CHECKOUT', tmp_path)
    assert not script.Stamp(tmp_path).holds('stack', 'a')
    script.Stamp(tmp_path).write('stack', 'a', ['built.so'])
    assert not script.Stamp(tmp_path).holds('stack', 'a')  # what it made is gone
    (tmp_path / 'built.so').touch()
    assert script.Stamp(tmp_path).holds('stack', 'a') and not script.Stamp(tmp_path).holds('stack', 'b')
    script.Stamp(tmp_path).path.write_text('{"stack": ')
    assert not script.Stamp(tmp_path).holds('stack', 'a')


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

OWN_SETUP = "from setuptools import setup; setup(name='boltz_mm', version='0', packages=['boltz_mm'])"
MMCV_SETUP = """
import os, pathlib, sys, time
from setuptools import setup
flags = pathlib.Path(os.environ['STAND_IN'])
compiling = 'bdist_wheel' in sys.argv
if compiling:
    with (flags / 'builds').open('a') as file:
        file.write('x')
while compiling and (flags / 'slow').exists():
    (flags / 'building').touch()
    time.sleep(0.05)
setup(name='onedl-mmcv', version='1', packages=['mmcv'], package_data={'mmcv': ['*.so']})
"""
TORCH = (
    "__version__ = '2.13.0+cpu'\nclass version: cuda = None\nclass cuda: is_available = staticmethod(lambda: False)\n"
)


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    info = f'{name}-{version}.dist-info'
    files = {
        **files,
        f'{info}/METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n',
        f'{info}/WHEEL': 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
    }
    record = ''.join(f'{path},,\n' for path in [*files, f'{info}/RECORD'])
    with zipfile.ZipFile(folder / f'{name}-{version}-py3-none-any.whl', 'w') as archive:
        for path, text in {**files, f'{info}/RECORD': record}.items():
            archive.writestr(path, text)


def make_sdist(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    metadata = f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
    with tarfile.open(folder / f'{name}-{version}.tar.gz', 'w:gz') as archive:
        for path, text in {**files, 'PKG-INFO': metadata}.items():
            entry = tarfile.TarInfo(f'{name}-{version}/{path}')
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))


class StandIn:
    """A small checkout with its own index and cache."""

    def __init__(self, folder: Path, tools: Path) -> None:
        self.checkout, self.index, self.cache = (folder / name for name in ('check out', 'index', 'cache'))
        for path in (self.checkout / 'tools' / 'misc', self.checkout / 'requirements', self.index):
            path.mkdir(parents=True)
        shutil.copy(SCRIPT, self.checkout / 'tools' / 'misc')
        for name in ('packaging', 'setuptools', 'wheel'):
            shutil.copy(next(tools.glob(f'{name}-*.whl')), self.index)
        (self.checkout / 'boltz_mm').mkdir()
        for name, text in {
            'constraints.txt': 'torch==2.13.0\nleaf==1\nbare==1\nonedl-mmcv==1\n',
            'requirements/build.txt': 'torch\nsetuptools\nwheel\n',
            'requirements/stack.txt': '-r build.txt\nleaf\n',
            'requirements/no-deps.txt': 'bare\n',
            'requirements/mmcv.txt': 'onedl-mmcv\n',
            'setup.py': OWN_SETUP,
            'boltz_mm/__init__.py': '',
        }.items():
            (self.checkout / name).write_text(text)
        make_wheel(self.index, 'torch', '2.13.0+cpu', {'torch/__init__.py': TORCH})
        make_wheel(self.index, 'leaf', '1', {'leaf.py': ''})
        plain = "from setuptools import setup; setup(name='bare', version='1', install_requires=['absent'])"
        make_sdist(self.index, 'bare', '1', {'setup.py': plain})
        make_sdist(
            self.index, 'onedl-mmcv', '1', {'setup.py': MMCV_SETUP, 'mmcv/__init__.py': '', 'mmcv/_ext.so': 'binary'}
        )

    def command(self, online: bool = True) -> dict:
        env = {key: value for key, value in os.environ.items() if not key.startswith('PIP_')}
        env.update(PIP_NO_INDEX='1', PIP_CONFIG_FILE=os.devnull, XDG_CACHE_HOME=str(self.cache))
        env.update(STAND_IN=str(self.index), **({'PIP_FIND_LINKS': str(self.index)} if online else {}))
        return dict(args=[sys.executable, str(self.checkout / 'tools' / 'misc' / 'setup_env.py')], env=env)

    def run(self, online: bool = True) -> subprocess.CompletedProcess:
        return subprocess.run(**self.command(online), capture_output=True, text=True, check=False)

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(**self.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    @property
    def builds(self) -> int:
        return len((self.index / 'builds').read_text())

    def can(self, statement: str) -> bool:
        python = self.checkout / '.venv' / 'bin' / 'python'
        return subprocess.run([str(python), '-c', statement], capture_output=True, check=False).returncode == 0


@pytest.fixture
def stand_in(tmp_path: Path, script: ModuleType) -> StandIn:
    tools = script.cache_folder()
    if not any(tools.glob('setuptools-*.whl')):
        pytest.skip('the wheel folder of `make setup` is not there to take setuptools from')
    return StandIn(tmp_path, tools)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f'{path} did not appear'
        time.sleep(0.05)


@pytest.mark.slow
def test_from_nothing_then_instantly_then_without_index(stand_in: StandIn) -> None:
    first = stand_in.run()
    assert first.returncode == 0, first.stdout + first.stderr
    assert 'compiling onedl-mmcv, once: this takes' in first.stdout
    assert stand_in.can('import leaf, mmcv, torch, boltz_mm')
    assert not list(stand_in.cache.rglob('.staging-*'))

    started = time.monotonic()
    second = stand_in.run(online=False)
    assert (second.returncode, second.stdout) == (0, '')
    assert time.monotonic() - started < 2

    shutil.rmtree(stand_in.checkout / '.venv')
    third = stand_in.run(online=False)
    assert third.returncode == 0, third.stdout + third.stderr
    assert stand_in.can('import leaf, mmcv, torch, boltz_mm')
    assert stand_in.builds == 1


@pytest.mark.slow
def test_without_index_and_wheels_one_sentence(stand_in: StandIn) -> None:
    result = stand_in.run(online=False)
    assert result.returncode == 1
    assert result.stderr.count('\n') == 1
    assert 'the package index that pip is configured for does not have torch' in result.stderr
    assert stand_in.run().returncode == 0  # and nothing stands in the way afterwards


@pytest.mark.slow
def test_a_lost_wheel_is_fetched_again(stand_in: StandIn) -> None:
    assert stand_in.run().returncode == 0
    next(stand_in.cache.rglob('leaf-*.whl')).unlink()
    shutil.rmtree(stand_in.checkout / '.venv')
    result = stand_in.run()
    assert result.returncode == 0, result.stderr
    assert 'has lost something' in result.stdout
    assert stand_in.builds == 1


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_build(stand_in: StandIn, number: int) -> None:
    (stand_in.index / 'slow').touch()
    process = stand_in.start()
    wait_for(stand_in.index / 'building', process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143), output
    assert not list(stand_in.cache.rglob('.staging-*')) and not list(stand_in.cache.rglob('onedl_mmcv-*.whl'))
    (stand_in.index / 'building').unlink()
    time.sleep(0.3)
    assert not (stand_in.index / 'building').exists()  # the compiler was stopped too

    (stand_in.index / 'slow').unlink()
    result = stand_in.run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert stand_in.can('import mmcv')


@pytest.mark.slow
def test_two_at_once_build_once(stand_in: StandIn, tmp_path: Path) -> None:
    other = StandIn(tmp_path / 'other', stand_in.index)
    other.index, other.cache = stand_in.index, stand_in.cache
    (stand_in.index / 'slow').touch()
    first = stand_in.start()
    wait_for(stand_in.index / 'building', first)
    second = other.start()
    time.sleep(1)
    (stand_in.index / 'slow').unlink()
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert 'another set-up is running' in outputs[1]
    assert stand_in.builds == 1


@pytest.mark.slow
def test_a_foreign_environment_is_not_touched(stand_in: StandIn) -> None:
    precious = stand_in.checkout / '.venv' / 'precious'
    precious.parent.mkdir()
    precious.touch()
    result = stand_in.run()
    assert result.returncode == 1 and 'was not made by this set-up' in result.stderr
    assert precious.exists()
