"""Route mmengine's checkpoint loading through :func:`boltz_mm.utils.checkpoint.read_checkpoint`.

``load_from``, ``resume``, ``init_cfg=dict(type='Pretrained', ...)``, ``mim test``, and the inferencers all end in
mmengine's ``CheckpointLoader``, a table from address prefix to function.  :func:`use_restricted_loading` replaces its
entries.  Importing :mod:`boltz_mm.engine` calls it, so it holds in every run that uses a hook, loop or model of ours; a
config for mmdet's own inferencer should list ``boltz_mm.engine`` in ``custom_imports``, because that one reads the
checkpoint before it builds anything.
"""

import os
from typing import Any

from boltz_mm.utils import inert
from boltz_mm.utils.checkpoint import CheckpointError, read_checkpoint


def use_restricted_loading() -> None:
    """Make mmengine read checkpoints with the restricted reader; safe to call again."""
    from mmengine.runner.checkpoint import CheckpointLoader

    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(['http://', 'https://'], load_from_http, force=True)
    CheckpointLoader.register_scheme(['torchvision://', 'modelzoo://'], load_from_torchvision, force=True)
    CheckpointLoader.register_scheme(['open-mmlab://', 'openmmlab://'], load_from_openmmlab, force=True)
    CheckpointLoader.register_scheme('mmcls://', load_from_mmcls, force=True)
    CheckpointLoader.register_scheme(
        ['pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://'], load_from_unsupported, force=True
    )


def read_mmengine_checkpoint(path: str | os.PathLike, map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a checkpoint of mmengine, message hub and all, for resuming or for its weights.

    Log histories come back as real ``HistoryBuffer`` objects, made here from the recorded numbers.  The entry
    ``meta['config']`` is dropped: mmengine never writes it but runs it as Python code when it resumes.

    Raises:
        CheckpointError: See :func:`boltz_mm.utils.checkpoint.read_checkpoint`.
    """
    # Copied out of the mapping: optimizer states live on in training while checkpoint files come and go.
    content = read_checkpoint(path, inert.MMENGINE, map_location=map_location or 'cpu', convert=_history, copy=True)
    meta = content.get('meta')
    if isinstance(meta, dict):
        meta.pop('config', None)
    _drop_methods(content.get('param_schedulers'))
    return content


def _drop_methods(schedulers: Any) -> None:
    """A scheduler pickles the functions it calls; the one that is resumed has its own."""
    if isinstance(schedulers, dict) and 'last_step' not in schedulers:
        schedulers = [state for group in schedulers.values() for state in group]
    for state in schedulers if isinstance(schedulers, list) else ():
        for key in [key for key, value in state.items() if isinstance(value, inert.InertRecord)]:
            del state[key]


def _history(record: inert.InertRecord) -> Any:
    if record.source != inert.HISTORY_BUFFER:
        return record
    from mmengine.logging import HistoryBuffer

    state = record.state if isinstance(record.state, dict) else {}
    values, counts = state.get('_log_history', ()), state.get('_count_history', ())
    if len(values) != len(counts):
        raise ValueError('a log history with as many values as counts was expected')
    return HistoryBuffer(values, counts, int(state.get('max_length', 1_000_000)))


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loader of local files."""
    return read_mmengine_checkpoint(filename, map_location)


def load_from_http(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loader of addresses: https only; in a distributed run the first rank fetches and the others wait."""
    from mmengine.dist import barrier, is_main_process

    # The barrier is reached whatever happens to the first rank, so that nobody waits for ever.
    if not is_main_process():
        barrier()
    try:
        return read_mmengine_checkpoint(filename, map_location)
    finally:
        if is_main_process():
            barrier()


def load_from_torchvision(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loader of ``torchvision://NAME``: mmengine's table of addresses, our reader."""
    from mmengine.runner.checkpoint import get_torchvision_models

    return load_from_http(_look_up(get_torchvision_models(), filename), map_location)


def load_from_openmmlab(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loader of ``open-mmlab://NAME``."""
    from mmengine.runner.checkpoint import get_deprecated_model_names, get_external_models

    name = filename.split('://', 1)[1]
    name = get_deprecated_model_names().get(name, name)
    address = _look_up(get_external_models(), f'open-mmlab://{name}')
    return load_from_http(address, map_location) if '://' in address else load_from_local(address, map_location)


def load_from_mmcls(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loader of ``mmcls://NAME``: the backbone part of a classifier."""
    from mmengine.runner.checkpoint import get_mmcls_models

    content = load_from_http(_look_up(get_mmcls_models(), filename), map_location)
    state = content.get('state_dict', content)
    return {
        'state_dict': {
            key.removeprefix('backbone.'): value for key, value in state.items() if key.startswith('backbone.')
        }
    }


def load_from_unsupported(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Addresses for which there is no restricted way of reading.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(f'{filename}: fetch the file first and name the local copy')


def _look_up(table: dict[str, str], filename: str) -> str:
    name = filename.split('://', 1)[1]
    if name not in table:
        raise CheckpointError(f'{filename}: there is no checkpoint of this name')
    return table[name]
