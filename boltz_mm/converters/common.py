"""What the converters share: containers of official files, renaming both ways, and the report of what became of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from boltz_mm.utils.checkpoint import compare_state

StateDict = dict[str, Tensor]


@dataclass
class ConversionReport:
    """What became of every key.

    Attributes:
        renamed: Official key -> ours, of everything that was converted.
        added: Our keys that official files lack and that were filled in.
        unexpected: Keys of the file that are none of the model's; they are not in the result.
        missing: Keys of the model that the file lacks.
        mismatched: Our key -> (shape in the file, shape in the model).
        num_classes: Classes of the file; ``None`` if it has no classifier.
        dropped: Official keys that were recognised and left out: what the target has no use for.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    num_classes: int | None = None
    dropped: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every key found its place."""
        return not (self.unexpected or self.missing or self.mismatched)

    def __str__(self) -> str:
        classes = '' if self.num_classes is None else f', {self.num_classes} classes'
        lines = [f'{len(self.renamed)} tensors converted, {len(self.added)} counters added{classes}']
        lines += [f'left out: {key}' for key in self.dropped]
        lines += [f'unexpected: {key}' for key in self.unexpected]
        lines += [f'missing: {key}' for key in self.missing]
        lines += [f'mismatched: {key}: {ours} in the file, {model} in the model'
                  for key, (ours, model) in self.mismatched.items()]  # fmt: skip
        return '\n'.join(lines)


def official_state_dict(container: Mapping) -> StateDict:
    """The tensors of a container, without the prefix ``module.``.

    Raises:
        ValueError: There is something else than tensors among them.
    """
    inner = next((container[key] for key in ('model', 'state_dict') if key in container), container)
    if not isinstance(inner, Mapping):
        raise ValueError(f"expected a state dict under 'model' or 'state_dict', got {type(inner).__name__}")
    if inner and all(str(key).startswith('module.') for key in inner):
        inner = {key.removeprefix('module.'): value for key, value in inner.items()}
    state = {}
    for key, value in inner.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, Tensor):
            raise ValueError(f'{key!r} is a {type(value).__name__}, not a tensor')
        state[key] = value
    return state


def rename(official: StateDict, name_of: Callable[[str], str | None]) -> tuple[StateDict, ConversionReport]:
    """Give every tensor of a file our name.

    Args:
        official: Name to tensor, see :func:`official_state_dict`.
        name_of: Our name of an official key, ``None`` for one that is not the model's.

    Returns:
        Our state dict, and a report with ``renamed`` and ``unexpected``.

    Raises:
        ValueError: Two tensors get the same name.
    """
    report = ConversionReport()
    state: StateDict = {}
    for key, value in official.items():
        name = name_of(key)
        if name is None:
            report.unexpected.append(key)
            continue
        if name in state:
            raise ValueError(f'two tensors of the file become {name!r}, one of them is {key!r}')
        state[name] = value
        report.renamed[key] = name
    return state, report


def rename_back(state: Mapping[str, Tensor], name_of: Callable[[str], str | None]) -> StateDict:
    """Give every tensor of ours its official name.

    Args:
        state: Our state dict.
        name_of: The official name of one of our keys, ``None`` for one that has none.

    Returns:
        The official state dict.

    Raises:
        ValueError: A key has no official name.
    """
    official = {}
    for key, value in state.items():
        name = name_of(key)
        if name is None:
            raise ValueError(f'{key!r} has no place in the official layout')
        official[name] = value
    return official


def compare_with_model(state: StateDict, model: nn.Module, report: ConversionReport) -> None:
    """Add to a report what a converted state dict lacks, has too much or has in another shape."""
    diff = compare_state(model, state)
    theirs = {ours: key for key, ours in report.renamed.items()}
    report.unexpected += [theirs.get(key, key) for key in diff.unexpected]
    report.missing += diff.missing
    report.mismatched |= diff.mismatched


def shape_of(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Shape of a tensor that every whole model has.

    Raises:
        ValueError: It is missing.
    """
    if key not in state:
        raise ValueError(f'the state dict is not of a whole model: {key!r} is missing')
    return tuple(state[key].shape)


def count_modules(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of numbered modules below ``prefix``."""
    return len({key.removeprefix(prefix).split('.')[0] for key in state if key.startswith(prefix)})
