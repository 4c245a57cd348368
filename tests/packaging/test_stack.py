"""The environment of the set-up has what the whole stack imports: a missing piece would only show far from here."""

import importlib
import subprocess
import sys

import pytest

PACKAGES = [f'{name}.{part}' for name in ('mmdet', 'mmseg', 'mmpretrain') for part in ('apis', 'datasets', 'models')]

OPTIONAL = [
    'mim',
    'mmcv.ops',
    'nibabel',
    'onnx',
    'onnxruntime',
    'onnxscript',
    'psutil',
    'pycocotools',
    'pydicom',
    'safetensors',
    'scipy',
    'skimage',
    'torch.utils.tensorboard',
    'transformers',
]


@pytest.mark.slow
def test_everything_imports() -> None:
    code = f'import boltz_mm, importlib; [importlib.import_module(name) for name in {PACKAGES!r}]'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('module', OPTIONAL)
def test_optional_parts_are_there(module: str) -> None:
    importlib.import_module(module)
