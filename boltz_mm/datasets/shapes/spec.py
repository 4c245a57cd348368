"""What a shapes set consists of."""

import dataclasses
from typing import Any

from boltz_mm.datasets.shapes.classes import DEFAULT_NUM_CLASSES, HARD_NUM_CLASSES, check_num_classes

VERSION = 1
"""Raised whenever the same arguments would give other images or annotations."""

_MIN_SIDE, _MAX_SIDE = 32, 4096


@dataclasses.dataclass(frozen=True)
class ShapesSpec:
    """Arguments that decide what every image of a set looks like.

    Args:
        size: Side of the square images in pixels.
        num_classes: How many shape classes, the first ones of ``THING_CLASSES``.
        min_size: Longer side, in pixels, of the box of the smallest objects.  Holds after occlusion.
        max_size: The same of the largest objects, before occlusion. None: 0.45 of the image's side.
        min_objects: Fewest objects of an image.
        max_objects: Most objects of an image.
        min_visible: Share of an object's pixels that stays visible.  An object that would break this rule, for itself
            or for one that it covers, is placed elsewhere, and left out of the image if there is no room: there is
            never a visible object without an annotation.
        empty: Share of the images without any object.
        hard: Colours close to the background, clutter lines and stronger grain.
        seed: Everything is drawn from (seed, split, index of the image).

    Raises:
        ValueError: If an argument is out of its range.
    """

    size: int = 128
    num_classes: int = DEFAULT_NUM_CLASSES
    min_size: int = 6
    max_size: int | None = None
    min_objects: int = 1
    max_objects: int = 6
    min_visible: float = 0.4
    empty: float = 0.0
    hard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_num_classes(self.num_classes)
        if not _MIN_SIDE <= self.size <= _MAX_SIDE:
            raise ValueError(f'size must lie in {_MIN_SIDE}..{_MAX_SIDE} pixels, got {self.size}')
        if not 3 <= self.min_size <= self.largest <= self.size:
            raise ValueError(
                f'3 <= min_size <= max_size <= size must hold, got min_size {self.min_size}, max_size {self.largest}, '
                f'size {self.size}'
            )
        if not 1 <= self.min_objects <= self.max_objects <= 100:
            raise ValueError(
                f'1 <= min_objects <= max_objects <= 100 must hold, got {self.min_objects} and {self.max_objects}'
            )
        for name in ('min_visible', 'empty'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'{name} must lie in 0..1, got {getattr(self, name)}')
        if self.seed < 0:
            raise ValueError(f'seed must not be negative, got {self.seed}')

    @classmethod
    def hard_set(cls, **kwargs: Any) -> 'ShapesSpec':
        """The harder set: all classes, objects from 4 pixels up, up to 10 of them, more occlusion, low contrast.

        Args:
            **kwargs: Arguments that take precedence over those of the harder set.
        """
        preset: dict[str, Any] = {
            'num_classes': HARD_NUM_CLASSES, 'min_size': 4, 'max_objects': 10, 'min_visible': 0.25, 'hard': True,
        }  # fmt: skip
        return cls(**(preset | kwargs))

    @property
    def largest(self) -> int:
        """``max_size`` with its default filled in."""
        return max(self.min_size, round(0.45 * self.size)) if self.max_size is None else self.max_size

    def for_classification(self) -> 'ShapesSpec':
        """The set of one-object images: larger objects (an eighth of the side and up), always one."""
        smallest = max(self.min_size, self.size // 8)
        return dataclasses.replace(
            self, min_size=smallest, max_size=max(smallest, round(0.6 * self.size)), min_objects=1, max_objects=1,
            empty=0.0,
        )  # fmt: skip
