"""A tiny shapes set, a config that reads it, and random weights, for the tools."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from boltz_mm.apis.build import build_model
from boltz_mm.datasets.shapes import ShapesSpec, make_shapes
from boltz_mm.utils.launch import load_config

_CONFIG = """
_base_ = [{base!r}]
data_root = {data!r}
model = dict(num_queries=20, encoder=dict(num_layers=1), decoder=dict(num_layers=1))
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, batch_size=1, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
"""


class Tiny(NamedTuple):
    """Files of a tiny experiment."""

    data: Path
    config: str
    checkpoint: str


@pytest.fixture(scope='session')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """3 training and 4 validation images of 64 pixels, and a BoxeR of one layer with random weights."""
    root = tmp_path_factory.mktemp('tiny run')
    data, config, checkpoint = root / 'shapes', root / 'tiny_run.py', root / 'weights.pth'
    make_shapes(data, {'train': 3, 'val': 4}, ShapesSpec(size=64), progress=False)
    base = Path(__file__).parents[2] / 'configs/boxer/boxer_tiny_shapes.py'
    config.write_text(_CONFIG.format(base=str(base), data=f'{data}/'))
    torch.manual_seed(0)
    model, _ = build_model(load_config(str(config)), device='cpu')
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, checkpoint)
    return Tiny(data, str(config), str(checkpoint))
