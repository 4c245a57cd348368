"""One golden case on disk: what went in, what the official code gave, and how close ours has to be.

A case is a folder with ``case.json``, mostly ``io.safetensors`` (``in.*``, ``rand.*``, ``out.*``, ``grad.*``,
``f64.*``) and, where the code under test has parameters, a checkpoint in the official layout.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# What a handler returns: our value for each stored name that the case checks.
Produced = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A golden case.

    Attributes:
        folder: Where the case lies.
        double: Run in float64, to be held against the stored ``f64.*`` values.
    """

    folder: Path
    double: bool = False
    meta: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, 'meta', json.loads((self.folder / 'case.json').read_text()))

    @property
    def system(self) -> str:
        return self.meta['system']

    @property
    def kind(self) -> str:
        return self.meta['kind']

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments the official code was built and called with."""
        return {**self.meta.get('fixed_kwargs', {}), **self.meta['kwargs']}

    @property
    def check(self) -> dict[str, dict[str, Any]]:
        """Tolerance of each stored value."""
        return self.meta['check']

    @property
    def has_double(self) -> bool:
        return any(name.startswith('f64.') for name in self.check)

    def in_double(self) -> 'Case':
        return replace(self, double=True)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything stored in ``io.safetensors``, by its full name."""
        path = self.folder / 'io.safetensors'
        return load_file(path) if path.exists() else {}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.double() if self.double and tensor.is_floating_point() else tensor

    def _group(self, prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: self._cast(v) for k, v in self.tensors.items() if k.startswith(prefix)}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """The ``in.*`` tensors without their prefix."""
        return self._group('in.')

    @cached_property
    def rand(self) -> dict[str, Tensor]:
        """The random draws of the official run (``rand.*``), in stored order."""
        return self._group('rand.')

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """What the official code gave, by full name (``out.x``, ``grad.x``); for aligning orders that are free."""
        return {**self.meta.get('expected', {}), **self.tensors}

    def weights(self, name: str = 'weights.pth') -> dict[str, Any]:
        """The checkpoint in the official container, read without unpickling objects; float64 for float64 runs."""
        folder = self.folder
        if not (folder / name).exists():
            folder = folder.parent / str(self.meta.get('weights') or self.meta['weights_of'])
        path = folder if folder.is_file() else folder / name
        loaded = torch.load(path, map_location='cpu', weights_only=True)
        return _map_tensors(loaded, self._cast)

    def names_to_hold(self) -> list[str]:
        """The stored names that this run is compared with."""
        return [name for name in self.check if name.startswith('f64.') == self.double]


def _map_tensors(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: _map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(v, function) for v in value)
    return value


def find_cases(root: Path) -> list[Path]:
    """Folders below ``root`` that hold a case, in a fixed order."""
    return sorted(path.parent for path in root.rglob('case.json'))
