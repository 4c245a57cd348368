"""Checkpoints that are either complete or absent, and that are checked when they are read.

Replaces mmengine's ``CheckpointHook``, which overwrites in place (a crash while saving leaves half a file), removes the
old checkpoint before the new one is written, and truncates ``last_checkpoint`` before filling it.
"""

import hashlib
import io
import os.path as osp
from collections import deque
from typing import Any

import torch
from mmengine.dist import is_main_process, master_only
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint

from boltz_mm.engine.atomic_backend import ATOMIC_BACKEND
from boltz_mm.registry import HOOKS
from boltz_mm.utils.checkpoint import CheckpointError, compare_state
from boltz_mm.utils.files import atomic_write_bytes, atomic_write_text, remove_stale_temporaries
from boltz_mm.utils.restricted_loading import read_mmengine_checkpoint

INTERRUPTED = 'interrupted.pth'


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """Save checkpoints in one step each; refuse to resume or test with one that does not fit the model.

    Takes the arguments of mmengine's ``CheckpointHook`` and goes into its place::

        default_hooks = dict(checkpoint=dict(type='boltz_mm.AtomicCheckpointHook', interval=1, max_keep_ckpts=3))

    A checkpoint is written under a temporary name, flushed and renamed; then ``last_checkpoint`` is replaced in the
    same way; only then older checkpoints go.  A full disk, a crash or Ctrl-C while saving thus leaves the previous
    checkpoint and pointer, and ends in one error that names the file.  Checkpoints that go elsewhere than to the local
    disk (``backend_args``, an address as ``out_dir``) are written as that backend does it.

    When a checkpoint is read: resuming needs every key to fit, testing needs every weight of the model, and fine-tuning
    (``load_from``) needs at least one; otherwise a :class:`CheckpointError` lists the keys and likely causes, such as
    the number of classes in the file.

    Before every save the extra hook point ``before_gather_checkpoint(runner)`` is called on **all** ranks, for hooks
    that collect something from each rank (mmengine calls ``before_save_checkpoint`` on the first alone).
    """

    def before_train(self, runner: Runner) -> None:
        """Choose the backend and clear away what killed writers left."""
        if self.out_dir is None:
            self.out_dir = runner.work_dir
        local = '://' not in str(self.out_dir)
        if local and self.backend_args is None and self.file_client_args is None:
            self.backend_args = dict(backend=ATOMIC_BACKEND)
        super().before_train(runner)
        if local and is_main_process() and osp.isdir(self.out_dir):
            remove_stale_temporaries(self.out_dir)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the file with the model before anything is loaded.

        Raises:
            CheckpointError: It does not fit; see the class.
        """
        source = runner._load_from or find_latest_checkpoint(runner.work_dir) or 'checkpoint'
        training = isinstance(runner._train_loop, BaseLoop)
        resuming = training and runner._resume
        if resuming and not {'meta', 'message_hub', 'state_dict'} <= set(checkpoint):
            raise CheckpointError(f'{source}: holds weights only, nothing to resume; use load_from for it')
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        state = checkpoint.get('state_dict', checkpoint)
        # mmengine strips this prefix after the hooks.
        diff = compare_state(model, {key.removeprefix('module.'): value for key, value in state.items()})
        lacking = bool(diff.missing or diff.mismatched)
        if (resuming and diff) or (not training and lacking) or (diff and not diff.matched):
            purpose = 'resume' if resuming else 'train' if training else 'test'
            raise CheckpointError(
                f'{source}: does not fit {type(model).__name__}, cannot {purpose} with it\n  {diff.explain()}'
            )
        for cause in diff.causes():
            runner.logger.warning(f'{source}: {cause}')

    def save_interrupted(self, runner: Runner) -> str:
        """Save in the middle of an epoch, after the current iteration, as ``interrupted.pth``; call it on all ranks.

        Returns:
            Path of the checkpoint, to which ``last_checkpoint`` points from now on.
        """
        meta = dict(epoch=runner.epoch, iter=runner.iter + 1)
        path = self.file_backend.join_path(self.out_dir, INTERRUPTED)
        self._write(runner, INTERRUPTED, path, meta, save_optimizer=True, save_param_scheduler=True)
        return path

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        # The new list of kept checkpoints goes into the checkpoint; the files themselves go when it is on the disk.
        surplus: list[int] = []
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            kept = [number for number in self.keep_ckpt_ids if number != step] + [step]
            surplus, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        name = self.filename_tmpl.format(step)
        path = self.file_backend.join_path(self.out_dir, name)
        self._write(
            runner,
            name,
            path,
            meta,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            **self.args,
        )
        if is_main_process():
            for old in surplus:
                self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))
            # A checkpoint of a signal has served when a later one is there.
            self._remove(self.file_backend.join_path(self.out_dir, INTERRUPTED))

    def _write(self, runner: Runner, name: str, path: str, meta: dict, **kwargs: Any) -> None:
        runner.call_hook('before_gather_checkpoint')
        previous = runner.message_hub.get_info('last_ckpt')
        runner.message_hub.update_info('last_ckpt', path)
        try:
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **kwargs,
            )
        except BaseException:
            runner.message_hub.update_info('last_ckpt', previous)
            raise
        self.last_ckpt = path
        if is_main_process():
            atomic_write_text(osp.join(runner.work_dir, 'last_checkpoint'), path)

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # written by deepspeed
            self.file_backend.rmtree(path)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        runner.call_hook('before_gather_checkpoint')
        # The base class removes the previous best checkpoint before it saves the new one: hold the removals back.
        backend, held = self.file_backend, _HeldBack(self.file_backend)
        self.file_backend = held
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        current = {self.best_ckpt_path} if len(self.key_indicators) == 1 else set(self.best_ckpt_path_dict.values())
        for path in held.removals:
            if path not in current:
                self._remove(path)

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        # The base class names the file after a hash of something else than the file.
        content = read_mmengine_checkpoint(ckpt_path)
        buffer = io.BytesIO()
        torch.save({key: value for key, value in content.items() if key in self.published_keys}, buffer)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        path = f'{osp.splitext(ckpt_path)[0]}-{digest[:8]}.pth'
        atomic_write_bytes(path, buffer.getvalue())
        runner.logger.info(f'The checkpoint ({ckpt_path}) is published to {path}.')


class _HeldBack:
    """A file backend whose removals are noted down instead of done."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.removals: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.removals.append(path)

    rmtree = remove
