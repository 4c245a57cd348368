"""Stop when the loss is no longer a number, and say where."""

import math
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from boltz_mm.registry import HOOKS


class NonFiniteLossError(RuntimeError):
    """The loss was NaN or infinite; names iteration, terms, images and the last good checkpoint."""


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """End training with one error when a loss is NaN or infinite.

    Runs before checkpoints are written, so the last one stays good.  With ``boltz_mm.FiniteOptimWrapper`` the
    weights are good as well, because the step of such a loss is not taken::

        custom_hooks = [dict(type='boltz_mm.NonFiniteLossHook')]

    Args:
        patience: How many such iterations in a row to let pass with a warning; more only makes sense together with
            ``boltz_mm.FiniteOptimWrapper``.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self, patience: int = 0) -> None:
        if patience < 0:
            raise ValueError(f'patience must not be negative, got {patience}')
        self.patience = patience
        self._in_a_row = 0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Look at the total loss, and at the terms if it is not finite.

        Raises:
            NonFiniteLossError: It is not finite, for the (patience + 1)-th time in a row.
        """
        # The total alone: each further look would wait for the device, and other entries (an accuracy) may be NaN.
        if outputs is None or 'loss' not in outputs or _finite(outputs['loss']):
            self._in_a_row = 0
            return
        bad = [name for name, value in outputs.items() if not _finite(value)]
        self._in_a_row += 1
        text = (
            f'iteration {runner.iter + 1} (epoch {runner.epoch + 1}): {", ".join(bad)} not finite; '
            f'images: {_images(data_batch)}; last good checkpoint: '
            f'{runner.message_hub.get_info("last_ckpt") or "none was written yet"}'
        )
        if self._in_a_row > self.patience:
            raise NonFiniteLossError(text)
        runner.logger.warning(text)


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value.detach()).all())
    return not isinstance(value, float) or math.isfinite(value)


def _images(data_batch: Any, limit: int = 32) -> str:
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    names = []
    for sample in samples or ():
        known = [getattr(sample, key) for key in ('img_id', 'img_path') if getattr(sample, key, None) is not None]
        names.append(' '.join(str(part) for part in known) or 'unnamed')
    return ', '.join(names[:limit]) or 'unknown'
