"""Inert stand-ins for the classes that a pickled checkpoint may name.

A pickle names classes and functions and asks the reader to call them.  :mod:`boltz_mm.utils.checkpoint` reads with
torch's ``weights_only`` unpickler, which looks names up in a table instead of importing them; the table entries of
this module keep the recorded data and run nothing: numpy's array machinery is replaced by a decoder of plain bytes,
and every other allowed class by a record of its arguments and state.
"""

from collections.abc import Callable, Iterable
from pickle import UnpicklingError
from typing import Any

import numpy as np

Globals = list[Callable[..., Any] | tuple[Callable[..., Any], str]]

HISTORY_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'
MMENGINE: tuple[str, ...] = (HISTORY_BUFFER, 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler')
"""What a training checkpoint of mmengine names beyond tensors, containers and numpy."""


class InertRecord:
    """An object of a class that was not imported: only what the file says about it.

    Attributes:
        source: Dotted name of the class in the file.
        args: Arguments it was to be called with.
        state: State it was to be given; None when the file gave none.
    """

    source = ''
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> 'InertRecord':
        """Keep the arguments; nothing is called."""
        record = super().__new__(cls)
        record.args = args
        record.state = None
        return record

    def __init__(self, *args: Any) -> None:
        """Accept what :meth:`__new__` has kept already."""

    def __setstate__(self, state: Any) -> None:
        """Keep the state; no attribute is set from it."""
        self.state = state

    def __repr__(self) -> str:
        return f'<inert {self.source}>'


class _Dtype:
    """Stands for ``numpy.dtype``: name and byte order of a plain element type."""

    def __init__(self, name: Any, align: Any = False, copy: Any = True) -> None:
        name = name.decode('ascii') if isinstance(name, bytes) else name
        if not isinstance(name, str) or not name or name[0] not in 'biufcSUOV':
            raise UnpicklingError(f'numpy element type {name!r} is not supported')
        self.name = name
        self.order = '='

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subdtype, names, fields, element size, alignment, flags)
        if not isinstance(state, tuple) or len(state) < 5 or any(state[2:5]):
            raise UnpicklingError('structured numpy element types are not supported')
        order = state[1].decode('ascii') if isinstance(state[1], bytes) else state[1]
        self.order = order if order in ('<', '>', '=') else '='

    def resolve(self) -> np.dtype:
        return np.dtype(self.name).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stands for ``numpy.ndarray``: the raw bytes, decoded by :func:`to_python`."""

    def __init__(self) -> None:
        self.array: np.ndarray = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype):
            raise UnpicklingError('a numpy array without an element type')
        resolved = dtype.resolve()
        if resolved.hasobject:
            if not isinstance(raw, list) or len(raw) != int(np.prod(shape)):
                raise UnpicklingError('a numpy array of objects with a wrong number of entries')
            flat: np.ndarray = np.empty(len(raw), dtype=object)
            flat[:] = raw
        else:
            raw = raw.encode('latin1') if isinstance(raw, str) else raw
            flat = np.frombuffer(raw, dtype=resolved).copy()
        self.array = flat.reshape(shape, order='F' if fortran else 'C')


def _reconstruct(subtype: Any, shape: Any, typecode: Any) -> _Array:
    if subtype is not _Array:
        raise UnpicklingError('only plain numpy arrays are supported')
    return _Array()


def _scalar(dtype: Any, raw: Any = None) -> Any:
    if not isinstance(dtype, _Dtype) or dtype.resolve().hasobject:
        raise UnpicklingError('a numpy scalar without a plain element type')
    raw = raw.encode('latin1') if isinstance(raw, str) else raw
    return np.frombuffer(raw, dtype=dtype.resolve(), count=1)[0]


def _no_bytes() -> bytes:
    """Stands for ``bytes``, which the pickles of torch call only to make an empty one."""
    return b''


def _method_of_record(owner: Any, name: Any) -> InertRecord:
    """Stands for ``getattr``: some classes of mmengine pickle references to their own methods, and nothing else may."""
    if not (isinstance(owner, type) and issubclass(owner, InertRecord)):
        raise UnpicklingError('getattr on anything but a recorded class')
    record = InertRecord()
    record.source = f'{owner.source}.{name}'
    return record


def stand_ins(allow: Iterable[str]) -> Globals:
    """Table of stand-ins for torch's ``safe_globals``.

    Args:
        allow: Dotted names of classes that may occur besides numpy's; each becomes an :class:`InertRecord`.

    Raises:
        ValueError: A name is not dotted, or is one that no checkpoint needs.
    """
    table: Globals = [
        (_Dtype, 'numpy.dtype'),
        (_Array, 'numpy.ndarray'),
        (_Dtype, 'numpy.dtypes.Float64DType'),
        (_Dtype, 'numpy.dtypes.Int64DType'),
        (_no_bytes, 'builtins.bytes'),
    ]
    for core in ('numpy.core', 'numpy._core'):
        table += [(_reconstruct, f'{core}.multiarray._reconstruct'), (_scalar, f'{core}.multiarray.scalar')]
    for name in dict.fromkeys(allow):
        module = name.split('.')[0]
        if '.' not in name or module in ('builtins', 'os', 'sys', 'posix', 'nt', 'subprocess'):
            raise ValueError(f'{name!r} cannot be allowed in a checkpoint')
        table.append((type('InertRecord', (InertRecord,), {'source': name}), name))
        if name == HISTORY_BUFFER:
            table.append((_method_of_record, 'builtins.getattr'))
    return table


def to_python(value: Any, convert: Callable[[InertRecord], Any] | None = None) -> Any:
    """Replace decoded arrays inside nested containers by numpy arrays, in place where that is possible.

    Args:
        value: What the unpickler returned.
        convert: Applied to each :class:`InertRecord`, whose state has been treated first; None leaves records.
    """
    return _convert(value, convert or (lambda record: record), {})


def _convert(value: Any, convert: Callable[[InertRecord], Any], done: dict[int, tuple[Any, Any]]) -> Any:
    # `done` keeps the originals alive: an id must not be reused while the walk runs.
    if id(value) in done:
        return done[id(value)][1]
    result = value
    if isinstance(value, dict):
        done[id(value)] = (value, value)
        for key in list(value):
            value[key] = _convert(value[key], convert, done)
    elif isinstance(value, list):
        done[id(value)] = (value, value)
        value[:] = [_convert(item, convert, done) for item in value]
    elif type(value) is tuple:
        result = tuple(_convert(item, convert, done) for item in value)
    elif isinstance(value, _Array):
        result = value.array
        if result.dtype.hasobject:
            result.flat[:] = [_convert(item, convert, done) for item in result.flat]
    elif isinstance(value, InertRecord):
        done[id(value)] = (value, value)
        value.state = _convert(value.state, convert, done)
        result = convert(value)
    done[id(value)] = (value, result)
    return result
