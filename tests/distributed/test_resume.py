"""Random states of two ranks come back each to its own; another number of ranks is allowed with a warning."""

import random

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from tests.distributed.launch import run_ranks
from tests.engine.toy import run

DISTRIBUTED = dict(
    launcher='pytorch',
    model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False),
    train_dataloader=dict(batch_size=2),
)


@HOOKS.register_module(force=True)
class SeedByRank(Hook):
    """Let the ranks draw differently from the start, as samplers of points do."""

    def before_train_epoch(self, runner):
        if runner.iter == 0:
            seed = 100 + torch.distributed.get_rank()
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)


@HOOKS.register_module(force=True)
class TermOnFirst(Hook):
    """The first rank alone hears the signal, after iteration 5."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 4 and torch.distributed.get_rank() == 0:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


def _train(work_dir, **kwargs):
    """Final weights and the next draw of each generator, of this rank, and the warnings."""
    Runner._log_env = lambda self, env_cfg: None
    warnings: list[str] = []
    original = MMLogger.callHandlers
    MMLogger.callHandlers = lambda self, record: (warnings.append(record.getMessage()), original(self, record))[1]
    hooks = [dict(type='SeedByRank')] if torch.distributed.is_initialized() else []
    settings = dict(custom_hooks=hooks + [dict(type='boltz_mm.RNGStateHook')])
    if torch.distributed.is_initialized():
        settings.update(DISTRIBUTED)
    runner = run(work_dir, **{**settings, **kwargs})
    MMLogger.callHandlers = original
    state = {key.removeprefix('module.'): value.numpy() for key, value in runner.model.state_dict().items()}
    return state, (random.random(), np.random.rand(), torch.rand(1).item()), warnings


@pytest.mark.slow
def test_two_ranks_resume_exactly(tmp_path):
    straight = run_ranks(_train, tmp_path / 'straight')
    run_ranks(_train_half, tmp_path / 'parts')
    resumed = run_ranks(_train_rest, tmp_path / 'parts')
    for rank in range(2):
        _equal(straight[rank][0], resumed[rank][0], rank)
        assert straight[rank][1] == resumed[rank][1]
    assert straight[0][1] != straight[1][1], 'the ranks draw differently'
    assert np.array_equal(straight[0][0]['head.weight'], straight[1][0]['head.weight'])


def _equal(first, second, rank):
    for key, value in first.items():
        # Running means of batch norms belong to each rank; a checkpoint has those of the first.
        if rank == 0 or 'running' not in key:
            assert np.array_equal(value, second[key]), key


def _train_half(work_dir):
    return _train(work_dir, total=2)


def _train_rest(work_dir):
    return _train(work_dir, resume=True, workers=2)


@pytest.mark.slow
def test_other_numbers_of_ranks_warn(tmp_path):
    run_ranks(_train_half, tmp_path)
    _, _, warnings = _train(tmp_path, resume=True, total=3)
    assert any('comes from 2 process(es), this run has 1' in text for text in warnings)
    results = run_ranks(_train_rest, tmp_path)
    assert any('comes from 1 process(es), this run has 2' in text for text in results[1][2] + results[0][2])
    assert np.array_equal(results[0][0]['head.weight'], results[1][0]['head.weight'])


def _terminated(work_dir):
    hooks = [
        dict(type='SeedByRank'),
        dict(type='boltz_mm.RNGStateHook'),
        dict(type='TermOnFirst'),
        dict(type='boltz_mm.SaveOnSignalHook', interval=3),
    ]
    try:
        _train(work_dir, custom_hooks=hooks)
    except SystemExit as error:
        return error.code
    return None


@pytest.mark.slow
def test_signal_to_one_rank_ends_both_at_the_same_iteration(tmp_path):
    assert run_ranks(_terminated, tmp_path / 'parts') == [143, 143]
    straight = run_ranks(_train, tmp_path / 'straight')
    resumed = run_ranks(_train_rest, tmp_path / 'parts')
    for rank in range(2):
        _equal(straight[rank][0], resumed[rank][0], rank)
