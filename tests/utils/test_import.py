"""What an import of the package costs and needs: nothing but torch for the operators, not even that for the package."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STACK = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'mim', 'torchvision', 'cv2', 'transformers', 'numba')
HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {STACK!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Hidden())
"""


def run_python(code: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *flags, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_silent_and_without_torch() -> None:
    result = run_python("import boltz_mm, sys; assert 'torch' not in sys.modules", '-W', 'error')
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')


def test_silent_without_the_stack() -> None:
    result = run_python(f'{HIDE}\nimport boltz_mm; print(boltz_mm.__version__)', '-W', 'error')
    assert result.returncode == 0, result.stderr
    assert result.stderr == ''


def test_operators_need_torch_alone() -> None:
    code = f"""{HIDE}
import torch, boltz_mm.ops as ops
value = torch.rand(1, 6, 2, 4)
logits = torch.zeros(1, 3, 2, 1, 4)
boxes = torch.rand(1, 3, 2, 1, 4)
out = ops.box_attention(value, torch.tensor([[2, 3]]), boxes, logits, ops.grid_points(2))
assert out.shape == (1, 3, 8) and bool(torch.isfinite(out).all())
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_collect_env_names_what_is_missing() -> None:
    result = run_python(f'{HIDE}\nfrom boltz_mm.utils.collect_env import collect_env; print(collect_env())')
    assert result.returncode == 0, result.stderr
    assert 'operator backends' in result.stdout


def test_collect_env_without_torch() -> None:
    result = run_python(
        "import sys; sys.modules['torch'] = None\n"
        'from boltz_mm.utils.collect_env import collect_env; print(collect_env()["torch"])'
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('missing') and 'pip install torch' in result.stdout


def test_collect_env_does_not_advise_what_would_replace_torch() -> None:
    code = """
import importlib.metadata
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = missing
from boltz_mm.utils.collect_env import collect_env
print(collect_env()['torchvision'])
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith('pip install --no-deps torchvision')
