"""Scratch copies of the checkout, and clean environments that lie on top of the one the tests run in.

An environment is a fresh venv; what the tests' own environment has (torch, the OpenMMLab stack) is put behind its own
packages on the path, so that nothing but boltz_mm has to be installed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_paths()['purelib'])


def run(*command: object, cwd: Path, ok: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run a command outside of the checkout's reach; what it prints is in ``stdout``.

    Args:
        command: Words of the command.
        cwd: Working directory.
        ok: Whether it has to succeed.
        env: Variables to set; an empty value removes one.
    """
    variables = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'BOLTZ_MM_OPS')}
    variables.update({'PIP_NO_INDEX': '1', 'NO_PROXY': '127.0.0.1', 'OMP_NUM_THREADS': '2', **env})
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={key: value for key, value in variables.items() if value},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (result.returncode == 0) == ok, f'{command} ended with {result.returncode}:\n{result.stdout[-6000:]}'
    return result


def copy_checkout(target: Path) -> Path:
    """Copy what git would have: no built libraries, no environment, no data."""
    ignored = shutil.ignore_patterns(
        '.git', '.venv', '__pycache__', '*.so', '*.egg-info', 'build', 'dist', 'data', 'work_dirs', '.*_cache', 'tests'
    )
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


class Environment:
    """A clean virtual environment with boltz_mm in it, in front of what the tests' environment has."""

    def __init__(self, folder: Path, *install: object) -> None:
        self.folder = folder
        run(sys.executable, '-m', 'venv', '--without-pip', folder, cwd=folder.parent)
        self.python = folder / 'bin' / 'python'
        self.site = next(folder.glob('lib/python*/site-packages'))
        if '--editable' in install:
            self._show_stack()  # the build needs torch and setuptools
        self.pip('install', '--no-deps', '--no-build-isolation', '--force-reinstall', *install)
        self._show_stack()

    def _show_stack(self) -> None:
        (self.site / 'stack.pth').write_text(f'{SITE}\n')

    def hide_stack(self) -> None:
        (self.site / 'stack.pth').unlink()

    def pip(self, *words: object) -> subprocess.CompletedProcess:
        return run(sys.executable, '-m', 'pip', '--python', self.python, *words, cwd=self.folder)

    def mim(self, *words: object, cwd: Path, ok: bool = True) -> str:
        return run(self.python, '-m', 'mim', *words, cwd=cwd, ok=ok).stdout
