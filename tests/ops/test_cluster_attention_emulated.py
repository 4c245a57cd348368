"""The tests of ``cluster_attention`` once more, with the CUDA operators and their emulated kernels for the CPU's.

Only what needs a device (launches, memory, speed) is left out; cluster ids out of range are held here, since on CUDA
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
module = sys.modules['boltz_mm.ops.cluster_attention']
module._order = lambda nearest: None if nearest is None else nearest.flatten(1).argsort(stable=True)
"""
RUN = f'{PREPARE}sys.exit(pytest.main(sys.argv[2:]))'
WIDTHS = f"""{PREPARE}
from tests.ops.cluster_cases import make_case
from tests.ops.test_cluster_attention import assert_same
# Rows in vectors and not, of one lane and of more than a warp holds; more pairs than lanes.
for depth in (1, 8, 17, 24, 32, 48, 65, 300):
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 4e-3)):
        for name, changes in (('partial', {{'cluster_size': 13}}), ('global', {{'keys': 70}})):
            case = make_case(name, dtype, depth=depth, queries=9, scale=depth**-0.5, **changes)
            assert_same(case.run(), case.expected(), rtol=bound, atol=bound)
print('same')
"""
OUT_OF_RANGE = f"""{PREPARE}
from tests.ops.cluster_cases import make_case
for name in ('partial', 'bounded'):
    case = make_case(name)
    output, gradients = case.run()
    nearest = case.others['nearest'].long()
    outside = torch.tensor([-1, 4, 2**62]).expand(len(nearest), nearest.shape[1], 3)
    ours, others = case.run(nearest=torch.cat([nearest[..., :1], outside, nearest[..., 1:]], -1))
    torch.testing.assert_close(ours, output)
    torch.testing.assert_close(others, gradients)
    nothing, _ = case.run(nearest=outside)
    torch.testing.assert_close(nothing, case.leaves['blank_value'].flatten().expand_as(nothing))
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
    command += [str(Path(__file__).with_name('cuda_cluster_emulated.cpp'))]
    command += [f'-L{path}' for path in cpp_extension.library_paths()]
    command += ['-lc10', '-ltorch_cpu', '-ltorch', '-o', str(linked)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return linked


def run(code: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, '-c', code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    # PyTorch says that it takes the new ones in place of the CPU's.
    assert 'ops/cuda/cluster_attention.cpp' in result.stderr
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return result.stdout


def test_operators(library: Path) -> None:
    chosen = 'not reference and not out_of_range and not instruction_sets and not chunks and not products'
    arguments = ['-q', '-p', 'no:cacheprovider', '-k', chosen, 'tests/ops/test_cluster_attention.py']
    assert ' passed' in run(RUN, library, *arguments)


def test_any_width_and_dtype(library: Path) -> None:
    assert 'same' in run(WIDTHS, library)


def test_clusters_out_of_range_count_as_nothing(library: Path) -> None:
    assert 'same' in run(OUT_OF_RANGE, library)
