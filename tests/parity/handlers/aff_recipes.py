"""AutoFocusFormer's recipes: learning rates, parameter groups, and the targets made from label maps."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS

import boltz_mm.engine  # noqa: F401  registers
from tests.parity.case import Case, Produced
from tests.parity.registry import handler

SCHEDULES = Path(__file__).parents[3] / 'configs' / '_base_' / 'schedules'


def _rates(schedulers: list[dict[str, Any]], base: float, updates: list[int]) -> list[float]:
    """The learning rate that each of the updates runs at."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=base)
    built = [PARAM_SCHEDULERS.build(one, default_args={'optimizer': optimizer}) for one in schedulers]
    optimizer.step()
    found = {}
    for update in range(max(updates) + 1):
        if update in updates:
            found[update] = optimizer.param_groups[0]['lr']
        for scheduler in built:
            scheduler.step()
    return [found[update] for update in updates]


@handler('aff', 'lr_cosine')
def lr_cosine(case: Case) -> Produced:
    kwargs = case.kwargs
    scheduler = Config.fromfile(SCHEDULES / 'aff_in1k.py').to_dict()['param_scheduler']
    del scheduler['convert_to_iter_based']
    scheduler |= {
        'total': kwargs['epochs'] * kwargs['iters_per_epoch'],
        'warmup': kwargs['warmup_epochs'] * kwargs['iters_per_epoch'],
        'start_ratio': kwargs['warmup_lr'] / kwargs['base_lr'],
        'min_ratio': kwargs['min_lr'] / kwargs['base_lr'],
        'by_epoch': False,
    }
    # The stored rate at t is set after update t, and update t + 1 runs at it.
    first, *rates = _rates([scheduler], kwargs['base_lr'], [0, *(case.inputs['t'] + 1).tolist()])
    values = torch.tensor([first, *rates], dtype=torch.float64)
    return {'out.lr': values[1:], 'out.initial_lr': values[0]}


@handler('aff', 'lr_poly')
def lr_poly(case: Case) -> Produced:
    kwargs = case.kwargs
    schedulers = Config.fromfile(SCHEDULES / 'aff_80k.py').to_dict()['param_scheduler']
    schedulers[0] |= {'power': kwargs['power'], 'end': kwargs['max_iters'] + 1}
    if kwargs['warmup_iters'] and kwargs['warmup_factor'] != 1:
        # detectron2 multiplies; its factor reaches 1 at warmup_iters.
        schedulers.append(
            {
                'type': 'LinearLR',
                'start_factor': kwargs['warmup_factor'],
                'begin': 0,
                'end': kwargs['warmup_iters'] + 1,
                'by_epoch': False,
            }
        )
    rates = _rates(schedulers, kwargs['base_lr'], case.inputs['t'].tolist())
    return {'out.lr': torch.tensor(rates, dtype=torch.float64)}
