"""The tests of the operators that sample between points once more, with the CUDA operators in place of the CPU's.

Their kernels run on the CPU, one lane after the other (``cuda_point_deform_emulated.cpp``).
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
# They look at what the CPU's operators alone promise: an error for wrong numbers, several processes.
OTHERS = 'not reference and not errors and not other_entries and not check_for_themselves and not instruction_set'
FILES = ('test_point_deform_attention', 'test_point_interpolate', 'test_point_deform_registration',
         'emulated_point_deform')  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason='no C++ compiler'),
    pytest.mark.skipif('native' not in ops.available_backends(), reason='the schemas are in the native library'),
]


@pytest.fixture(scope='module')
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    linked = tmp_path_factory.mktemp('emulated') / 'point_deform.so'
    defines = ['-DUSE_CUDA', '-DPy_LIMITED_API=0x030A0000', '-DTORCH_TARGET_VERSION=0x020a000000000000']
    flags = ['-std=c++17', '-O2', '-ffp-contract=off', '-fPIC', '-shared', '-fvisibility=hidden', *defines]
    command = [*compiler(), *flags, *(f'-I{path}' for path in cpp_extension.include_paths())]
    command += [str(Path(__file__).with_name('cuda_point_deform_emulated.cpp'))]
    command += [f'-L{path}' for path in cpp_extension.library_paths()]
    result = subprocess.run(
        [*command, '-lc10', '-ltorch_cpu', '-ltorch', '-o', str(linked)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return linked


def test_operators(library: Path) -> None:
    tests = [f'tests/ops/{name}.py' for name in FILES]
    result = subprocess.run(
        [sys.executable, '-c', RUN, str(library), '-q', '-p', 'no:cacheprovider', '-k', OTHERS, *tests],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'BOLTZ_MM_OPS': 'native'},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert ' passed' in result.stdout
