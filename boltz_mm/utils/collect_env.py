"""What this environment has, what is missing and what to type: ``python -m boltz_mm.utils.collect_env``.

Works with any part of the stack absent, torch included, since that is when it is needed.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess

# Distribution, import name, and what it is for.  Upstream's distributions have the same import names.
_PARTS = (
    ('numpy', 'numpy', 'arrays'),
    ('onedl-mmengine', 'mmengine', 'training, configs'),
    ('onedl-mmcv', 'mmcv', 'transforms and operators of mmdet'),
    ('onedl-mmdetection', 'mmdet', 'detectors'),
    ('onedl-mmsegmentation', 'mmseg', 'segmentors'),
    ('onedl-mmpretrain', 'mmpretrain', 'classification'),
    ('onedl-mim', 'mim', 'the mim command'),
    ('torchvision', 'torchvision', 'needed by mmpretrain'),
    ('transformers', 'transformers', 'text encoders'),
    ('pycocotools', 'pycocotools', 'COCO metrics'),
    ('safetensors', 'safetensors', 'checkpoints without pickle'),
    ('onnx', 'onnx', 'export'),
    ('onnxruntime', 'onnxruntime', 'running exports'),
)
_PIP_ARGUMENTS = {
    'onedl-mmcv': '--no-build-isolation onedl-mmcv',  # is compiled against the torch that is there
    'torchvision': '--no-deps torchvision',  # would bring a torch of its own
    'transformers': '"transformers<5"',  # mmpretrain does not work with 5
}


def collect_env() -> dict[str, str]:
    """Versions and abilities, as an ordered mapping of names to readable values."""
    env = {
        'boltz_mm': _version('boltz_mm'),
        'Python': f'{platform.python_version()} ({platform.python_implementation()})',
        'Platform': platform.platform(),
        'CPU cores': str(os.cpu_count()),
        'C++ compiler': _first_line(os.environ.get('CXX', 'c++'), '--version'),
        'nvcc': _last_line('nvcc', '--version'),
    }
    env.update(_torch_env())
    for distribution, module, purpose in _PARTS:
        found = _version(distribution)
        arguments = _PIP_ARGUMENTS.get(distribution, distribution)
        env[module] = found if found != 'missing' else f'missing ({purpose}): pip install {arguments}'
    return env


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return 'missing'


def _torch_env() -> dict[str, str]:
    try:
        import torch
    except ImportError as error:
        return {'torch': f'missing ({error}): pip install torch'}
    env = {
        'torch': torch.__version__,
        'torch threads': str(torch.get_num_threads()),
        'CUDA': f'{torch.version.cuda}, {torch.cuda.device_count()} device(s)' if torch.version.cuda else 'none',
    }
    for index in range(torch.cuda.device_count()):
        env[f'GPU {index}'] = torch.cuda.get_device_name(index)
    try:
        env['operator backends'] = ', '.join(importlib.import_module('boltz_mm.ops').available_backends())
    except (ImportError, OSError, AttributeError) as error:
        env['operator backends'] = f'none ({error})'
    return env


def _lines(*command: str) -> list[str]:
    program = shutil.which(command[0].split()[0]) if command[0] else None
    if program is None:
        return []
    result = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    return [line for line in result.stdout.splitlines() if line.strip()]


def _first_line(*command: str) -> str:
    return next(iter(_lines(*command)), 'missing')


def _last_line(*command: str) -> str:
    return next(reversed(_lines(*command)), 'missing')


def main() -> None:
    """Print the table."""
    env = collect_env()
    width = max(map(len, env))
    for name, value in env.items():
        print(f'{name:<{width}}  {value}')


if __name__ == '__main__':
    main()
