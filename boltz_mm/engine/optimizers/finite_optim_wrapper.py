"""Optimizer wrappers that leave out a step whose gradients are not finite.

The official BoxeR training takes such a step (all weights become NaN) and merely does not count it; here it is skipped.
"""

import logging
from functools import partial
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch.nn.utils import clip_grad_norm_, get_total_norm

from boltz_mm.registry import OPTIM_WRAPPERS

_SKIPPED = 'skipped_steps'


class NonFiniteGradientError(RuntimeError):
    """Too many steps in a row had gradients that are not finite."""


@OPTIM_WRAPPERS.register_module()
class FiniteOptimWrapper(OptimWrapper):
    """mmengine's ``OptimWrapper`` that skips and counts steps with NaN or infinite gradients.

    The parameter schedulers go on counting iterations, skipped ones included, as they do with a loss scaler.  The
    number of skipped steps is kept in the message hub (``skipped_steps``) and so in checkpoints::

        optim_wrapper = dict(type='boltz_mm.FiniteOptimWrapper', optimizer=..., clip_grad=dict(max_norm=0.1))

    Args:
        *args: As for ``OptimWrapper``.
        max_consecutive_skips: Give up after so many skipped steps in a row.
        **kwargs: As for ``OptimWrapper``.
    """

    def __init__(self, *args: Any, max_consecutive_skips: int = 100, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_guard(max_consecutive_skips)

    def _init_guard(self, max_consecutive_skips: int) -> None:
        if max_consecutive_skips < 1:
            raise ValueError(f'max_consecutive_skips must be positive, got {max_consecutive_skips}')
        self.max_consecutive_skips = max_consecutive_skips
        self._in_a_row = 0

    @property
    def skipped_steps(self) -> int:
        """Number of steps left out since the start of training."""
        return int(self.message_hub.get_info(_SKIPPED, 0))

    def step(self, **kwargs: Any) -> None:
        """Clip as configured and update the parameters, unless the gradients are not finite.

        Raises:
            NonFiniteGradientError: ``max_consecutive_skips`` steps in a row were skipped.
        """
        if self._clip_and_check():
            self.optimizer.step(**kwargs)

    def _clip_and_check(self) -> bool:
        """Clip the gradients; return whether they are finite."""
        params = [
            param for group in self.optimizer.param_groups for param in group['params']
            if param.requires_grad and param.grad is not None
        ]  # fmt: skip
        if not params:
            return True
        clips_norm = bool(self.clip_grad_kwargs) and self.clip_func is clip_grad_norm_
        if clips_norm:
            norm = clip_grad_norm_(params, **self.clip_grad_kwargs)
        else:
            norm = get_total_norm([param.grad for param in params])
        if not bool(torch.isfinite(norm)):
            self._skip(float(norm))
            return False
        if clips_norm:
            self.message_hub.update_scalar('train/grad_norm', float(norm))
        elif self.clip_grad_kwargs:
            self.clip_func(params, **self.clip_grad_kwargs)
        self._in_a_row = 0
        return True

    def _skip(self, norm: float) -> None:
        self._in_a_row += 1
        total = self.skipped_steps + 1
        self.message_hub.update_info(_SKIPPED, total)
        print_log(f'Gradient norm is {norm}: step skipped ({total} so far)', logger='current', level=logging.WARNING)
        if self._in_a_row >= self.max_consecutive_skips:
            raise NonFiniteGradientError(
                f'the gradients of {self._in_a_row} steps in a row were not finite; '
                f'last good checkpoint: {self.message_hub.get_info("last_ckpt") or "none was written yet"}'
            )


@OPTIM_WRAPPERS.register_module()
class FiniteAmpOptimWrapper(FiniteOptimWrapper, AmpOptimWrapper):
    """:class:`FiniteOptimWrapper` with automatic mixed precision; works on CPU as well (bfloat16).

    Takes the arguments of mmengine's ``AmpOptimWrapper``, which refuses to work without a GPU.  A step is skipped when
    the loss scaler saw a gradient that is not finite, and when the norm of finite gradients overflows.

    Args:
        loss_scale: ``'dynamic'``, a number for a fixed scale, or arguments of ``torch.amp.GradScaler``.
        dtype: Name of the autocast type; None for the default of the device.
        use_fsdp: Use the scaler for sharded gradients.
        max_consecutive_skips: Give up after so many skipped steps in a row.
        **kwargs: As for ``OptimWrapper``.
    """

    def __init__(
        self,
        loss_scale: str | float | dict = 'dynamic',
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        max_consecutive_skips: int = 100,
        **kwargs: Any,
    ) -> None:
        if torch.accelerator.is_available():
            AmpOptimWrapper.__init__(self, loss_scale, dtype, use_fsdp, **kwargs)  # type: ignore[arg-type]
        else:
            OptimWrapper.__init__(self, **kwargs)
            self._init_on_cpu(loss_scale, dtype)
        self._init_guard(max_consecutive_skips)

    def _init_on_cpu(self, loss_scale: str | float | dict, dtype: str | torch.dtype | None) -> None:
        scaler = partial(torch.amp.GradScaler, device='cpu')
        self._scale_update_param = None
        if isinstance(loss_scale, dict):
            self.loss_scaler = scaler(**loss_scale)
        elif isinstance(loss_scale, int | float):
            self._scale_update_param = float(loss_scale)
            self.loss_scaler = scaler(init_scale=float(loss_scale))
        elif loss_scale == 'dynamic':
            self.loss_scaler = scaler()
        else:
            raise TypeError(f"loss_scale must be a number, a dict or 'dynamic', got {loss_scale!r}")
        if isinstance(dtype, str) and dtype not in self.valid_dtypes:
            raise ValueError(f'dtype must be one of {self.valid_dtypes}, got {dtype!r}')
        self.cast_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def step(self, **kwargs: Any) -> None:
        """Unscale, clip, update unless the gradients are not finite, and adapt the scale.

        Raises:
            NonFiniteGradientError: ``max_consecutive_skips`` steps in a row were skipped.
        """
        self.loss_scaler.unscale_(self.optimizer)
        if self._clip_and_check():
            self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update(self._scale_update_param)
