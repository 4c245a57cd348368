"""Resuming with a longer schedule follows the config, as if it had been so from the start."""

import pytest
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from tests.engine.toy import run


@HOOKS.register_module(force=True)
class RateTrace(Hook):
    """Remember the learning rate of each iteration."""

    traces: dict = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.traces.setdefault(runner.work_dir, {})[runner.iter] = runner.optim_wrapper.get_lr()['lr'][0]


def _trace(work_dir, hooks=('RNGStateHook', 'ScheduleRefreshHook'), **kwargs):
    run(work_dir, custom_hooks=[dict(type='RateTrace')] + [dict(type=f'boltz_mm.{name}') for name in hooks], **kwargs)
    return RateTrace.traces[str(work_dir)]


def _schedules(epochs):
    """Schedulers of a run of so many epochs of 4 iterations."""
    warmup = dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3)
    return {
        'cosine': [warmup, dict(type='CosineAnnealingLR', T_max=epochs, by_epoch=True, begin=0, end=epochs)],
        'cosine_iter': [
            warmup,
            dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=epochs, convert_to_iter_based=True),
        ],
        'poly': [dict(type='PolyLR', power=0.9, by_epoch=False, begin=0, end=4 * epochs)],
        'linear': [dict(type='LinearLR', start_factor=1.0, end_factor=0.01, by_epoch=True, begin=0, end=epochs)],
        'steps': [warmup, dict(type='MultiStepLR', milestones=[epochs - 1], gamma=0.1, by_epoch=True)],
        'steps_early': [dict(type='MultiStepLR', milestones=[epochs // 4], gamma=0.1, by_epoch=True)],
        'one_cycle': [dict(type='OneCycleLR', eta_max=0.1, total_steps=4 * epochs, by_epoch=False)],
        'momentum': [dict(type='CosineAnnealingLR', T_max=epochs, by_epoch=True), dict(type='LinearLR', end=epochs)],
    }


@pytest.mark.parametrize('name', list(_schedules(2)))
def test_longer_run_follows_the_config(tmp_path, name):
    whole = _trace(tmp_path / 'whole', total=5, param_scheduler=_schedules(5)[name])
    _trace(tmp_path / 'parts', total=2, param_scheduler=_schedules(2)[name])
    parts = _trace(tmp_path / 'parts', total=5, resume=True, param_scheduler=_schedules(5)[name])
    assert len(parts) == len(whole) == 20
    for number in range(8, 20):
        assert parts[number] == pytest.approx(whole[number], rel=1e-9), number
    # The early step lies before the resume: the rate has dropped already.
    assert (len({parts[number] for number in range(8, 20)}) > 1) == (name != 'steps_early')


def test_iterations(tmp_path):
    def poly(end):
        return [dict(type='PolyLR', power=1.0, by_epoch=False, begin=0, end=end)]

    whole = _trace(tmp_path / 'whole', by_epoch=False, total=12, param_scheduler=poly(12))
    _trace(tmp_path / 'parts', by_epoch=False, total=4, param_scheduler=poly(4))
    parts = _trace(tmp_path / 'parts', by_epoch=False, total=12, resume=True, param_scheduler=poly(12))
    assert [parts[number] for number in range(4, 12)] == pytest.approx([whole[number] for number in range(4, 12)])


def test_without_the_hook_the_rate_is_frozen(tmp_path):
    """The defect itself: the test above can tell."""
    _trace(tmp_path, hooks=(), total=2, param_scheduler=_schedules(2)['linear'])
    parts = _trace(tmp_path, hooks=(), total=5, resume=True, param_scheduler=_schedules(5)['linear'])
    assert len({parts[number] for number in range(8, 20)}) == 1


def test_unchanged_schedule_is_left_alone(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr('boltz_mm.engine.hooks.schedule_refresh_hook._replay', lambda *args: called.append(args))
    _trace(tmp_path, total=2, param_scheduler=_schedules(4)['cosine'])
    _trace(tmp_path, total=4, resume=True, param_scheduler=_schedules(4)['cosine'])
    assert not called


def test_plateau_keeps_its_value(tmp_path):
    def plateau(patience):
        return [dict(type='ReduceOnPlateauLR', monitor='score', rule='less', patience=patience, factor=0.5)]

    _trace(tmp_path, total=3, param_scheduler=plateau(0))
    parts = _trace(tmp_path, total=4, resume=True, param_scheduler=plateau(5))
    assert parts[12] == parts[15] < parts[0]
