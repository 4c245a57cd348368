"""The tests of ``point_merge`` once more, with the CUDA operators and their device functions in place of the CPU's.

Only what needs a device (launches, memory, speed) is left out; out-of-range neighbours are held here, since on CUDA
they count as nothing.
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
PREPARE = """
import sys
import pytest
import torch
import boltz_mm.ops
torch.ops.load_library(sys.argv[1])
sys.modules['boltz_mm.ops.point_merge']._order = lambda clusters: clusters.flatten(1).argsort(stable=True)
"""
RUN = f'{PREPARE}sys.exit(pytest.main(sys.argv[2:]))'
OUT_OF_RANGE = f"""{PREPARE}
from tests.ops.test_point_merge import make_case
case = make_case('clusters')
nearest = case.kwargs['nearest'].long()
kept = [result.clone() for result in case.run()]
case.kwargs['nearest'] = torch.cat([nearest, torch.tensor([-1, 3, 2**62]).expand(2, 5, 3)], -1)
for ours, expected in zip(case.run(), kept, strict=True):
    torch.testing.assert_close(ours, expected)
print('same')
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
    command += [str(Path(__file__).with_name('cuda_merge_emulated.cpp'))]
    command += [f'-L{path}' for path in cpp_extension.library_paths()]
    command += ['-lc10', '-ltorch_cpu', '-ltorch', '-o', str(linked)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return linked


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, '-c', code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    # PyTorch says that it takes the new ones in place of the CPU's.
    assert 'ops/cuda/point_merge.cpp' in result.stderr
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return result


def test_operators(library: Path) -> None:
    chosen = 'native and not out_of_range'
    arguments = ['-q', '-p', 'no:cacheprovider', '-k', chosen, 'tests/ops/test_point_merge.py']
    assert ' passed' in run(RUN, library, *arguments).stdout


def test_neighbours_out_of_range_count_as_nothing(library: Path) -> None:
    assert 'same' in run(OUT_OF_RANGE, library).stdout
