"""Which implementation of an operator runs: the native library, or the PyTorch reference.

The native library is ``boltz_mm._C`` (CPU) and, where it was built, ``boltz_mm._C_cuda``.  It is loaded with
``torch.ops.load_library`` when :mod:`boltz_mm.ops` is imported.  ``BOLTZ_MM_OPS=reference|native`` or
:func:`use_backend` choose; without a choice the native kernels run where they exist.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

BACKENDS = ('reference', 'native')
_ENVIRONMENT = 'BOLTZ_MM_OPS'
_HOW_TO_BUILD = (
    'build it with `pip install --no-build-isolation --no-deps -e .` in the source tree (a C++ compiler is needed), '
    f'or set {_ENVIRONMENT}=reference to choose the PyTorch reference without this message'
)
# Operators by which a library of older sources is recognised.
_NEWEST = ('knn_points', 'space_filling_order', 'point_merge', 'point_deform_attention', 'cluster_attention')

_forced: str | None = None
_loaded_devices: set[str] = set()
_load_errors: dict[str, str] = {}
_warned: set[str] = set()


def _library_path(name: str) -> Path | None:
    folder = Path(__file__).resolve().parent.parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f'{name}{suffix}'
        if path.exists():
            return path
    return None


def _load(name: str, device: str) -> None:
    path = _library_path(name)
    if path is None:
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # built for another system or torch: the reference still works
        _load_errors[device] = str(error.__cause__ or error).replace(str(path.parent), 'boltz_mm')
    else:
        missing = [name for name in _NEWEST if not hasattr(torch.ops.boltz_mm, name)]
        if missing:
            _load_errors[device] = f'it was built from older sources, without {", ".join(missing)}'
        else:
            _loaded_devices.add(device)


def _load_libraries() -> None:
    _load('_C', 'cpu')
    if 'cpu' in _loaded_devices and torch.version.cuda is not None:
        _load('_C_cuda', 'cuda')


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f'{source} must be one of {list(BACKENDS)}, got {name!r}')
    return name


def available_backends() -> list[str]:
    """The backends that run here: ``['reference']``, or ``['reference', 'native']`` where the library was loaded."""
    return ['reference', 'native'] if 'cpu' in _loaded_devices else ['reference']


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators of the enclosed code, in all threads, on one backend.

    Args:
        name: ``'reference'`` or ``'native'``.

    Raises:
        ValueError: ``name`` is no backend.
        RuntimeError: ``name`` is ``'native'`` and the library was not built or does not load.
    """
    global _forced
    _check_name(name, 'the backend')
    if name == 'native' and 'cpu' not in _loaded_devices:
        raise RuntimeError(_missing('cpu'))
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def has_native_operators() -> bool:
    """Whether ``torch.ops.boltz_mm`` has the operators, so that Python parts can be registered for them."""
    return 'cpu' in _loaded_devices


def _missing(device: str) -> str:
    why = f' ({_load_errors[device]})' if device in _load_errors else ''
    return f'the native operator library of boltz_mm for {device} is not available{why}: {_HOW_TO_BUILD}'


def _chosen() -> str | None:
    if _forced is not None:
        return _forced
    name = os.environ.get(_ENVIRONMENT)
    return None if not name else _check_name(name, _ENVIRONMENT)


def use_native(device: torch.device) -> bool:
    """Whether an operator on tensors of this device runs natively.

    Raises:
        RuntimeError: The native backend was asked for and is not there for this device.
        ValueError: ``BOLTZ_MM_OPS`` is no backend.
    """
    chosen = _chosen()
    if chosen == 'reference':
        return False
    if device.type in _loaded_devices or (device.type == 'meta' and 'cpu' in _loaded_devices):
        return True
    if chosen == 'native':
        raise RuntimeError(_missing(device.type))
    if device.type in ('cpu', 'cuda') and device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(f'running on the PyTorch reference, {_missing(device.type)}', stacklevel=3)
    return False


_load_libraries()
