"""Exact resume: every random state of every rank goes into the checkpoint and comes back.

mmengine's checkpoints hold no random state, so a resumed run differs from an uninterrupted one as soon as the model or
the data pipeline draws (dropout, sampled points, clicks, random resize).
"""

import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from boltz_mm.engine.sample_seeding import SampleSeeding
from boltz_mm.registry import HOOKS


def rng_state() -> dict[str, Any]:
    """Random states of this process as tensors and numbers: python, numpy, torch CPU and all CUDA devices."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = legacy
    return dict(
        python=(version, torch.tensor(words, dtype=torch.int64), gauss),
        numpy=(str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    )


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned; states of devices that are not there are left out."""
    version, words, gauss = state['python']
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'].cpu())
    if torch.cuda.is_available():
        for device, value in enumerate(state['cuda'][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value.cpu(), device)


@HOOKS.register_module()
class RNGStateHook(Hook):
    """Make 2 + 2 epochs the same as 4: random states, sampler seed and place in the data are saved and restored.

    Use it with :class:`boltz_mm.engine.hooks.AtomicCheckpointHook`, which lets it collect the states of all ranks::

        custom_hooks = [dict(type='boltz_mm.RNGStateHook')]

    - Works for epoch-based and iteration-based loops, also when the checkpoint was written in the middle of an epoch
      (mmengine would repeat that epoch from its start).
    - Validation no longer changes the random states of training.
    - Augmentations no longer depend on the number of workers (see :mod:`boltz_mm.engine.sample_seeding`).
    - Resuming with another number of processes is allowed; a warning says that it is not exact.

    Not covered: hooks of others that draw between two iterations, and datasets that are only iterable.

    Args:
        seed_samples: Whether each sample gets a seed of its own. Without it only runs with ``num_workers=0`` resume
            exactly.
    """

    priority = 'VERY_HIGH'

    def __init__(self, seed_samples: bool = True) -> None:
        self.seed_samples = seed_samples
        self._seeding: SampleSeeding | None = None
        self._resumed: dict[str, Any] | None = None
        self._gathered: list[dict[str, Any]] | None = None
        self._before_val: dict[str, Any] | None = None
        self._batches_done = 0
        self._skip = 0
        self._pending = False

    # -- saving --------------------------------------------------------------------------------------------------------
    def before_gather_checkpoint(self, runner: Runner) -> None:
        """Collect the states of all ranks; a call on every rank."""
        self._gathered = all_gather_object(rng_state())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add ``checkpoint['rng_state']``; called on the first rank."""
        if self._gathered is None:
            if get_world_size() > 1:
                runner.logger.warning(
                    'RNGStateHook saves the random state of the first rank only: use boltz_mm.AtomicCheckpointHook'
                )
            self._gathered = [rng_state()]
        loader = runner.train_dataloader
        checkpoint['rng_state'] = dict(
            ranks=self._gathered,
            sampler_seed=getattr(_sampler_of(loader), 'seed', None),
            batches_done=self._batches_done,
            batches_per_epoch=_length(loader),
        )
        self._gathered = None

    # -- restoring -----------------------------------------------------------------------------------------------------
    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the states of a checkpoint that is being resumed until training starts."""
        if not runner._resume:
            return
        self._resumed = checkpoint.get('rng_state')
        if self._resumed is None:
            runner.logger.warning('The checkpoint holds no random state: this resume is not exact')
        elif len(self._resumed['ranks']) != get_world_size():
            runner.logger.warning(
                f'The checkpoint comes from {len(self._resumed["ranks"])} process(es), this run has '
                f'{get_world_size()}: this resume is not exact'
            )

    def before_train(self, runner: Runner) -> None:
        """Prepare the data loader and find the place in the data."""
        loader, resumed = runner.train_dataloader, self._resumed
        sampler = _sampler_of(loader)
        if resumed is not None and resumed['sampler_seed'] is not None and hasattr(sampler, 'seed'):
            sampler.seed = resumed['sampler_seed']
        if self.seed_samples:
            self._seeding = SampleSeeding(loader, runner.seed, get_rank())
            if not self._seeding.active:
                runner.logger.warning(
                    f'Samples of {type(loader.dataset).__name__} cannot be seeded one by one: with workers, '
                    'a resume is not exact'
                )
        self._pending = resumed is not None
        self._skip = 0
        if resumed is not None and isinstance(runner.train_loop, EpochBasedTrainLoop):
            done, before, now = resumed['batches_done'], resumed['batches_per_epoch'], _length(loader)
            self._skip = done if before in (now, 0) else round(done * now / before)
            if self._skip and not (self._seeding and self._seeding.active):
                runner.logger.warning('Cannot skip the part of the epoch that was trained: the epoch starts anew')
                self._skip = 0

    def before_train_epoch(self, runner: Runner) -> None:
        """Tell the data loader where it stands; restore the states where an epoch begins."""
        loop, loader = runner.train_loop, runner.train_dataloader
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        self._batches_done = self._skip if by_epoch else 0
        if self._seeding is not None:
            if by_epoch:
                self._seeding.start_pass(runner.epoch, runner.epoch * _length(loader), self._skip)
            else:
                # mmengine moves the sampler itself, or else makes it yield the batches that were trained.
                moved = hasattr(loader.sampler, 'skip') and bool(loader.batch_size)
                moved |= getattr(loop, 'fast_forward_on_resume', False)
                self._seeding.start_pass(0, runner.iter if moved else 0)
        if by_epoch and not self._skip:
            self._restore()
        self._skip = 0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Restore the states where training stopped between two iterations."""
        self._restore()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Count the batches of the epoch."""
        self._batches_done += 1

    def after_train_epoch(self, runner: Runner) -> None:
        """Note that no batch of the next epoch has been used."""
        self._batches_done = 0

    def _restore(self) -> None:
        if not self._pending or self._resumed is None:
            return
        self._pending = False
        ranks = self._resumed['ranks']
        # A rank that the old run did not have keeps its fresh state, different from that of the others.
        if get_rank() < len(ranks):
            set_rng_state(ranks[get_rank()])
        self._resumed = None

    # -- validation leaves no trace ------------------------------------------------------------------------------------
    def before_val(self, runner: Runner) -> None:
        """Keep the states of training."""
        self._before_val = rng_state()

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Go back to the states of training, before the checkpoint hook saves the best model."""
        if self._before_val is not None:
            set_rng_state(self._before_val)
            self._before_val = None


def _sampler_of(loader: Any) -> Any:
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:  # an iterable dataset
        return 0
