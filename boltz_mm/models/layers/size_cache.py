"""Bounded store of tensors that depend on the image size alone.

Clusters of a full grid, its neighbour tables and positions are the same for each image of one size.  A module keeps
them in a :class:`SizeCache`: outside the state dict, computed once for each size and device.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar('T')


class SizeCache:
    """Least-recently-used store of nested tuples of tensors.

    * Copies and pickles of a cache are empty: a copied or moved model fills its own.
    * Threads may share it; two that miss at once both compute, and the first value stays.
    * A CUDA stream sees the values that it computed itself, so no stream reads what another has not finished.
    * Values are made outside autocast, inference mode and autograd, so that any later run may use them.
    * Nothing is stored while a graph is traced or captured (``torch.compile``, CUDA graphs) or on fake tensors: the
      computation then becomes part of the graph.

    Args:
        maxsize: Values kept; the one not used for longest goes first.

    Raises:
        ValueError: ``maxsize`` is not positive.
    """

    def __init__(self, maxsize: int = 16) -> None:
        if maxsize < 1:
            raise ValueError(f'maxsize must be positive, got {maxsize}')
        self.maxsize = maxsize
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[type['SizeCache'], tuple[int]]:
        # Serves copy, deepcopy and pickle: neither the lock nor tensors of a device travel.
        return type(self), (self.maxsize,)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """The value of a key, computed if it is not there.

        Args:
            key: Everything that the value depends on beside the device: sizes, settings.
            device: Where the value lies.
            make: Computes it: a tensor, or a (nested, named) tuple of tensors and plain values.

        Returns:
            The value; it is shared and must not be changed in place.
        """
        if torch.compiler.is_compiling() or _is_capturing(device):
            return _make_plain(device, make)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == 'cuda' else 0
        full_key = (key, device, stream)
        with self._lock:
            if full_key in self._values:
                self._values.move_to_end(full_key)
                return self._values[full_key]
        value = _make_plain(device, make)
        if any(type(leaf) is not Tensor for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)):
            return value  # fake tensors and other subclasses live no longer than their mode
        with self._lock:
            value = self._values.setdefault(full_key, value)
            self._values.move_to_end(full_key)
            while len(self._values) > self.maxsize:
                self._values.popitem(last=False)
        return value


def _is_capturing(device: torch.device) -> bool:
    return device.type == 'cuda' and torch.cuda.is_current_stream_capturing()


def _make_plain(device: torch.device, make: Callable[[], T]) -> T:
    if torch.compiler.is_compiling():
        return make()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        return make()
