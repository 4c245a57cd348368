"""The tests of the operators on points once more, with the CUDA operators in place of the CPU's.

Their kernels run on the CPU, one thread after the other (``cuda_points_emulated.cpp``); what only a device can show is
in ``test_cuda_points.py``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from boltz_mm import ops
from tests.ops.emulator import compiler

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
import pytest
import torch
import boltz_mm.ops
torch.ops.load_library(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""
# They look at what the CPU's operators alone promise: an error for what is not finite or outside, several processes.
OTHERS = 'not reference and not errors and not instruction_set and not time_for'
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason='no C++ compiler'),
    pytest.mark.skipif('native' not in ops.available_backends(), reason='the schemas are in the native library'),
]


@pytest.fixture(scope='module')
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    linked = tmp_path_factory.mktemp('emulated') / 'points.so'
    defines = ['-DUSE_CUDA', '-DPy_LIMITED_API=0x030A0000', '-DTORCH_TARGET_VERSION=0x020a000000000000']
    flags = ['-std=c++17', '-O2', '-ffp-contract=off', '-fPIC', '-shared', '-fvisibility=hidden', *defines]
    command = [*compiler(), *flags, *(f'-I{path}' for path in cpp_extension.include_paths())]
    command += [str(Path(__file__).with_name('cuda_points_emulated.cpp'))]
    command += [f'-L{path}' for path in cpp_extension.library_paths()]
    result = subprocess.run(
        [*command, '-lc10', '-ltorch_cpu', '-ltorch', '-o', str(linked)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return linked


def test_operators(library: Path) -> None:
    tests = [f'tests/ops/{name}' for name in ('test_neighbors.py', 'test_clustering.py', 'emulated_points.py')]
    result = subprocess.run(
        [sys.executable, '-c', RUN, str(library), '-q', '-p', 'no:cacheprovider', '-k', OTHERS, *tests],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'BOLTZ_MM_OPS': 'native'},
        capture_output=True,
        text=True,
        timeout=600,
    )
    # PyTorch says, once, that it takes a new one in place of the CPU's; emulated_points.py fails with any of the CPU's.
    assert 'ops/cuda/clustering.cpp' in result.stderr
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert ' passed' in result.stdout
