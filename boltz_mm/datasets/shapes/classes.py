"""Names and colours of the shapes dataset, and the ``metainfo`` that configs and datasets need."""

from typing import Any

THING_CLASSES: tuple[str, ...] = (
    'circle', 'square', 'triangle', 'star', 'ring', 'cross', 'bar', 'crescent', 'heart', 'arrow',
)  # fmt: skip
"""Every shape that can be drawn; a set with ``num_classes`` classes has the first ones."""

STUFF_CLASSES: tuple[str, ...] = ('smooth', 'cloudy', 'striped', 'checked', 'speckled')
"""Background textures, the stuff classes of the panoptic and semantic annotations."""

DEFAULT_NUM_CLASSES = 3
HARD_NUM_CLASSES = len(THING_CLASSES)

_THING_PALETTE: tuple[tuple[int, int, int], ...] = (
    (220, 20, 60), (0, 110, 230), (40, 170, 60), (250, 170, 30), (150, 60, 200),
    (0, 180, 190), (240, 100, 170), (120, 90, 30), (255, 80, 0), (90, 90, 250),
)  # fmt: skip
_STUFF_PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 128, 128), (170, 180, 200), (120, 140, 110), (190, 170, 140), (90, 90, 110),
)  # fmt: skip

COLORS: dict[str, tuple[int, int, int]] = {
    'red': (205, 45, 45),
    'orange': (240, 140, 35),
    'yellow': (240, 215, 60),
    'green': (55, 165, 70),
    'cyan': (60, 195, 205),
    'blue': (50, 85, 205),
    'purple': (140, 65, 180),
    'pink': (240, 130, 180),
    'white': (238, 238, 238),
    'black': (32, 32, 32),
}
"""Colour words of the phrases and their RGB values before jitter."""

PATTERNS: tuple[str, ...] = ('plain', 'striped', 'checked', 'dotted')
"""Fill patterns of the objects, also words of the phrases."""


def check_num_classes(num_classes: int) -> int:
    """Return ``num_classes``, or raise ValueError if there are not so many shapes."""
    if not 1 <= num_classes <= len(THING_CLASSES):
        raise ValueError(f'num_classes must lie in 1..{len(THING_CLASSES)} (the shapes there are), got {num_classes}')
    return num_classes


def instance_metainfo(num_classes: int = DEFAULT_NUM_CLASSES) -> dict[str, Any]:
    """``metainfo`` of the instance annotations.

    Args:
        num_classes: How many shape classes the set has.

    Returns:
        ``classes`` in the order of the contiguous labels and ``palette`` (RGB).
    """
    n = check_num_classes(num_classes)
    return {'classes': THING_CLASSES[:n], 'palette': list(_THING_PALETTE[:n])}


def panoptic_metainfo(num_classes: int = DEFAULT_NUM_CLASSES) -> dict[str, Any]:
    """``metainfo`` of the panoptic annotations: things first, then the background textures.

    Args:
        num_classes: How many shape classes the set has.

    Returns:
        ``classes``, ``thing_classes``, ``stuff_classes`` and ``palette`` (RGB), as mmdet's ``CocoPanopticDataset``
        wants them.
    """
    things = instance_metainfo(num_classes)
    return {
        'classes': things['classes'] + STUFF_CLASSES,
        'thing_classes': things['classes'],
        'stuff_classes': STUFF_CLASSES,
        'palette': things['palette'] + list(_STUFF_PALETTE),
    }


def semantic_metainfo(num_classes: int = DEFAULT_NUM_CLASSES) -> dict[str, Any]:
    """``metainfo`` of the semantic PNGs, whose pixel values are the positions in ``classes``."""
    full = panoptic_metainfo(num_classes)
    return {'classes': full['classes'], 'palette': full['palette']}
