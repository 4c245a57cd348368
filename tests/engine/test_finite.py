"""Gradients and losses that are not finite: steps are skipped and counted, training stops and says where."""

import math

import pytest
import torch
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

import boltz_mm.engine  # noqa: F401
from boltz_mm.engine.hooks import NonFiniteLossError
from boltz_mm.engine.optimizers.finite_optim_wrapper import NonFiniteGradientError
from boltz_mm.utils.checkpoint import read_checkpoint
from boltz_mm.utils.restricted_loading import read_mmengine_checkpoint
from tests.engine.toy import run

CLIPS = [None, dict(max_norm=0.1), dict(type='value', clip_value=0.1), dict(max_norm=1.0, norm_type='inf')]


def _wrapper(kind, parameter, **kwargs):
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    return OPTIM_WRAPPERS.build(dict(type=f'boltz_mm.{kind}', optimizer=optimizer, **kwargs))


@pytest.mark.parametrize('kind', ['FiniteOptimWrapper', 'FiniteAmpOptimWrapper'])
@pytest.mark.parametrize('clip', CLIPS)
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_step_is_skipped_and_counted(kind, clip, bad):
    parameter = nn.Parameter(torch.ones(3))
    wrapper = _wrapper(kind, parameter, clip_grad=clip and dict(clip))
    start = wrapper.skipped_steps
    wrapper.update_params((parameter * torch.tensor([1.0, bad, 1.0])).sum())
    assert torch.equal(parameter.data, torch.ones(3)) and wrapper.skipped_steps == start + 1
    assert parameter.grad is None or not parameter.grad.any()
    wrapper.update_params((parameter * 0.01).sum())
    assert (parameter < 1).all() and wrapper.skipped_steps == start + 1


@pytest.mark.parametrize('clip', [None, dict(max_norm=0.1), dict(type='value', clip_value=0.1)])
def test_finite_steps_are_those_of_mmengine(clip):
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    kwargs = dict(clip_grad=clip)
    for parameter, wrapper in (
        (ours, _wrapper('FiniteOptimWrapper', ours, clip_grad=clip and dict(clip))),
        (
            theirs,
            OPTIM_WRAPPERS.build(dict(type='OptimWrapper', optimizer=torch.optim.SGD([theirs], lr=1.0), **kwargs)),
        ),
    ):
        for factor in (1.0, -3.0, 0.5):
            wrapper.update_params((parameter.square() * factor).sum())
    assert torch.equal(ours.data, theirs.data)


def test_norm_that_overflows_is_not_stepped_with(monkeypatch):
    """Finite gradients of 1e30 have an infinite norm in float32; clipping by it would zero them, decay would go on."""
    parameter = nn.Parameter(torch.ones(3))
    wrapper = _wrapper('FiniteOptimWrapper', parameter, clip_grad=dict(max_norm=0.1))
    wrapper.update_params((parameter * 1e30).sum())
    assert torch.equal(parameter.data, torch.ones(3))


def test_gives_up_after_too_many(monkeypatch):
    parameter = nn.Parameter(torch.ones(3))
    wrapper = _wrapper('FiniteOptimWrapper', parameter, max_consecutive_skips=3)
    for _ in range(2):
        wrapper.update_params(parameter.sum() * math.nan)
    wrapper.update_params(parameter.sum())
    for _ in range(2):
        wrapper.update_params(parameter.sum() * math.nan)
    with pytest.raises(NonFiniteGradientError, match='3 steps in a row'):
        wrapper.update_params(parameter.sum() * math.nan)


def test_scale_falls_after_an_overflow_and_is_saved():
    parameter = nn.Parameter(torch.ones(3))
    wrapper = _wrapper('FiniteAmpOptimWrapper', parameter, loss_scale=dict(init_scale=1024.0), dtype='bfloat16')
    wrapper.update_params(parameter.sum() * math.inf)
    assert wrapper.loss_scaler.get_scale() == 512
    other = _wrapper('FiniteAmpOptimWrapper', nn.Parameter(torch.ones(3)))
    other.load_state_dict(wrapper.state_dict())
    assert other.loss_scaler.get_scale() == 512


def test_wrong_arguments():
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match='max_consecutive_skips must be positive, got 0'):
        _wrapper('FiniteOptimWrapper', parameter, max_consecutive_skips=0)
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="got 'int8'"):
            _wrapper('FiniteAmpOptimWrapper', parameter, dtype='int8')
        with pytest.raises(TypeError, match="'static'"):
            _wrapper('FiniteAmpOptimWrapper', parameter, loss_scale='static')


def _hooks(**kwargs):
    return [dict(type='boltz_mm.RNGStateHook'), dict(type='boltz_mm.NonFiniteLossHook', **kwargs)]


def test_loss_that_is_nan_stops_and_names_everything(tmp_path):
    model = dict(type='DroppingNet', explode_at=7)  # the third iteration of the second epoch
    with pytest.raises(NonFiniteLossError) as caught:
        run(tmp_path, total=4, model=model, custom_hooks=_hooks())
    text = str(caught.value)
    assert 'iteration 7 (epoch 2): loss, loss_square not finite' in text and '.png' in text
    assert f'last good checkpoint: {tmp_path / "epoch_1.pth"}' in text
    state = read_mmengine_checkpoint(tmp_path / 'epoch_1.pth')['state_dict']
    assert all(value.isfinite().all() for value in state.values())


def test_before_the_first_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLossError, match='none was written yet'):
        run(tmp_path, total=1, model=dict(type='DroppingNet', explode_at=2), custom_hooks=_hooks())


def test_patience_lets_one_pass(tmp_path):
    runner = run(tmp_path, total=2, model=dict(type='DroppingNet', explode_at=2), custom_hooks=_hooks(patience=1))
    assert all(value.isfinite().all() for value in runner.model.state_dict().values())
    assert runner.optim_wrapper.skipped_steps == 1
    saved = read_checkpoint(tmp_path / 'epoch_2.pth', ('mmengine.logging.history_buffer.HistoryBuffer',))
    assert saved['message_hub']['runtime_info']['skipped_steps'] == 1
    resumed = run(tmp_path, total=3, resume=True, custom_hooks=_hooks())
    assert resumed.optim_wrapper.skipped_steps == 1
