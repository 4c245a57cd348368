"""Training in two parts gives the weights of training in one, to the last bit."""

import itertools

import pytest
import torch

from tests.engine.toy import difference, run

# All combinations; the quick subset takes the plainest and the fullest.
COMBINATIONS = pytest.mark.parametrize(
    ('workers', 'ema', 'amp', 'accumulate'),
    [
        pytest.param(*values, marks=() if values in ((0, False, False, 1), (2, True, True, 2)) else pytest.mark.slow)
        for values in itertools.product((0, 2), (False, True), (False, True), (1, 2))
    ],
)


def _halves_equal_whole(tmp_path, half, whole, **kwargs):
    straight = run(tmp_path / 'straight', total=whole, name='s', **kwargs)
    run(tmp_path / 'parts', total=half, name='a', **kwargs)
    resumed = run(tmp_path / 'parts', total=whole, resume=True, name='b', **kwargs)
    assert resumed.iter == straight.iter and resumed.epoch == straight.epoch
    assert difference(straight, resumed) == 0.0
    return straight


@COMBINATIONS
def test_epochs(tmp_path, workers, ema, amp, accumulate):
    _halves_equal_whole(tmp_path, 2, 4, workers=workers, ema=ema, amp=amp, accumulate=accumulate)


@COMBINATIONS
def test_iterations(tmp_path, workers, ema, amp, accumulate):
    # 6 of 10: in the middle of the second pass over 12 samples in batches of 3.
    _halves_equal_whole(tmp_path, 6, 10, by_epoch=False, workers=workers, ema=ema, amp=amp, accumulate=accumulate)


def test_persistent_workers(tmp_path):
    _halves_equal_whole(tmp_path, 2, 4, workers=2, persistent=True)


@pytest.mark.parametrize('workers', [0, 2])
def test_in_the_middle_of_an_epoch(tmp_path, workers):
    """A checkpoint after iteration 6 of epochs of 4 iterations goes on with the 7th, not with the 5th."""
    hooks = dict(checkpoint=dict(type='boltz_mm.AtomicCheckpointHook', interval=6, by_epoch=False))
    straight = run(tmp_path, total=3, workers=workers, name='s', default_hooks=hooks)
    resumed = run(
        tmp_path, total=3, workers=workers, name='r', default_hooks=hooks, resume=str(tmp_path / 'iter_6.pth')
    )
    assert resumed.iter == straight.iter == 12
    assert difference(straight, resumed) == 0.0


def test_iteration_loop_over_a_finite_sampler(tmp_path):
    """DefaultSampler in an iteration-based loop: mmengine steps through the passes instead of moving the sampler."""
    kwargs = dict(by_epoch=False, train_dataloader=dict(sampler=dict(type='DefaultSampler', shuffle=True)))
    _halves_equal_whole(tmp_path, 3, 4, default_hooks=_every(1), **kwargs)


def _every(interval):
    return dict(checkpoint=dict(type='boltz_mm.AtomicCheckpointHook', interval=interval, by_epoch=False))


def test_seed_that_nobody_chose(tmp_path):
    """Without a seed in the config each start draws one; the sampler of the resumed run has to get the old one."""
    straight = run(tmp_path, total=4, name='s', randomness=dict(seed=None))
    checkpoint = str(tmp_path / 'epoch_2.pth')
    resumed = run(tmp_path, total=4, name='b', randomness=dict(seed=None), resume=checkpoint)
    assert difference(straight, resumed) == 0.0


def test_data_do_not_depend_on_workers(tmp_path):
    runs = [run(tmp_path / str(workers), total=2, workers=workers) for workers in (0, 1, 3)]
    assert difference(runs[0], runs[1]) == 0.0 and difference(runs[0], runs[2]) == 0.0


def test_validation_leaves_no_trace(tmp_path):
    with_val = run(tmp_path / 'a', total=3)
    without = run(tmp_path / 'b', total=3, val_dataloader=None, val_cfg=None, val_evaluator=None)
    assert difference(with_val, without) == 0.0


def test_best_checkpoint_resumes_exactly(tmp_path):
    """mmengine saves the last checkpoint once more when a best one is found, in the middle of validation."""
    hooks = dict(checkpoint=dict(type='boltz_mm.AtomicCheckpointHook', interval=1, save_best='score', rule='greater'))
    _halves_equal_whole(tmp_path, 2, 4, default_hooks=hooks)


def test_without_the_hook_it_is_not_exact(tmp_path):
    """The test bed can tell: the same runs without the hook differ."""
    straight = run(tmp_path / 'straight', total=4, name='s', custom_hooks=[])
    run(tmp_path / 'parts', total=2, name='a', custom_hooks=[])
    resumed = run(tmp_path / 'parts', total=4, resume=True, name='b', custom_hooks=[])
    assert difference(straight, resumed) > 1e-4


def test_checkpoint_is_plain_data(tmp_path):
    run(tmp_path, total=1)
    state = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['rng_state']
    assert len(state['ranks']) == 1 and state['sampler_seed'] == 5
    torch.save(state, tmp_path / 'state.pth')
    torch.load(tmp_path / 'state.pth', weights_only=True)


def test_checkpoint_without_states_warns(tmp_path, caplog):
    run(tmp_path, total=1, custom_hooks=[])
    messages = []
    from mmengine.logging import MMLogger

    original = MMLogger.callHandlers
    try:
        MMLogger.callHandlers = lambda self, record: (messages.append(record.getMessage()), original(self, record))
        run(tmp_path, total=2, resume=True)
    finally:
        MMLogger.callHandlers = original
    assert any('holds no random state' in text for text in messages)
