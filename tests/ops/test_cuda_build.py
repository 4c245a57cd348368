"""The CUDA library compiles and links, with or without a GPU: the kernels by nvcc alone, the operators by the C++
compiler against the installed torch, be it built for the CPU only or not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from boltz_mm import ops

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ('arch=compute_80,code=sm_80', 'arch=compute_90,code=sm_90', 'arch=compute_90,code=compute_90')
NVCC = shutil.which('nvcc')
COMPILER = os.environ.get('CXX') or shutil.which('g++') or 'c++'
OPERATORS = [
    f'{name}{suffix}'
    for name in ('box_attention', 'deform_attention', 'instance_attention')
    for suffix in ('', '_backward')
]
LOAD = """
import json, sys
import boltz_mm.ops
import torch
torch.ops.load_library(sys.argv[1])
names = json.loads(sys.argv[2])
print(json.dumps([n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key('boltz_mm::' + n, 'CUDA')]))
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason='no nvcc on the PATH')]


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f'{command[0]} failed:\n{result.stdout}{result.stderr}'
    return result.stdout + result.stderr


@pytest.fixture(scope='module')
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole library, built in a scratch folder as ``setup.py`` builds it."""
    folder = tmp_path_factory.mktemp('cuda')
    targets = [flag for target in TARGETS for flag in ('-gencode', target)]
    flags = ['-O3', '-std=c++17', '-cudart', 'static', '-Werror', 'all-warnings', '-Xcompiler', '-fPIC', *targets]
    sources = sorted((ROOT / 'ops' / 'cuda').glob('*.cu'))
    assert sources
    objects = [folder / f'{source.stem}.o' for source in sources]
    for source, compiled in zip(sources, objects, strict=True):
        run(NVCC, *flags, '-c', source, '-o', compiled)
    home = Path(NVCC).resolve().parent.parent
    includes = [f'-I{path}' for path in (*cpp_extension.include_paths(), home / 'include')]
    defines = ['-DUSE_CUDA', '-DPy_LIMITED_API=0x030A0000', '-DTORCH_TARGET_VERSION=0x020a000000000000']
    launches = sorted((ROOT / 'ops' / 'cuda').glob('*.cpp'))
    assert launches
    for source in launches:
        objects.append(folder / f'{source.stem}_launch.o')
        run(*COMPILER.split(), '-std=c++17', '-O1', '-fPIC', '-fvisibility=hidden', *defines, *includes, '-c', source,
            '-o', objects[-1])  # fmt: skip
    linked = folder / '_C_cuda.so'
    search = [f'-L{path}' for path in (*cpp_extension.library_paths(), home / 'lib64', home / 'lib')]
    # Lazy, because a torch for the CPU has no function that returns a stream.
    run(*COMPILER.split(), '-shared', '-Wl,-z,lazy', *objects, *search, '-lc10', '-ltorch_cpu', '-ltorch',
        '-lcudart_static', '-ldl', '-lrt', '-lpthread', '-o', linked)  # fmt: skip
    return linked


def test_kernels_and_launches_fit_together(library: Path) -> None:
    """Nothing of ours and nothing of the CUDA runtime is left to find when the library is loaded."""
    missing = [line.split()[-1] for line in run('nm', '-D', '--undefined-only', '-C', library).splitlines()]
    assert missing
    assert not [name for name in missing if 'boltz_mm' in name or name.startswith('cuda')]
    assert 'aoti_torch_get_current_cuda_stream' in missing


@pytest.mark.skipif('native' not in ops.available_backends(), reason='the schemas are in the native library')
@pytest.mark.skipif(torch.version.cuda is not None, reason='the installed library is loaded, a second one would clash')
def test_library_registers_every_operator(library: Path) -> None:
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', LOAD, str(library), json.dumps(OPERATORS)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == OPERATORS
