"""Set up ``.venv`` of a checkout: ``python3 tools/misc/setup_env.py``; the make targets call it.

Standard library only.  What happens, each step once:

1. The wheels of everything in ``requirements/``, under ``constraints.txt``, go to a wheel folder outside the checkout,
   ``${XDG_CACHE_HOME:-~/.cache}/boltz_mm/wheels/<Python, torch, platform>``.  onedl-mmcv is compiled there from source.
   A marker says that the folder is complete; from then on no package index is asked.
2. ``.venv`` is made and filled from that folder alone.
3. boltz_mm is installed into it in editable mode, with its native operators.

A stamp in ``.venv`` makes the next run instant.  A stopped run leaves nothing half-built behind: files enter the wheel
folder whole, and a ``.venv`` without a stamp is made anew.  Two runs wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = (3, 11), (3, 13)  # what the pinned versions have wheels for
NEEDED_GIB = 8.0  # wheel folder, .venv and the mmcv build, with a CPU torch
CONSTRAINTS = ('--constraint', str(CHECKOUT / 'constraints.txt'))
WHEEL_INPUTS = ('constraints.txt', 'requirements')
STACK_INPUTS = (*WHEEL_INPUTS, 'tools/misc/setup_env.py')
PACKAGE_INPUTS = ('setup.py', 'pyproject.toml', 'ops', 'boltz_mm/version.py')
OWN_MARK = 'made-by-boltz_mm'

# Words in pip's output that tell why it failed, and the sentence a user can act on.
_REASONS = (
    (r'No space left on device|Errno 28', 'the disk is full'),
    (
        r'NewConnectionError|Temporary failure in name resolution|Failed to establish a new connection|'
        r'ConnectTimeoutError|Network is unreachable|ProxyError',
        'no package index could be reached; connect to the network, or point pip to a mirror, and run this again',
    ),
    (r'Killed|Cannot allocate memory|out of memory', 'memory ran out; set MAX_JOBS=1 and run this again'),
    (
        r'No matching distribution found for (\S+)',
        'the package index that pip is configured for does not have {0}',
    ),
    (
        r'Cannot install (\S+) .*because these package versions have conflicting',
        'the package index that pip is configured for does not have {0} in the version of constraints.txt',
    ),
)


class SetupError(Exception):
    """A failure with its one sentence."""


def say(text: str) -> None:
    """Print one line of progress at once."""
    print(f'[setup] {text}', flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def interpreter() -> str:
    """The Python to build ``.venv`` with: this one, or another supported one on the PATH.

    Raises:
        SetupError: If there is none.
    """
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(OLDEST[1], NEWEST[1] + 1):
        found = shutil.which(f'python3.{minor}')
        if found:
            return found
    raise SetupError(
        f'Python {platform.python_version()} is not supported here: install Python 3.{OLDEST[1]} to 3.{NEWEST[1]}, '
        'or name one with make PYTHON=/path/to/python'
    )


def check_compiler() -> None:
    """Compile an empty C++ file that includes Python.h.

    Raises:
        SetupError: If there is no C++ compiler, or it does not find Python's headers.
    """
    compiler = os.environ.get('CXX') or next(filter(shutil.which, ('c++', 'g++', 'clang++')), None)
    if compiler is None:
        raise SetupError('no C++ compiler found: install g++ or clang++ (on Debian: apt-get install g++)')
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / 'probe.cpp'
        source.write_text('#include <vector>\n#include <Python.h>\n')
        command = [*compiler.split(), '-std=c++17', '-fsyntax-only', f'-I{sysconfig.get_paths()["include"]}']
        try:
            result = subprocess.run([*command, str(source)], stderr=subprocess.PIPE, text=True, check=False)
        except OSError as error:
            raise SetupError(f'the C++ compiler {compiler} cannot be run: {error}') from error
    if 'Python.h' in result.stderr:
        raise SetupError("Python's C headers are missing: install them (on Debian: apt-get install python3-dev)")
    if result.returncode:
        raise SetupError(f'the C++ compiler {compiler} does not work: {result.stderr.strip().splitlines()[0]}')


def check_space(folder: Path) -> None:
    """Refuse to begin a download that cannot end.

    Raises:
        SetupError: If less than the space needed is free.
    """
    free = shutil.disk_usage(folder).free / 2**30
    if free < NEEDED_GIB:
        raise SetupError(f'the disk of {folder} has {free:.1f} GiB free; the set-up needs {NEEDED_GIB:.0f} GiB')


# ---------------------------------------------------------------------------------------------------------------------
# Names and stamps


def digest(inputs: tuple[str, ...], *more: str) -> str:
    """A hash over files and folders of the checkout, and further words."""
    state = hashlib.sha256('\0'.join(more).encode())
    for name in inputs:
        path = CHECKOUT / name
        files = sorted(f for f in path.rglob('*') if f.is_file()) if path.is_dir() else [path]
        for file in filter(Path.is_file, files):
            state.update(f'{file.relative_to(CHECKOUT)}\0'.encode())
            state.update(file.read_bytes())
    return state.hexdigest()[:16]


def pinned(distribution: str) -> str:
    """The version of a distribution in constraints.txt."""
    match = re.search(rf'^{re.escape(distribution)}==(\S+)$', (CHECKOUT / 'constraints.txt').read_text(), re.M)
    if match is None:
        raise SetupError(f'constraints.txt has no version of {distribution}')
    return match.group(1)


def cache_folder() -> Path:
    """The wheel folder for this Python, torch and platform."""
    root = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    key = f'{sys.implementation.cache_tag}-torch{pinned("torch")}-{sysconfig.get_platform()}'
    return root / 'boltz_mm' / 'wheels' / re.sub(r'[^\w.-]', '_', key)


class Stamp:
    """What was installed into ``.venv``, as hashes of its inputs."""

    def __init__(self, venv: Path) -> None:
        self.path = venv / 'boltz_mm-setup.json'
        try:
            self.content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.content = {}

    def holds(self, name: str, value: str) -> bool:
        """Whether the step ``name`` was done with the same inputs and all that it made is still there."""
        entry = self.content.get(name, {})
        return entry.get('hash') == value and all((CHECKOUT / file).exists() for file in entry.get('files', []))

    def write(self, name: str, value: str, files: list[str]) -> None:
        """Note a step as done, in one move."""
        self.content[name] = {'hash': value, 'files': files}
        partial = self.path.with_suffix('.partial')
        partial.write_text(json.dumps(self.content, indent=1))
        os.replace(partial, self.path)


# ---------------------------------------------------------------------------------------------------------------------
# Running pip


def run(command: list[str], log: Path, *, env: dict[str, str] | None = None, pulse: str = '') -> None:
    """Run a command, its output in ``log``; every minute say that it still runs.

    Args:
        command: What to run.
        log: File for the output, written anew.
        env: Variables to set on top of the environment.
        pulse: What to call the work in the line of every minute.

    Raises:
        SetupError: If it fails, with the reason in words where the output tells it.
    """
    started = time.monotonic()
    with log.open('w') as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # so that stopping reaches the compilers that pip starts
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=60)
                    break
                except subprocess.TimeoutExpired:
                    say(f'{pulse or "still running"}: {(time.monotonic() - started) / 60:.0f} min')
        except BaseException:
            stop(process)
            raise
    if code:
        text = log.read_text(errors='replace')
        raise SetupError(reason(text) or f'a step failed, its output is in {log}; its last words: {last_words(text)}')


def stop(process: subprocess.Popen) -> None:
    """End a command and all that it started, with time to remove its temporary files."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
            return


def reason(text: str) -> str | None:
    """The sentence for a failure that pip's output explains."""
    for pattern, sentence in _REASONS:
        match = re.search(pattern, text)
        if match:
            return sentence.format(*match.groups())
    return None


def last_words(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), 'none')


def pip(python: Path, *arguments: str, isolated: bool) -> list[str]:
    """A pip command line; ``isolated`` means without the user's index settings, for steps that need no index."""
    flags = ['--no-input', '--disable-pip-version-check', *(['--isolated'] if isolated else [])]
    return [str(python), '-m', 'pip', *flags, *arguments]


# ---------------------------------------------------------------------------------------------------------------------
# The wheel folder


@contextlib.contextmanager
def locked(folder: Path):
    """Hold the folder against another run of this script."""
    import fcntl

    with (folder / '.lock').open('w') as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            say('another set-up is running; waiting for it')
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fetch(
    python: Path, folder: Path, log: Path, *arguments: str, env: dict[str, str] | None = None, pulse: str
) -> None:
    """Let ``pip wheel`` fill an empty folder beside, then move each wheel into ``folder`` whole."""
    with tempfile.TemporaryDirectory(prefix='.staging-', dir=folder) as staging:
        common = [
            '--wheel-dir',
            staging,
            '--find-links',
            str(folder),
            '--constraint',
            str(CHECKOUT / 'constraints.txt'),
        ]
        run(pip(python, 'wheel', *common, *arguments, isolated=False), log, env=env, pulse=pulse)
        for wheel in Path(staging).glob('*.whl'):
            os.replace(wheel, folder / wheel.name)


def requirement(name: str) -> tuple[str, str]:
    """Pip's arguments for one file of ``requirements/``."""
    return '--requirement', str(CHECKOUT / 'requirements' / name)


def install(python: Path, folder: Path, log: Path, *arguments: str) -> None:
    """Install from the wheel folder alone, whatever pip is configured for."""
    common = ['--no-index', '--find-links', str(folder), *CONSTRAINTS]
    run(pip(python, 'install', '--quiet', *common, *arguments, isolated=True), log)


def mmcv_folder(python: Path, folder: Path) -> Path:
    """Where the mmcv wheel for this very build of torch is kept (a CPU and a CUDA build have one version)."""
    question = 'import torch; print(torch.__version__, torch.version.cuda if torch.cuda.is_available() else "cpu")'
    answer = subprocess.run([str(python), '-c', question], capture_output=True, text=True, check=True).stdout.split()
    version, device = answer[-2:]
    return folder / re.sub(r'[^\w.-]', '_', f'mmcv{pinned("onedl-mmcv")}-torch{version}-{device}')


def build_mmcv(python: Path, folder: Path, target: Path, logs: Path) -> None:
    """Compile onedl-mmcv into ``target``, unless it is there.

    Raises:
        SetupError: If the build fails, or leaves out the compiled operators.
    """
    if any(target.glob('onedl_mmcv-*.whl')):
        return
    target.mkdir(exist_ok=True)
    install(python, folder, logs / 'build-tools.log', *requirement('build.txt'))
    say('compiling onedl-mmcv, once: this takes 6 to 12 minutes on 2 cores (MAX_JOBS limits the processes)')
    path = f'{python.parent}{os.pathsep}{os.environ.get("PATH", "")}'  # ninja stands beside python
    env = {'PATH': path, 'MMCV_WITH_OPS': '1', 'VIRTUAL_ENV': str(python.parent.parent)}
    arguments = ['--no-deps', '--no-build-isolation', '--no-cache-dir', *requirement('mmcv.txt')]
    fetch(python, target, logs / 'mmcv.log', *arguments, env=env, pulse='compiling onedl-mmcv')
    for wheel in target.glob('onedl_mmcv-*.whl'):
        if b'mmcv/_ext' not in wheel.read_bytes():
            wheel.unlink()
            raise SetupError(f'onedl-mmcv was built without its operators; the output is in {logs / "mmcv.log"}')


def fill(python: Path, folder: Path, logs: Path) -> None:
    """Bring every wheel into the folder: the resolved ones, those without dependencies, and mmcv."""
    check_space(folder)
    say('fetching the wheels (about 500 MB with a CPU torch; a few minutes)')
    fetch(python, folder, logs / 'stack.log', *requirement('stack.txt'), pulse='fetching wheels')
    install(python, folder, logs / 'build-tools.log', *requirement('build.txt'))
    arguments = ['--no-deps', '--no-build-isolation', *requirement('no-deps.txt')]
    fetch(python, folder, logs / 'no-deps.log', *arguments, pulse='fetching wheels')


# ---------------------------------------------------------------------------------------------------------------------
# The environment


def make_venv(venv: Path, log: Path) -> Path:
    """Make an empty environment at ``venv``, in place of an older one of ours.

    Raises:
        SetupError: If something stands there that this script did not make.
    """
    if venv.exists():
        if not (venv / OWN_MARK).exists():
            raise SetupError(f'{venv} was not made by this set-up; move it away and run this again')
        say(f'making {venv.name} anew: it is incomplete, or made from other requirements')
        shutil.rmtree(venv)
    venv.mkdir()
    (venv / OWN_MARK).write_text('tools/misc/setup_env.py\n')
    try:
        run([sys.executable, '-m', 'venv', str(venv)], log)
    except SetupError as error:
        raise SetupError(f'no environment could be made (on Debian: apt-get install python3-venv): {error}') from error
    return venv / 'bin' / 'python'


def set_up_stack(venv: Path, wheels_hash: str) -> None:
    """Make ``.venv`` with everything but boltz_mm itself, filling the wheel folder first where it is not complete."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    logs = folder / 'logs'
    logs.mkdir(exist_ok=True)
    with locked(folder):
        for old in folder.glob('.staging-*'):  # of a run that was killed outright
            shutil.rmtree(old)
        complete = folder / f'complete-{wheels_hash}'
        python = make_venv(venv, logs / 'venv.log')
        for again in (False, True):
            fresh = not complete.exists()
            if fresh:
                fill(python, folder, logs)
            try:
                target = install_stack(python, folder, logs)
            except SetupError:
                if fresh or again:
                    raise
                say('the wheel folder has lost something; fetching it again')
                complete.unlink()
                continue
            break
        complete.touch()
    say(f'installed from {folder} (mmcv from {target.name})')


def install_stack(python: Path, folder: Path, logs: Path) -> Path:
    """Install all requirements into the environment; returns the folder of the mmcv wheel used."""
    install(python, folder, logs / 'install.log', *requirement('build.txt'))
    target = mmcv_folder(python, folder)
    build_mmcv(python, folder, target, logs)
    say('installing into .venv')
    install(python, folder, logs / 'install.log', *requirement('stack.txt'))
    install(python, folder, logs / 'install.log', '--no-deps', *requirement('no-deps.txt'))
    install(python, target, logs / 'install.log', '--no-deps', *requirement('mmcv.txt'))
    return target


def set_up_package(venv: Path) -> list[str]:
    """Install boltz_mm in editable mode; returns the libraries that were built."""
    say('building boltz_mm and its operators')
    python = venv / 'bin' / 'python'
    env = {'PATH': f'{python.parent}{os.pathsep}{os.environ.get("PATH", "")}'}
    arguments = ['--no-index', '--no-deps', '--no-build-isolation', '--editable', str(CHECKOUT)]
    run(pip(python, 'install', '--quiet', *arguments, isolated=True), venv / 'boltz_mm-build.log', env=env)
    libraries = (CHECKOUT / 'boltz_mm').rglob('*.so')
    return sorted(str(library.relative_to(CHECKOUT)) for library in libraries)


def set_up(venv: Path) -> None:
    """Bring ``.venv`` up to date, doing only what is not done."""
    where = f'{sys.version} {sys.executable} {venv}'  # an environment holds absolute paths: a moved one is made anew
    stack, package = digest(STACK_INPUTS, where), digest(PACKAGE_INPUTS, where)
    stamp = Stamp(venv)
    if not (stamp.holds('stack', stack) and (venv / 'bin' / 'python').exists()):
        check_compiler()
        set_up_stack(venv, digest(WHEEL_INPUTS))
        stamp = Stamp(venv)
        stamp.write('stack', stack, [])
    if not stamp.holds('package', package):
        stamp.write('package', package, set_up_package(venv))
        say('done')


def main() -> int:
    """Run the set-up; every failure is one sentence."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        python = interpreter()
        if python != sys.executable:
            os.execv(python, [python, __file__])
        set_up(CHECKOUT / '.venv')
    except KeyboardInterrupt:
        say('stopped; what was fetched or built so far is kept, run it again to go on')
        return 130
    except SetupError as error:
        print(f'[setup] failed: {error}', file=sys.stderr)
        return 1
    except OSError as error:
        sentence = 'the disk is full' if error.errno == errno.ENOSPC else str(error)
        print(f'[setup] failed: {sentence}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
