"""Hooks."""

from boltz_mm.engine.hooks.checkpoint_hook import AtomicCheckpointHook
from boltz_mm.engine.hooks.non_finite_loss_hook import NonFiniteLossError, NonFiniteLossHook
from boltz_mm.engine.hooks.rng_state_hook import RNGStateHook
from boltz_mm.engine.hooks.save_on_signal_hook import SaveOnSignalHook
from boltz_mm.engine.hooks.schedule_refresh_hook import ScheduleRefreshHook

__all__ = [
    'AtomicCheckpointHook',
    'NonFiniteLossError',
    'NonFiniteLossHook',
    'RNGStateHook',
    'SaveOnSignalHook',
    'ScheduleRefreshHook',
]
