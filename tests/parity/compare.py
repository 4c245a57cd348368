"""The comparison rule of the golden cases: ``|ours - stored| <= atol + rtol * |stored|``, or equality."""

from typing import Any

import numpy as np
import torch


def mismatch(ours: Any, stored: Any, rule: dict[str, Any]) -> str | None:
    """Hold one value against the stored one.

    Returns:
        ``None`` if it holds, otherwise one line that says by how much it does not.
    """
    ours, stored = _as_tensor(ours), _as_tensor(stored)
    if isinstance(stored, torch.Tensor) != isinstance(ours, torch.Tensor):
        return f'got {ours!r}, stored {stored!r}'
    if not isinstance(stored, torch.Tensor):
        return None if ours == stored else f'got {ours!r}, stored {stored!r}'
    if tuple(ours.shape) != tuple(stored.shape):
        return f'shape {tuple(ours.shape)}, stored {tuple(stored.shape)}'
    if rule.get('equal'):
        different = ours.to(stored.dtype) != stored
        # A value that the stored integer type cannot hold must not pass by wrapping around.
        different |= ours.double() != stored.double()
        count = int(different.sum())
        return f'{count} of {stored.numel()} elements differ' if count else None
    if ours.numel() == 0:
        return None
    ours, stored = ours.double(), stored.double()
    finite = stored.isfinite()
    if not bool(finite.all()):
        if 'nonfinite' not in rule:
            return 'the stored value is not finite and the case has no rule for that'
        if not bool(ours[~finite].isfinite().all()):
            return 'not finite where the stored value is not'
    excess = (ours - stored).abs() - (rule['atol'] + rule['rtol'] * stored.abs())
    bad = ~(excess <= 0) & finite  # also catches NaN on our side
    if not bool(bad.any()):
        return None
    error = (ours - stored).abs()[bad]
    worst = error.max() if bool(error.isfinite().all()) else torch.tensor(float('nan'))
    return f'{int(bad.sum())} of {stored.numel()} elements off, worst by {float(worst):.3g} ({rule})'


def _as_tensor(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, bool | int | float | np.number):
        return torch.as_tensor(value)
    if isinstance(value, list | tuple) and value and all(isinstance(v, int | float) for v in value):
        return torch.tensor(value)
    return value
