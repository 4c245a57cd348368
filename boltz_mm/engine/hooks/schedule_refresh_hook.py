"""Resume under the schedule of the config, not under the one that the checkpoint remembers.

mmengine's schedulers restore all of their attributes from a checkpoint, ``end``, ``total_iters`` and ``T_max`` too.
Resuming with a larger ``max_epochs`` then leaves the learning rate where the old schedule ended.
"""

import copy
from types import SimpleNamespace
from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import _ParamScheduler
from mmengine.runner import Runner

from boltz_mm.registry import HOOKS

# What a scheduler changes while it runs; everything else was set by the config.
_PROGRESS = frozenset(
    {
        'optimizer', 'last_step', '_global_step', '_last_value', 'base_values', 'verbose',
        'best', 'num_bad_epochs', 'cooldown_counter',
    }
)  # fmt: skip


@HOOKS.register_module()
class ScheduleRefreshHook(Hook):
    """After a resume, put the settings of all parameter schedulers back to those of the config.

    Where something differs it is named in a warning, and the learning rate (or whatever is scheduled) is computed anew,
    as if training had run under this config from its first step::

        custom_hooks = [dict(type='boltz_mm.ScheduleRefreshHook')]

    The base values, such as the learning rate of the optimizer config, remain those of the checkpoint.  A
    ``ReduceOnPlateau`` scheduler gets its settings back but keeps its present value, which depends on past metrics.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._configured: dict[str, list[dict[str, Any]]] = {}

    def before_run(self, runner: Runner) -> None:
        """Remember what the config asks for; the schedulers have just been built, the checkpoint is not yet read."""
        self._configured = {
            name: [_settings(scheduler) for scheduler in schedulers]
            for name, schedulers in _schedulers_of(runner).items()
        }

    def before_train(self, runner: Runner) -> None:
        """Compare, put back, and compute the present values anew."""
        if not runner._resume:
            return
        for name, schedulers in _schedulers_of(runner).items():
            changed = False
            for scheduler, configured in zip(schedulers, self._configured.get(name, ()), strict=True):
                changed |= self._put_back(runner, scheduler, configured)
            if changed:
                # Not the count in the checkpoint: that of another scheduler may have been restored in its place.
                for scheduler in schedulers:
                    scheduler._global_step = runner.epoch if scheduler.by_epoch else runner.iter
                _replay(schedulers, len(runner.train_dataloader))

    def _put_back(self, runner: Runner, scheduler: _ParamScheduler, configured: dict[str, Any]) -> bool:
        restored = _settings(scheduler)
        differing = [key for key, value in configured.items() if restored.get(key) != value]
        if not differing:
            return False
        changes = ', '.join(f'{key} {restored.get(key)} -> {configured[key]}' for key in differing)
        runner.logger.warning(
            f'{type(scheduler).__name__}: the config differs from the schedule in the checkpoint and holds: {changes}'
        )
        scheduler.__dict__.update({key: copy.deepcopy(configured[key]) for key in differing})
        return True


def _schedulers_of(runner: Runner) -> dict[str, list[_ParamScheduler]]:
    schedulers = runner.param_schedulers
    groups = schedulers if isinstance(schedulers, dict) else {'': schedulers or []}
    # In a test run they are configs that nobody builds.
    return {
        name: [entry for entry in group if isinstance(entry, _ParamScheduler)]
        for name, group in groups.items()
        if isinstance(group, list)
    }


def _settings(scheduler: _ParamScheduler) -> dict[str, Any]:
    return {
        key: copy.deepcopy(value)
        for key, value in scheduler.__dict__.items()
        if key not in _PROGRESS and not callable(value)
    }


def _replay(schedulers: list[_ParamScheduler], epoch_length: int) -> None:
    """Run copies of the schedulers from the start on the distinct base values, and take over where they arrive."""
    replayed = [scheduler for scheduler in schedulers if not hasattr(scheduler, 'num_bad_epochs')]
    for parameter in dict.fromkeys(scheduler.param_name for scheduler in replayed):
        chain = [scheduler for scheduler in replayed if scheduler.param_name == parameter]
        groups = chain[0].optimizer.param_groups
        starts = [group[f'initial_{parameter}'] for group in groups]
        distinct = list(dict.fromkeys(starts))  # many groups, few different base values
        stage = _stage([dict(group) for group in _representatives(groups, starts, distinct)], parameter)
        copies = [_restarted(scheduler, stage, distinct) for scheduler in chain]
        _run(copies, [scheduler._global_step for scheduler in chain], epoch_length)
        arrived = dict(zip(distinct, (group[parameter] for group in stage.param_groups), strict=True))
        for group, start in zip(groups, starts, strict=True):
            group[parameter] = arrived[start]
        for scheduler, replica in zip(chain, copies, strict=True):
            scheduler.last_step = replica.last_step
            scheduler._last_value = [group[parameter] for group in groups]


def _representatives(groups: list[dict], starts: list[float], distinct: list[float]) -> list[dict]:
    return [groups[starts.index(start)] for start in distinct]


def _stage(groups: list[dict], parameter: str) -> SimpleNamespace:
    """Enough of an optimizer for schedulers to step on."""

    def step() -> None:
        """Never called; schedulers look at its mark."""

    step._with_counter = True  # type: ignore[attr-defined]
    for group in groups:
        group[parameter] = group[f'initial_{parameter}']
    return SimpleNamespace(param_groups=groups, step=step, _global_step=0)


def _restarted(scheduler: _ParamScheduler, stage: SimpleNamespace, starts: list[float]) -> _ParamScheduler:
    replica = copy.copy(scheduler)
    replica.optimizer = stage
    replica.base_values = list(starts)
    replica.last_step = replica._global_step = -1
    replica.verbose = False
    return replica


def _run(schedulers: list[_ParamScheduler], targets: list[int], epoch_length: int) -> None:
    """Step in the order of training: once when built, then after every iteration, then after every epoch."""
    for scheduler in schedulers:
        scheduler.step()
    pairs = list(zip(schedulers, targets, strict=True))
    by_iter = [pair for pair in pairs if not pair[0].by_epoch]
    by_epoch = [pair for pair in pairs if pair[0].by_epoch]
    epochs = max((target for _, target in by_epoch), default=0)
    iterations = max((target for _, target in by_iter), default=0)

    def advance(chosen: list[tuple[_ParamScheduler, int]]) -> None:
        for scheduler, target in chosen:
            if scheduler._global_step < target:
                scheduler.step()

    for _ in range(epochs):
        for _ in range(epoch_length if by_iter else 0):
            advance(by_iter)
        advance(by_epoch)
    for _ in range(iterations):  # iteration-based runs, or a checkpoint in the middle of an epoch
        advance(by_iter)
