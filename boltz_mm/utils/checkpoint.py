"""The one reader of checkpoints: tensors and plain data come out, nothing in the file is ever run.

mmengine tries torch's restricted unpickler and, when that refuses a file, falls back to the full one, which runs
whatever the file asks for.  Here there is no fallback: a file that needs more than tensors, containers, numpy arrays
and the classes named in ``allow`` is refused with one :class:`CheckpointError`.  safetensors files are accepted too and
are what :func:`save_safetensors` writes.
"""

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boltz_mm.utils import files, inert

_MAX_SAFETENSORS_HEADER = 100_000_000
# A view may have more elements than its storage (expanded buffers); one larger than this is an attack on the memory.
_EXPANSION_SLACK = 64 << 20


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not belong to the model; the message names the file."""


def read_checkpoint(
    path: str | os.PathLike,
    allow: Iterable[str] = (),
    *,
    map_location: str | torch.device | Callable | None = 'cpu',
    convert: Callable[[inert.InertRecord], Any] | None = None,
    copy: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint without running anything that is in it.

    Args:
        path: Local file, or an ``https://`` address (fetched once, see :func:`boltz_mm.utils.files.download`).
            Accepted are zip and older files of ``torch.save`` and safetensors, told apart by content.
        allow: Dotted names of classes that the file may mention, such as ``'argparse.Namespace'``; their objects come
            out as :class:`boltz_mm.utils.inert.InertRecord`. numpy arrays and scalars are always decoded.
        map_location: Where tensors go, as in :func:`torch.load`.
        convert: Called with every inert record; what it returns takes the record's place.
        copy: Zip files are mapped into memory and read when touched. True copies the tensors out of the mapping, for
            a reader that lives longer than the file.

    Returns:
        The dictionary in the file. For safetensors ``{'state_dict': {name: Tensor}, 'meta': dict}``.

    Raises:
        CheckpointError: The file is missing, empty, truncated, not a checkpoint, names a class that is not allowed,
            or declares more data than it holds.
    """
    if str(path).startswith(('http://', 'https://')):
        try:
            path = files.download(str(path))
        except (files.DownloadError, OSError) as error:
            raise CheckpointError(str(error)) from error
    file = Path(path).expanduser()
    size = _size_of(file)
    table = inert.stand_ins(allow)
    # Everything wrong inside a file is the file's fault, whichever of the layers below stumbles over it.
    try:
        kind = _kind_of(file)
        if kind == 'safetensors':
            return _read_safetensors(file, size, map_location)
        content = _read_torch(file, kind, table, map_location)
        _check_tensors(content, size + _EXPANSION_SLACK)
        content = inert.to_python(content, convert)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f'{file}: {_reason(error)}') from None
    if not isinstance(content, dict):
        raise CheckpointError(f'{file}: holds a {type(content).__name__}, not the dictionary of a checkpoint')
    return _copied(content) if copy and kind == 'zip' else content


def state_dict_of(checkpoint: Mapping[str, Any], source: str | os.PathLike = 'checkpoint') -> dict[str, Tensor]:
    """The weights in a checkpoint: its ``state_dict`` or ``model`` entry, or itself when it holds tensors only.

    Raises:
        CheckpointError: There are none.
    """
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if not checkpoint or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise CheckpointError(f'{source}: no weights found (keys: {_some(checkpoint)})')
    return dict(checkpoint)


def _size_of(file: Path) -> int:
    if str(file) in ('', '.'):
        raise CheckpointError('no checkpoint file was named')
    if not file.exists():
        raise CheckpointError(f'{file}: there is no such file')
    if not file.is_file():
        raise CheckpointError(f'{file}: is not a file')
    size = file.stat().st_size
    if size == 0:
        raise CheckpointError(f'{file}: the file is empty (0 bytes); was writing it interrupted?')
    return size


def _kind_of(file: Path) -> str:
    """``'zip'``, ``'legacy'`` or ``'safetensors'``, by content."""
    with open(file, 'rb') as stream:
        head = stream.read(9)
    if head[:4] == b'PK\x03\x04':
        _check_zip(file)
        return 'zip'
    if head[8:9] == b'{' or file.suffix == '.safetensors':
        return 'safetensors'
    if head[:1] == b'\x80':
        return 'legacy'
    hint = ''
    if head.startswith(b'version '):
        hint = ': it looks like a Git LFS pointer, fetch the real file'
    elif head.lstrip()[:1] == b'<':
        hint = ': it looks like a web page'
    raise CheckpointError(f'{file}: is not a checkpoint (it begins with {head!r}){hint}')


def _check_zip(file: Path) -> None:
    """Compare what the archive declares with what the file holds; torch.save never compresses."""
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f'{file}: is truncated or damaged ({error})') from None
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise CheckpointError(f'{file}: has compressed entries, which torch.save does not write')
    declared = sum(entry.file_size for entry in entries)
    if declared > size:
        raise CheckpointError(f'{file}: declares {declared} bytes of data in a file of {size}')
    if not any(entry.filename.endswith('/data.pkl') for entry in entries):
        raise CheckpointError(f'{file}: is a zip archive but not a checkpoint')


def _read_torch(file: Path, kind: str, table: inert.Globals, map_location: Any) -> Any:
    with torch.serialization.safe_globals(table):
        return torch.load(file, map_location=map_location, weights_only=True, mmap=True if kind == 'zip' else None)


def _read_safetensors(file: Path, size: int, map_location: Any) -> dict[str, Any]:
    from safetensors import safe_open

    with open(file, 'rb') as stream:
        head = stream.read(8)
    length = struct.unpack('<Q', head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(size - 8, _MAX_SAFETENSORS_HEADER):
        raise CheckpointError(f'{file}: declares a header of {length} bytes in a file of {size}')
    device = str(map_location) if isinstance(map_location, str | torch.device) else 'cpu'
    with safe_open(str(file), framework='pt', device=device) as archive:
        meta = json.loads((archive.metadata() or {}).get('meta', '{}'))
        state = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    return {'state_dict': state, 'meta': meta}


def _reason(error: BaseException) -> str:
    """One line out of torch's advice, which would have the reader trust the file."""
    text = str(error)
    for marker in ('Unsupported global: GLOBAL ', 'Trying to load unsupported GLOBAL '):
        if marker in text:
            name = text.split(marker, 1)[1].split()[0]
            return (
                f'names {name!r}, which this reader does not allow; nothing was run. A checkpoint needs tensors, '
                'numbers, texts and containers only'
            )
    if isinstance(error, EOFError) or 'failed finding central directory' in text:
        return 'is truncated'
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if first.startswith('Weights only load failed'):
        detail = text.split('WeightsUnpickler error: ', 1)
        first = detail[1].strip().splitlines()[0] if len(detail) == 2 else first
    return f'is damaged or not a checkpoint ({first})'


def _tensors(value: Any, seen: set[int] | None = None) -> Iterable[Tensor]:
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple | inert.InertRecord) and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, inert.InertRecord):
            value = (value.args, value.state)
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, seen)


def _check_tensors(content: Any, limit: int) -> None:
    for tensor in _tensors(content):
        if tensor.device.type != 'meta' and tensor.numel() * tensor.element_size() > limit:
            raise ValueError(f'a tensor of shape {tuple(tensor.shape)} is larger than the file')


def _copied(content: Any) -> Any:
    """The same structure with tensors in memory of their own; tensors that share storage go on sharing it."""
    storages: dict[int, Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        if tensor.device.type != 'cpu' or tensor.layout != torch.strided or tensor.is_quantized:
            return tensor.clone()
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage.clone())
        fresh = torch.empty(0, dtype=tensor.dtype).set_(
            storages[storage.data_ptr()].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        return nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return own(value)
        if isinstance(value, dict):
            for key in value:
                value[key] = walk(value[key])
        elif isinstance(value, list):
            value[:] = [walk(item) for item in value]
        elif type(value) is tuple:
            return tuple(walk(item) for item in value)
        return value

    return walk(content)


def save_safetensors(
    state: Mapping[str, Tensor], path: str | os.PathLike, meta: Mapping[str, Any] | None = None
) -> None:
    """Write weights as safetensors, in one step.

    Args:
        state: Name to tensor. Tensors that share memory are written once each, as the format has no sharing.
        path: File to create or replace.
        meta: Plain data kept as JSON under the metadata key ``meta``.

    Raises:
        TypeError: A value is not a tensor, or ``meta`` is not plain data.
        boltz_mm.utils.files.WriteError: The file could not be written.
    """
    from safetensors.torch import save

    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f'safetensors holds tensors only; not so: {_some(wrong)}')
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        owned[name] = value.clone() if pointer in seen or value.untyped_storage().nbytes() != value.nbytes else value
        seen.add(pointer)
    # One metadata key only: safetensors writes several in any order, and equal content would give unequal files.
    files.atomic_write_bytes(path, save(owned, {'meta': json.dumps(dict(meta or {}))}))


def atomic_save(content: Any, path: str | os.PathLike) -> None:
    """:func:`torch.save` in one step: a failure leaves the old file.

    Raises:
        boltz_mm.utils.files.WriteError: The file could not be written.
    """
    try:
        with files.atomic_path(path) as temporary, open(temporary, 'wb') as stream:
            torch.save(content, stream)
    except RuntimeError as error:
        # torch's zip writer reports a full disk as a RuntimeError of its own.
        if 'PytorchStreamWriter' not in str(error) and not isinstance(error.__context__, OSError):
            raise
        cause = error.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else 'writing failed'
        raise files.WriteError(f'could not write {path}: {reason}; the previous file, if any, is intact') from None


@dataclass
class StateDiff:
    """How the keys of a file differ from those of a model.

    Attributes:
        missing: Keys of the model that the file lacks.
        unexpected: Keys of the file that the model lacks.
        mismatched: Key to (shape in the file, shape in the model).
        matched: Number of keys that agree.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    matched: int = 0

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def causes(self) -> list[str]:
        """Likely explanations, most telling first."""
        found = []
        if not self.matched:
            found.append('no key fits: this is a checkpoint of another architecture')
        for prefix in ('module.', '_orig_mod.', 'model.', 'backbone.', 'state_dict.'):
            stripped = {key.removeprefix(prefix) for key in self.unexpected if key.startswith(prefix)}
            if stripped & set(self.missing):
                found.append(f'the keys of the file carry the prefix {prefix!r}')
        found += self._class_counts()
        if self.matched and len(self.missing) > self.matched:
            found.append('most of the model is not in the file: another depth or variant?')
        return found

    def _class_counts(self) -> list[str]:
        """Heads that differ in their number of rows alone, all by the same pair."""
        rows = {
            (old[0], new[0])
            for old, new in self.mismatched.values()
            if old and new and len(old) == len(new) and old[1:] == new[1:]
        }
        if len(rows) != 1 or len(self.mismatched) > 32:
            return []
        old, new = rows.pop()
        return [f'the file was made for K = {old} classes, the model has K = {new}: set num_classes={old}']

    def explain(self) -> str:
        """The differences and their likely causes in a few lines."""
        lines = [f'likely cause: {cause}' for cause in self.causes()]
        shapes = [f'{key} {old} in the file, {new} in the model' for key, (old, new) in self.mismatched.items()]
        for title, names in (('missing', self.missing), ('unexpected', self.unexpected), ('other shape', shapes)):
            if names:
                lines.append(f'{title} ({len(names)}): {_some(names)}')
        return '\n  '.join(lines)


def compare_state(model: nn.Module, state: Mapping[str, Any]) -> StateDiff:
    """Compare a state dict with a model; counters of batch norms do not count, as older files lack them."""
    own = model.state_dict()
    diff = StateDiff()
    for key, value in own.items():
        if key not in state:
            if not key.endswith('num_batches_tracked'):
                diff.missing.append(key)
        elif isinstance(value, Tensor) and getattr(state[key], 'shape', None) != value.shape:
            diff.mismatched[key] = (tuple(getattr(state[key], 'shape', ())), tuple(value.shape))
        else:
            diff.matched += 1
    diff.unexpected = [key for key in state if key not in own]
    return diff


def load_state_dict_strict(model: nn.Module, state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Load weights only if every key fits; otherwise change nothing and say everything that is wrong.

    Args:
        model: Module that receives the weights.
        state: Name to tensor.
        source: Where the weights come from, for the message.

    Raises:
        CheckpointError: Keys are missing, unexpected or of another shape; lists them with likely causes.
    """
    diff = compare_state(model, state)
    if diff:
        raise CheckpointError(f'{source}: the weights do not fit {type(model).__name__}\n  {diff.explain()}')
    model.load_state_dict(dict(state), strict=False)


def _some(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    rest = f', and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(str(name) for name in names[:limit]) + rest
