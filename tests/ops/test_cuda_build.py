"""The CUDA library compiles and links, with or without a GPU: ``setup.py`` builds it wherever there is nvcc, the
kernels for every architecture of a wheel, against the installed torch, be it built for the CPU only or not.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from boltz_mm import ops
from tests.ops.emulator import compiler

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = [
    f'{name}{suffix}'
    for name in (
        *('box_attention', 'deform_attention', 'instance_attention', 'cluster_wf', 'point_merge'),
        *('point_deform_attention', 'inverse_distance_interpolate', 'cluster_attention'),
    )
    for suffix in ('', '_backward')
] + ['knn_points', 'space_filling_order']
STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
LOAD = """
import ctypes, json, sys
import boltz_mm.ops
import torch
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
names = json.loads(sys.argv[3])
print(json.dumps([n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key('boltz_mm::' + n, 'CUDA')]))
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which('nvcc') is None, reason='no nvcc on the PATH')]


def run(*command: object, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f'{command} failed:\n{result.stdout}{result.stderr}'
    return result.stdout


@pytest.fixture(scope='module')
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built in a scratch folder."""
    folder = tmp_path_factory.mktemp('cuda')
    places = ('--build-lib', folder / 'lib', '--build-temp', folder / 'temp')
    run(sys.executable, 'setup.py', '-q', 'build_ext', *places, BOLTZ_MM_CUDA='1')
    (built,) = (folder / 'lib' / 'boltz_mm').glob('_C_cuda.*')
    return built


def test_kernels_and_launches_fit_together(library: Path) -> None:
    """Nothing of ours and nothing of the CUDA runtime is left to find when the library is loaded."""
    missing = [line.split()[-1] for line in run('nm', '-D', '--undefined-only', '-C', library).splitlines()]
    assert missing
    assert not [name for name in missing if 'boltz_mm' in name or name.startswith('cuda')]
    assert 'aoti_torch_get_current_cuda_stream' in missing


@pytest.mark.skipif('native' not in ops.available_backends(), reason='the schemas are in the native library')
@pytest.mark.skipif(torch.version.cuda is not None, reason='the installed library is loaded, a second one would clash')
def test_library_registers_every_operator(library: Path) -> None:
    """A torch for the CPU loads it too, if it is given the one function that only a torch for CUDA has."""
    source, stream = library.with_name('stream.cpp'), library.with_name('stream.so')
    source.write_text(STREAM)
    run(*compiler(), '-shared', '-fPIC', source, '-o', stream)
    said = run(sys.executable, '-c', LOAD, stream, library, json.dumps(OPERATORS), PYTHONPATH=str(ROOT))
    assert json.loads(said) == OPERATORS
