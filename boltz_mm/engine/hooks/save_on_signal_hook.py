"""Save and end when the job is told to go (SIGTERM of a scheduler, time limit, pre-emption)."""

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from boltz_mm.engine.hooks.checkpoint_hook import AtomicCheckpointHook
from boltz_mm.registry import HOOKS


@HOOKS.register_module()
class SaveOnSignalHook(Hook):
    """On SIGTERM finish the iteration, save ``interrupted.pth`` and exit with status 128 + signal number.

    ``--resume`` goes on from there, in the middle of the epoch, and exactly with ``boltz_mm.RNGStateHook``.
    Needs ``boltz_mm.AtomicCheckpointHook``::

        custom_hooks = [dict(type='boltz_mm.SaveOnSignalHook', signals=('SIGTERM', 'SIGUSR1'))]

    With gradient accumulation it waits for the next update.  In a distributed run the ranks agree every ``interval``
    iterations, so that all of them save at the same one.  Ctrl-C is left alone: it ends at once, and the last
    checkpoint stays whole.  The signal has to go to the training process, not to its data workers.

    Args:
        signals: Names of the signals.
        interval: Iterations between two agreements in a distributed run.
    """

    priority = 'LOWEST'

    def __init__(self, signals: Sequence[str] = ('SIGTERM',), interval: int = 10) -> None:
        unknown = [name for name in signals if not hasattr(signal, name)]
        if unknown:
            raise ValueError(f'unknown signals: {", ".join(unknown)}')
        if interval < 1:
            raise ValueError(f'interval must be positive, got {interval}')
        self.signals = tuple(signals)
        self.interval = interval
        self._received = 0
        self._old: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Listen."""
        if threading.current_thread() is not threading.main_thread():
            runner.logger.warning('SaveOnSignalHook can only listen in the main thread, and does nothing here')
            return
        for name in self.signals:
            number = getattr(signal, name)
            self._old[number] = signal.signal(number, self._note)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Save and end if a signal has come, on all ranks together.

        Raises:
            SystemExit: After saving.
        """
        # Between two updates of an accumulation the gradients so far would be lost.
        if not runner.optim_wrapper.should_update() or not self._agreed(runner):
            return
        hook = next((hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook)), None)
        number = int(self._received or signal.SIGTERM)
        if hook is None:
            runner.logger.error('SaveOnSignalHook needs boltz_mm.AtomicCheckpointHook: ending without a checkpoint')
        else:
            runner.logger.warning(f'Signal {number}: saved {hook.save_interrupted(runner)}, ending')
        self.after_train(runner)
        raise SystemExit(128 + number)

    def after_train(self, runner: Runner) -> None:
        """Give the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _agreed(self, runner: Runner) -> bool:
        if get_world_size() == 1:
            return bool(self._received)
        if (runner.iter + 1) % self.interval:
            return False
        flag = torch.tensor(float(bool(self._received)))
        if torch.distributed.get_backend() == 'nccl':
            flag = flag.cuda()
        all_reduce(flag, op='max')
        return bool(flag)
