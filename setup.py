"""Build the operator library and assemble the wheel; the metadata stands in ``pyproject.toml``.

* ``boltz_mm._C`` (CPU) is built with torch's stable ABI and Python's limited API: one binary for Python >= 3.10 and
  torch >= 2.10.  Where it cannot be built the install succeeds without it, on the PyTorch reference, with one warning.
* ``boltz_mm._C_cuda`` is a second library.  ``BOLTZ_MM_CUDA=auto`` (default) builds it where torch has CUDA and nvcc is
  found, ``1`` builds it or fails, ``0`` does not build it.
* mim reads ``.mim`` (configs, tools, indexes) from the dist-info folder, mmengine from the package: both get
  a copy while a wheel is assembled, so that nothing is left in the source tree.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
NO_TORCH = (
    'boltz_mm is built against the torch that is installed, and none was found: run `pip install torch setuptools '
    'wheel`, then `pip install --no-build-isolation .`'
)
MIM_CONTENT = ('configs', 'tools', 'model-index.yml', 'dataset-index.yml')
CUDA_TARGETS = ('arch=compute_80,code=sm_80', 'arch=compute_90,code=sm_90', 'arch=compute_90,code=compute_90')

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = cpp_extension = None


def sources(*patterns: str) -> list[str]:
    """Files below the root, relative to it, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of torch's search, or of the PATH."""
    homes = [os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH'), getattr(cpp_extension, 'CUDA_HOME', None)]
    candidates = [Path(home) / 'bin' / 'nvcc' for home in homes if home]
    on_path = shutil.which('nvcc')
    candidates += [Path(on_path)] if on_path else []
    return next((path for path in candidates if path.exists()), None)


def toolkit_of(nvcc: Path) -> Path:
    """The folder of the CUDA toolkit, asked of nvcc: the one on the PATH may be a script that stands elsewhere."""
    command = [str(nvcc), '--dryrun', '-x', 'cu', '-c', os.devnull, '-o', os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    top = next((line.split('=', 1)[1].strip() for line in said if line.startswith('#$ TOP=')), None)
    return Path(top).resolve() if top else nvcc.resolve().parent.parent


def wants_cuda() -> bool:
    """Whether to build the CUDA library, by BOLTZ_MM_CUDA and by what is there."""
    choice = os.environ.get('BOLTZ_MM_CUDA', 'auto')
    if choice not in ('auto', '0', '1'):
        raise SystemExit(f'BOLTZ_MM_CUDA must be auto, 0 or 1, got {choice!r}')
    if choice == '0' or cpp_extension is None or not sources('ops/cuda/*.cu'):
        return False
    if choice == '1' and find_nvcc() is None:
        raise SystemExit('BOLTZ_MM_CUDA=1 needs nvcc: put it on the PATH or set CUDA_HOME')
    return choice == '1' or (torch.version.cuda is not None and find_nvcc() is not None)


def compile_args() -> list[str]:
    """Flags of all C++ sources; instruction sets are chosen inside of the sources."""
    defines = ['-DPy_LIMITED_API=0x030A0000', '-DTORCH_TARGET_VERSION=0x020a000000000000']
    if sys.platform == 'win32':
        return ['/O2', *(flag.replace('-D', '/D', 1) for flag in defines)]
    # No absolute path in an error text, multiply-adds that a compiler may not fuse in strict ISO mode, and square roots
    # without errno, which would keep them out of vectors.
    paths = [f'-fmacro-prefix-map={ROOT}/=', f'-fmacro-prefix-map={Path(torch.__file__).parent}/=torch/']
    floats = ['-ffp-contract=fast', '-fno-math-errno']
    return ['-O3', '-g0', '-fvisibility=hidden', *floats, '-Wno-psabi', *paths, *defines]


def cpp_library(name: str, files: list[str], **extra: object) -> Extension:
    return cpp_extension.CppExtension(
        name,
        files,
        include_dirs=extra.pop('include_dirs', []),
        extra_compile_args={'cxx': [*compile_args(), *extra.pop('flags', [])]},
        py_limited_api=True,
        **extra,
    )


def cuda_library() -> Extension:
    """The CUDA library; its ``.cu`` objects are added by ``BuildOperators``, which compiles them with nvcc alone."""
    home = toolkit_of(find_nvcc())
    # Named, because linkers drop libtorch, through which it would be found; a torch for the CPU has none.
    has_cuda = any((Path(folder) / 'libtorch_cuda.so').exists() for folder in cpp_extension.library_paths())
    return cpp_library(
        'boltz_mm._C_cuda',
        sources('ops/cuda/*.cpp'),
        include_dirs=[str(home / 'include')],
        flags=['-DUSE_CUDA'],
        library_dirs=[str(folder) for folder in (home / 'lib64', home / 'lib') if folder.exists()],
        libraries=[*(['torch_cuda'] if has_cuda else []), 'cudart_static', 'dl', 'rt', 'pthread'],
    )


def extensions() -> list[Extension]:
    if cpp_extension is None:
        return [Extension('boltz_mm._C', [])]  # BuildOperators says what is missing
    found = [cpp_library('boltz_mm._C', sources('ops/registration.cpp', 'ops/cpu/*.cpp'))]
    return [*found, cuda_library()] if wants_cuda() else found


class BuildOperators(cpp_extension.BuildExtension if cpp_extension else build_ext):
    """Build each library; one that cannot be built is left out with a warning, unless it was demanded."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if cpp_extension is None:
            raise SystemExit(NO_TORCH)
        if self.parallel is None:
            self.parallel = os.cpu_count()

    def run(self) -> None:
        wanted, built, compiler = self.extensions, [], self.compiler
        for extension in wanted:
            self.extensions, self.compiler = [extension], compiler  # a run puts an object in place of its name
            try:
                if extension.name.endswith('_cuda'):
                    extension.extra_objects = self.compile_cuda()
                super().run()
            except Exception as error:  # no compiler, or one that fails in whatever way
                if extension.name.endswith('_cuda') and os.environ.get('BOLTZ_MM_CUDA') == '1':
                    raise
                lines = str(error).strip().splitlines() or [type(error).__name__]
                print(
                    f'WARNING: {extension.name} could not be built ({lines[0]}); boltz_mm is installed without it and '
                    'runs on the PyTorch reference',
                    file=sys.stderr,
                )
            else:
                built.append(extension)
        self.extensions = self.distribution.ext_modules = built

    def compile_cuda(self) -> list[str]:
        """Compile ``ops/cuda/*.cu`` with nvcc; no torch header is needed."""
        folder = Path(self.build_temp) / 'cuda'
        folder.mkdir(parents=True, exist_ok=True)
        targets = [flag for target in CUDA_TARGETS for flag in ('-gencode', target)]
        flags = ['-O3', '-std=c++17', '-cudart', 'static', '--compiler-options', '-fPIC,-fvisibility=hidden', *targets]
        objects, running = [], []
        for source in sources('ops/cuda/*.cu'):
            objects.append(str(folder / f'{Path(source).stem}.o'))
            command = [str(find_nvcc()), *flags, '-c', source, '-o', objects[-1]]
            running.append(subprocess.Popen(command, cwd=ROOT))
        failed = [process.args for process in running if process.wait()]
        if failed:
            raise RuntimeError(f'nvcc failed: {subprocess.list2cmdline(failed[0])}')
        return objects


class EggInfo(egg_info):
    """Metadata outside of the source root: there ``python -m mim`` would take it for the installed package."""

    def finalize_options(self) -> None:
        if self.egg_base is None:
            (ROOT / 'build').mkdir(exist_ok=True)
            self.egg_base = 'build'
        super().finalize_options()


class BuildWheel(bdist_wheel):
    """A wheel that carries ``.mim`` in the dist-info folder and in the package."""

    def write_wheelfile(self, wheelfile_base: str, **kwargs: object) -> None:
        super().write_wheelfile(wheelfile_base, **kwargs)
        if self.distribution.get_command_obj('editable_wheel', create=False):
            return  # mim and boltz_mm find the source tree itself
        dist_info = Path(wheelfile_base)
        for folder in (dist_info / '.mim', dist_info.parent / 'boltz_mm' / '.mim'):
            copy_mim(folder)


def copy_mim(folder: Path) -> None:
    """Copy what mim serves (configs, scripts, model index) to ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in MIM_CONTENT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))
        elif source.exists():
            shutil.copy2(source, folder / name)


setup(
    ext_modules=extensions(),
    cmdclass={'build_ext': BuildOperators, 'bdist_wheel': BuildWheel, 'egg_info': EggInfo},
    options={'bdist_wheel': {'py_limited_api': 'cp310'}},
)
