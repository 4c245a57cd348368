"""Models are built with weights that fit, or not at all."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from boltz_mm.apis.benchmark import build_benchmark
from boltz_mm.apis.build import build_model
from boltz_mm.utils.checkpoint import CheckpointError

CONFIG = Path(__file__).parents[2] / 'configs/boxer/boxer_tiny_shapes.py'


@pytest.fixture
def cfg() -> Config:
    cfg = Config.fromfile(CONFIG)
    cfg.model.num_queries = 10
    return cfg


def test_weights_and_names(cfg: Config, tmp_path: Path) -> None:
    model, meta = build_model(cfg, device='cpu')
    assert not model.training
    assert meta['classes'] == ('circle', 'square', 'triangle')
    state = {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}
    torch.save({'state_dict': state, 'meta': {'dataset_meta': {'CLASSES': ('a', 'b', 'c')}}}, tmp_path / 'w.pth')
    model, meta = build_model(cfg, str(tmp_path / 'w.pth'), 'cpu')
    assert all((value == 0.5).all() for value in model.parameters())
    assert meta['classes'] == ('a', 'b', 'c'), 'the checkpoint knows better than the config'
    assert 'palette' in meta


def test_weights_that_do_not_fit(cfg: Config, tmp_path: Path) -> None:
    torch.save({'state_dict': {'fc.weight': torch.zeros(2)}}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match='another architecture'):
        build_model(cfg, str(tmp_path / 'w.pth'), 'cpu')


def test_the_config_is_left_as_it_is(cfg: Config) -> None:
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='nowhere://weights')
    before = cfg.pretty_text
    build_model(cfg, device='cpu')
    assert cfg.pretty_text == before


def test_unknown_task(cfg: Config) -> None:
    with pytest.raises(ValueError, match='sleep'):
        build_benchmark(cfg, 'sleep')
