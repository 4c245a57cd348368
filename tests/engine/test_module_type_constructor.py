"""Rates by name and decay by type at once; the groups of a whole model are held by the case ``optim_groups_seg``."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import boltz_mm.engine  # noqa: F401  registers

RULES = dict(norm_decay_mult=0.0, embed_decay_mult=0.5, custom_keys=dict(backbone=dict(lr_mult=0.1)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.query = nn.Embedding(3, 2)
        self.shared = self.query
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.backbone_scale = nn.Parameter(torch.ones(2))  # its module is the model: no part of the backbone


def _wrapper(model, paramwise_cfg=RULES, **optimizer):
    optimizer = {'type': 'AdamW', 'lr': 1.0, 'weight_decay': 0.2, **optimizer}
    constructor = 'boltz_mm.ModuleTypeOptimWrapperConstructor'
    return build_optim_wrapper(
        model, dict(constructor=constructor, paramwise_cfg=paramwise_cfg, type='OptimWrapper', optimizer=optimizer)
    )


def test_rules_multiply():
    model = Model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        names[id(group['params'][0])]: (group['lr'], group['weight_decay'])
        for group in _wrapper(model).optimizer.param_groups
    }
    assert groups == {
        'backbone.0.weight': (0.1, 0.2),
        'backbone.0.bias': (0.1, 0.2),
        'backbone.1.weight': (0.1, 0.0),
        'backbone.1.bias': (0.1, 0.0),
        'query.weight': (1.0, 0.1),
        'backbone_scale': (1.0, 0.2),
    }


@pytest.mark.parametrize(
    ('rules', 'optimizer', 'message'),
    [
        (dict(bias_lr_mult=2.0), {}, "unknown key 'bias_lr_mult'"),
        (dict(custom_keys=dict(head=dict(lr=1.0))), {}, 'lr_mult and decay_mult'),
        (dict(custom_keys={}), dict(lr=None), 'needs lr and weight_decay'),
    ],
)
def test_what_would_be_ignored_raises(rules, optimizer, message):
    with pytest.raises(ValueError, match=message):
        _wrapper(Model(), rules, **optimizer)
