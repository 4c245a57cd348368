"""The one source of chance of the shapes dataset.

Every value is made from uniform doubles alone: these are the part of numpy's generators whose stream has never changed
between versions, so an image stays the same under another numpy.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_T = TypeVar('_T')


class Draws:
    """Random values of one image, from its own generator.

    Args:
        *entropy: Non-negative integers that name the image, such as ``(seed, split, index)``.
    """

    def __init__(self, *entropy: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(entropy))))

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def log_uniform(self, low: float, high: float) -> float:
        """A float in [low, high) whose logarithm is uniform: half of the values lie below the geometric mean."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """An integer in low..high, both included."""
        return min(high, low + int(self.uniform(0.0, 1.0) * (high - low + 1)))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform(0.0, 1.0) < probability

    def choice(self, options: Sequence[_T]) -> _T:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def sample(self, options: Sequence[_T], count: int) -> list[_T]:
        """``count`` different options in random order."""
        keys = self._generator.random(len(options))
        return [options[i] for i in np.argsort(keys, kind='stable')[:count]]

    def array(self, *shape: int) -> np.ndarray:
        """Uniform values in [0, 1), float32 of the given shape."""
        return self._generator.random(shape).astype(np.float32)
