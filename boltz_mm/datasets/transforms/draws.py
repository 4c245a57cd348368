"""The source of the random draws of our transforms.

Every random transform of this package asks one object for its draws, so that a run can be repeated draw by draw:
:class:`Draws` takes them from the generators of python, numpy and torch (the data-loader workers seed all three),
:class:`RecordedDraws` gives back a stored list.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar('T')


class Draws:
    """Draws from the global generators of python's ``random``, numpy and torch."""

    def random(self) -> float:
        """A number in [0, 1), by python."""
        return random.random()

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high], by python."""
        return random.uniform(low, high)

    def choice(self, options: Sequence[T]) -> T:
        """One of the options with equal chances, by python."""
        return random.choice(options)

    def weighted_index(self, weights: Sequence[float]) -> int:
        """The index of one of the weights, with chances in their proportion, by python."""
        return random.choices(range(len(weights)), weights=weights)[0]

    def randint(self, low: int, high: int) -> int:
        """An integer in low..high, both included, by python."""
        return random.randint(low, high)

    def numpy_uniform(self, low: float, high: float) -> float:
        """A number in [low, high), by numpy."""
        return float(np.random.uniform(low, high))

    def torch_randint(self, low: int, high: int) -> int:
        """An integer in low..high - 1, by torch."""
        return int(torch.randint(low, high, size=(1,)))


class RecordedDraws(Draws):
    """Gives back stored draws in their order.

    Args:
        values: The draws.  For :meth:`choice` the chosen option itself, for :meth:`weighted_index` the index.
    """

    def __init__(self, values: Iterable[float]) -> None:
        self._values = list(values)
        self._position = 0

    @property
    def left(self) -> int:
        """How many draws have not been taken."""
        return len(self._values) - self._position

    def _next(self) -> float:
        if not self.left:
            raise ValueError(f'all {len(self._values)} recorded draws are used up')
        self._position += 1
        return self._values[self._position - 1]

    def random(self) -> float:  # noqa: D102
        return float(self._next())

    def uniform(self, low: float, high: float) -> float:  # noqa: D102
        return float(self._next())

    def choice(self, options: Sequence[Any]) -> Any:  # noqa: D102
        value = self._next()
        # Lists of integers are stored as floats with the rest.
        return int(value) if all(isinstance(option, int) for option in options) else value

    def weighted_index(self, weights: Sequence[float]) -> int:  # noqa: D102
        return int(self._next())

    def randint(self, low: int, high: int) -> int:  # noqa: D102
        return int(self._next())

    def numpy_uniform(self, low: float, high: float) -> float:  # noqa: D102
        return float(self._next())

    def torch_randint(self, low: int, high: int) -> int:  # noqa: D102
        return int(self._next())
