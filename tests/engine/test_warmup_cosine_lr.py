"""The cosine that is not restarted after the warm-up; its numbers are held by the case ``lr_cosine``."""

import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS

import boltz_mm.engine  # noqa: F401  registers


def _optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{'params': [torch.nn.Parameter(torch.zeros(1))], 'lr': rate} for rate in rates])


def _build(optimizer, **kwargs):
    config = {'type': 'boltz_mm.WarmupCosineLR', **kwargs}
    return PARAM_SCHEDULERS.build(config, default_args={'optimizer': optimizer, 'epoch_length': 5})


def _rates(scheduler, optimizer, updates: int) -> list[list[float]]:
    optimizer.step()
    found = []
    for _ in range(updates):
        found.append([group['lr'] for group in optimizer.param_groups])
        scheduler.step()
    return found


def test_warm_up_cosine_and_end_of_every_group():
    optimizer = _optimizer(1.0, 0.1)
    options = dict(total=4, warmup=1, start_ratio=0.25, min_ratio=0.5, convert_to_iter_based=True)
    rates = torch.tensor(_rates(_build(optimizer, **options), optimizer, 26))
    torch.testing.assert_close(rates[:, 1] * 10, rates[:, 0])
    # Updates 0 and 1 run at the first rate, then five steps to the base rate, which the cosine cuts off.
    torch.testing.assert_close(rates[:6, 0], torch.tensor([0.25, 0.25, 0.4, 0.55, 0.7, 0.85]))
    time = torch.arange(5, 20)
    torch.testing.assert_close(rates[6:21, 0], 0.5 + 0.25 * (1 + torch.cos(torch.pi * time / 20)))
    assert rates[21:, 0].tolist() == [0.5] * 5


def test_state_goes_into_another_optimizer():
    options = dict(total=10, warmup=3, by_epoch=False)
    first = _optimizer(1.0)
    whole = _rates(_build(first, **options), first, 10)
    second, third = _optimizer(1.0), _optimizer(1.0)
    scheduler = _build(second, **options)
    assert _rates(scheduler, second, 4) == whole[:4]
    resumed = _build(third, **options)
    resumed.load_state_dict(scheduler.state_dict())
    third.load_state_dict(second.state_dict())
    assert _rates(resumed, third, 6) == whole[4:]


@pytest.mark.parametrize('lengths', [dict(total=5, warmup=5), dict(total=5, warmup=-1)])
def test_lengths_out_of_order_raise(lengths):
    with pytest.raises(ValueError, match='warmup < total'):
        _build(_optimizer(1.0), by_epoch=False, **lengths)
