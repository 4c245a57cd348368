"""The cosine of AutoFocusFormer's classification recipe (official ``lr_scheduler.py``, timm's ``CosineLRScheduler``).

mmengine's ``LinearLR`` with ``CosineAnnealingLR(begin=warmup)`` starts the cosine at the end of the warm-up; here its
time runs from the first update on, so that the rate drops a little where the warm-up ends.
"""

import math
from typing import Any

from mmengine.optim import _ParamScheduler
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin

from boltz_mm.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(LRSchedulerMixin, _ParamScheduler):
    r"""Linear warm-up, then a cosine whose time is counted from 0 and not from the end of the warm-up.

    With the base rate :math:`b` of a parameter group,

    .. math::
        f(t) = \begin{cases}
            s b + t (b - s b) / W & t < W \\
            m b + \tfrac12 (b - m b) (1 + \cos(\pi t / T)) & W \le t < T \\
            m b & t \ge T
        \end{cases}

    for ``start_ratio`` :math:`s`, ``warmup`` :math:`W`, ``min_ratio`` :math:`m`, ``total`` :math:`T`.  Update
    :math:`i` runs at :math:`f(\max(i - 1, 0))`: the official schedule is stepped after the update, with its number.

    Bounds are ratios, so that they follow the base rate where ``--auto-scale-lr`` changes it, as the official ones do::

        param_scheduler = dict(
            type='boltz_mm.WarmupCosineLR', warmup=20, total=300, start_ratio=1e-3, min_ratio=1e-2,
            convert_to_iter_based=True)

    Args:
        optimizer: The optimizer, or its wrapper.
        total: Length of the schedule, warm-up included.
        warmup: Length of the warm-up.
        start_ratio: First rate, in units of the base rate.
        min_ratio: Last rate, in units of the base rate.
        **kwargs: ``begin``, ``end``, ``last_step``, ``by_epoch`` and ``verbose`` of mmengine's schedulers.

    Raises:
        ValueError: Not 0 <= warmup < total.
    """

    def __init__(
        self,
        optimizer: Any,
        total: int,
        warmup: int = 0,
        start_ratio: float = 1e-3,
        min_ratio: float = 1e-2,
        **kwargs: Any,
    ) -> None:
        if not 0 <= warmup < total:
            raise ValueError(f'0 <= warmup < total must hold, got warmup {warmup} and total {total}')
        self.total, self.warmup = total, warmup
        self.start_ratio, self.min_ratio = start_ratio, min_ratio
        super().__init__(optimizer, **kwargs)

    @classmethod
    def build_iter_from_epoch(
        cls,
        *args: Any,
        total: int,
        warmup: int = 0,
        begin: int = 0,
        end: float = math.inf,
        by_epoch: bool = True,
        epoch_length: int | None = None,
        **kwargs: Any,
    ) -> 'WarmupCosineLR':
        """Build the schedule in updates from lengths in epochs (``convert_to_iter_based``).

        Raises:
            ValueError: The lengths are in updates already, or the length of an epoch is not known.
        """
        if not by_epoch or not epoch_length or epoch_length < 1:
            raise ValueError(f'needs by_epoch and the length of an epoch, got {by_epoch} and {epoch_length}')
        lengths = {'total': int(total * epoch_length), 'warmup': int(warmup * epoch_length)}
        return cls(*args, **lengths, begin=int(begin * epoch_length), end=end * epoch_length, by_epoch=False, **kwargs)

    def ratio(self, time: int) -> float:
        """The rate at a time of the schedule, in units of the base rate."""
        if time < self.warmup:
            return self.start_ratio + time * (1 - self.start_ratio) / self.warmup
        if time >= self.total:
            return self.min_ratio
        return self.min_ratio + 0.5 * (1 - self.min_ratio) * (1 + math.cos(math.pi * time / self.total))

    def _get_value(self) -> list[float]:
        ratio = self.ratio(max(self.last_step - 1, 0))
        return [base * ratio for base in self.base_values]
