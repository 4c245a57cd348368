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
from tests.ops.emulator import compiler

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ('arch=compute_80,code=sm_80', 'arch=compute_90,code=sm_90', 'arch=compute_90,code=compute_90')
NVCC = shutil.which('nvcc')
OPERATORS = [
    f'{name}{suffix}'
    for name in ('box_attention', 'deform_attention', 'instance_attention')
    for suffix in ('', '_backward')
]
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
    includes = [f'-I{path}' for path in cpp_extension.include_paths()]
    defines = ['-DUSE_CUDA', '-DPy_LIMITED_API=0x030A0000', '-DTORCH_TARGET_VERSION=0x020a000000000000']
    launches = sorted((ROOT / 'ops' / 'cuda').glob('*.cpp'))
    assert launches
    for source in launches:
        objects.append(folder / f'{source.stem}_launch.o')
        run(*compiler(), '-std=c++17', '-O1', '-fPIC', '-fvisibility=hidden', *defines, *includes, '-c', source,
            '-o', objects[-1])  # fmt: skip
    linked = folder / '_C_cuda.so'
    plan = run(NVCC, '--dryrun', '-x', 'cu', '-c', os.devnull, '-o', os.devnull)
    home = Path(next(line for line in plan.splitlines() if line.startswith('#$ TOP=')).split('=', 1)[1].strip())
    search = [f'-L{path}' for path in (*cpp_extension.library_paths(), home / 'lib64', home / 'lib')]
    run(*compiler(), '-shared', *objects, *search, '-lc10', '-ltorch_cpu', '-ltorch',
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
    """A torch for the CPU loads it too, if it is given the one function that only a torch for CUDA has."""
    source, stream = library.with_name('stream.cpp'), library.with_name('stream.so')
    source.write_text(STREAM)
    run(*compiler(), '-shared', '-fPIC', source, '-o', stream)
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', LOAD, str(stream), str(library), json.dumps(OPERATORS)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == OPERATORS
