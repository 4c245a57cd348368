"""``boltz_mm::`` configs in a checkout; installed wheels are tried in tests/packaging."""

import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.hub import get_config

import boltz_mm  # noqa: F401
from boltz_mm.utils.config_scope import register_config_scope

ROOT = Path(__file__).resolve().parents[2]
NAME = 'boxer/boxer_tiny_shapes.py'


def test_base_of_a_users_config(tmp_path: Path) -> None:
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = 'boltz_mm::{NAME}'\nmodel = dict(num_queries=7)\n")
    cfg = Config.fromfile(config)
    assert cfg.model.num_queries == 7
    assert cfg.model.backbone == Config.fromfile(ROOT / 'configs' / NAME).model.backbone


def test_partial_base(tmp_path: Path) -> None:
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = ['boltz_mm::_base_/default_runtime.py']\n")
    assert 'boltz_mm' in Config.fromfile(config).custom_imports.imports


def test_get_config() -> None:
    assert get_config(f'boltz_mm::{NAME}').model == Config.fromfile(ROOT / 'configs' / NAME).model


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='boltz_mm::boxer/no_such.py'):
        get_config('boltz_mm::boxer/no_such.py')
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = 'boltz_mm::boxer/no_such.py'\n")
    with pytest.raises(FileNotFoundError, match='boltz_mm::boxer/no_such.py'):
        Config.fromfile(config)


def test_other_packages_are_left_alone() -> None:
    assert get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').model.type == 'RetinaNet'


def test_registering_again_changes_nothing() -> None:
    before = config_utils._get_cfg_metainfo
    register_config_scope()
    assert config_utils._get_cfg_metainfo is before


@pytest.mark.slow
@pytest.mark.parametrize('order', ['import mmengine.hub, boltz_mm', 'import boltz_mm, mmengine.hub'])
def test_import_order_does_not_matter(order: str) -> None:
    code = f"{order}; print(mmengine.hub.get_config('boltz_mm::{NAME}').model.type)"
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 'BoxeR' in result.stdout


@pytest.mark.slow
def test_pretrained_address_comes_from_the_metafile(tmp_path: Path) -> None:
    """A copy of the checkout whose metafile has weights: get_config(pretrained=True) hands out their address."""
    code = f"""
import sys, pathlib, shutil
root = pathlib.Path({str(tmp_path)!r})
for name in ('boltz_mm/utils', 'configs'):
    shutil.copytree(pathlib.Path({str(ROOT)!r}) / name, root / name)
for name in ('boltz_mm/__init__.py', 'boltz_mm/version.py'):
    shutil.copy(pathlib.Path({str(ROOT)!r}) / name, root / name)
(root / 'model-index.yml').write_text('Import: [configs/own.yml]')
(root / 'configs' / 'own.yml').write_text('Models: [{{Config: configs/{NAME}, Weights: "https://host/w.pth"}}]')
sys.path.insert(0, str(root))
sys.modules.pop('boltz_mm', None)
import boltz_mm, mmengine.hub, mmengine.utils
mmengine.hub.hub.get_installed_path = lambda package: str(root / 'boltz_mm')
print(mmengine.hub.get_config('boltz_mm::{NAME}', pretrained=True).model_path)
"""
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 'https://host/w.pth' in result.stdout
