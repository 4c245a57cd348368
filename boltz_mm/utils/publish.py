"""Turn a training checkpoint into a file to hand out: weights and plain facts as safetensors, named after its hash."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boltz_mm.utils.checkpoint import save_safetensors, state_dict_of
from boltz_mm.utils.files import sha256_of
from boltz_mm.utils.restricted_loading import read_mmengine_checkpoint

_FACTS = ('epoch', 'iter', 'dataset_meta', 'mmengine_version', 'num_classes', 'converted_from')


def publish(
    source: str | os.PathLike,
    target: str | os.PathLike | None = None,
    *,
    with_config: bool = False,
    half: bool = False,
) -> Path:
    """Write the weights of a checkpoint as ``TARGET-<first 8 digits of SHA-256>.safetensors``.

    Optimizer, schedules, logs and random states stay behind. Of a run with averaged weights (EMA) these are taken, as
    mmengine stores them in place of the plain ones.

    Args:
        source: Checkpoint of a training run, or any file that the restricted reader accepts.
        target: Path without suffix. Default: that of the source.
        with_config: Also keep the text of the config, from which mmdet's inferencer can build the model without a
            config file. It may name folders of the machine that trained.
        half: Store floating-point weights in 16 bits.

    Returns:
        The new file.

    Raises:
        boltz_mm.utils.checkpoint.CheckpointError: The source cannot be read or holds no weights.
        boltz_mm.utils.files.WriteError: The file could not be written.
    """
    content = read_mmengine_checkpoint(source)
    state = state_dict_of(content, source)
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    meta = content.get('meta')
    known: dict[str, Any] = meta if isinstance(meta, dict) else {}
    keep = _FACTS + (('cfg',) if with_config else ())
    facts = {key: _plain(known[key]) for key in keep if key in known}
    stem = Path(target) if target is not None else Path(source).with_suffix('')
    stem.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stem.parent, prefix='.publish-') as folder:
        written = Path(folder) / 'weights.safetensors'
        save_safetensors(state, written, facts)
        final = stem.with_name(f'{stem.name}-{sha256_of(written)[:8]}.safetensors')
        os.replace(written, final)
    return final


def _plain(value: Any) -> Any:
    """The same in types that JSON knows."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
