"""The tests of the operators once more, with the CUDA operators and their emulated kernels in place of the CPU's.

So all that is between PyTorch and a launch runs without a device: checks, memory, strides, gradients in low precision.
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
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason='no C++ compiler'),
    pytest.mark.skipif('native' not in ops.available_backends(), reason='the schemas are in the native library'),
]


@pytest.fixture(scope='module')
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    linked = tmp_path_factory.mktemp('emulated') / 'operators.so'
    defines = ['-DUSE_CUDA', '-DPy_LIMITED_API=0x030A0000', '-DTORCH_TARGET_VERSION=0x020a000000000000']
    command = [*compiler(), '-std=c++17', '-O2', '-fPIC', '-shared', '-fvisibility=hidden', *defines]
    command += [f'-I{path}' for path in cpp_extension.include_paths()]
    command += [str(Path(__file__).with_name(name)) for name in ('cuda_operators_emulated.cpp', 'cuda_emulator.cpp')]
    command += [f'-L{path}' for path in cpp_extension.library_paths()]
    result = subprocess.run(
        [*command, '-lc10', '-ltorch_cpu', '-ltorch', '-o', str(linked)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return linked


@pytest.mark.parametrize('tests', ['test_operators.py', 'test_registration.py'])
def test_operators(library: Path, tests: str) -> None:
    arguments = ['-q', '-p', 'no:cacheprovider', '-k', 'native or not reference', f'tests/ops/{tests}']
    result = subprocess.run(
        [sys.executable, '-c', RUN, str(library), *arguments],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    # PyTorch says that it takes the new ones in place of the CPU's.
    assert 'ops/cuda/grid_attention.cpp' in result.stderr
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert ' passed' in result.stdout
