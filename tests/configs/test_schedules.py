"""The learning rates that the configs give, update by update, beside those of the official schedules."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).parents[2]
CONFIGS, CASES = ROOT / 'configs/boxer', ROOT / 'tests/data/parity/boxer'


class Groups(nn.Module):
    """One parameter of each group of the recipes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1, bias=False)
        self.rest = nn.Linear(1, 1, bias=False)
        self.linear_box_weight = nn.Parameter(torch.zeros(1))


def _rates(config: Config, updates: list[int]) -> list[list[float]]:
    """Learning rates of backbone, rest and box offsets at the given updates (or epochs)."""
    init_default_scope('mmdet')
    model = Groups()
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    groups = {id(group['params'][0]): group for group in optimizer.param_groups}
    ordered = [groups[id(p)] for p in (model.backbone.weight, model.rest.weight, model.linear_box_weight)]
    schedulers = [
        PARAM_SCHEDULERS.build(dict(one), default_args=dict(optimizer=optimizer)) for one in config.param_scheduler
    ]
    optimizer.step()
    found = {}
    for update in range(max(updates) + 1):
        if update in updates:
            found[update] = [group['lr'] for group in ordered]
        for scheduler in schedulers:
            scheduler.step()
    return [found[update] for update in updates]


@pytest.mark.parametrize(
    ('case', 'name'),
    [
        ('schedule_3x', 'boxer_r50_8xb2-3x_coco'),
        ('schedule_5x', 'boxer_r101_mask_8xb2-5x-lsj_coco'),
        ('schedule_3d', 'boxer3d_pillars_8xb2-140k_waymo'),
    ],
)
def test_configs_give_the_official_learning_rates(case, name):
    config = Config.fromfile(CONFIGS / f'{name}.py')
    stored = load_file(CASES / case / 'io.safetensors')
    # The rate after the last update is stored too; nobody uses it, and the configs end before.
    rows = [i for i, update in enumerate(stored['in.updates'].tolist()) if update < config.train_cfg.max_iters]
    ours = _rates(config, stored['in.updates'][rows].tolist())
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), stored['out.lr'][rows], rtol=1e-9, atol=1e-15)
    assert len(rows) > 4


def test_epoch_recipe_drops_after_the_fortieth_epoch():
    config = Config.fromfile(CONFIGS / 'boxer_r50_mask_8xb4-50e_coco.py')
    rates = _rates(config, [0, 39, 40, 49])
    assert [round(rest * 1e6) for _, rest, _ in rates] == [200, 200, 20, 20]
    assert [round(backbone * 1e7) for backbone, _, _ in rates] == [200, 200, 20, 20]


def test_recipe_without_warm_up_begins_at_the_full_rate():
    config = Config.fromfile(CONFIGS / 'boxer_r101_8xb2-3x_coco.py')
    assert _rates(config, [0, 1]) == [[2e-5, 2e-4, 2e-5]] * 2


def test_every_parameter_decays():
    config = Config.fromfile(CONFIGS / 'boxer_r50_8xb2-3x_coco.py')
    model = nn.ModuleDict({'backbone': nn.BatchNorm2d(2), 'linear_box': nn.Linear(2, 2), 'norm': nn.LayerNorm(2)})
    init_default_scope('mmdet')
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {1e-4}
    assert {group['eps'] for group in groups} == {1e-9}
    assert len(groups) == len(list(model.parameters()))
