"""Text phrases of an image: what a person could call its objects, and which objects each phrase means.

A phrase means every object of the image that fits it, so ``'red circle'`` can mean several.  Sizes are small, medium
and large (longer side of the visible box below 1/8, up to 1/4, above 1/4 of the image's side); places are the nine
fields of a 3 x 3 grid, by the centre of the visible box.
"""

from collections.abc import Sequence
from typing import Any

from boltz_mm.datasets.shapes.classes import THING_CLASSES
from boltz_mm.datasets.shapes.draws import Draws

_PLACES = (
    ('upper left', 'top', 'upper right'),
    ('left', 'middle', 'right'),
    ('lower left', 'bottom', 'lower right'),
)
_PHRASE_STREAM = 1000  # keeps the phrases' draws apart from those of the images
_TEMPLATES: tuple[tuple[str, ...], ...] = (
    ('color', 'class'),
    ('pattern', 'class'),
    ('size', 'class'),
    ('size', 'color', 'class'),
    ('color', 'pattern', 'class'),
    ('class', 'place'),
    ('color', 'class', 'place'),
    ('pattern', 'class', 'place'),
    ('size', 'color', 'pattern', 'class', 'place'),
)


def describe(box: Sequence[float], label: int, color: str, pattern: str, size: int) -> dict[str, str]:
    """Words for one object.

    Args:
        box: Visible box (x, y, width, height) in pixels.
        label: Position of its class in ``THING_CLASSES``.
        color: Colour word.
        pattern: Pattern word.
        size: Side of the image.

    Returns:
        ``class``, ``color``, ``pattern``, ``size`` and ``place``.
    """
    x, y, width, height = box
    longer = max(width, height) / size
    column, row = (min(2, int(3 * c / size)) for c in (x + width / 2, y + height / 2))
    return {
        'class': THING_CLASSES[label],
        'color': color,
        'pattern': pattern,
        'size': 'small' if longer < 1 / 8 else 'medium' if longer <= 1 / 4 else 'large',
        'place': _PLACES[row][column],
    }


def make_phrases(objects: Sequence[dict[str, str]], *entropy: int) -> list[dict[str, Any]]:
    """The phrases of one image: every class that it shows, and two longer ones for each object.

    Args:
        objects: What :func:`describe` says of each object.
        *entropy: Integers that name the image.

    Returns:
        ``{'phrase': str, 'objects': list of positions in objects}`` each, without repetition of a phrase.
    """
    draws = Draws(*entropy, _PHRASE_STREAM)
    wanted: list[dict[str, str]] = [{'class': words['class']} for words in objects]
    for words in objects:
        wanted += [{key: words[key] for key in template} for template in draws.sample(_TEMPLATES, 2)]
    found: dict[str, list[int]] = {}
    for want in wanted:
        text = _text(want)
        if text not in found:
            found[text] = [i for i, words in enumerate(objects) if want.items() <= words.items()]
    return [{'phrase': text, 'objects': which} for text, which in found.items()]


def _text(words: dict[str, str]) -> str:
    text = ' '.join(words[key] for key in ('size', 'color', 'pattern', 'class') if key in words)
    if 'place' not in words:
        return text
    preposition = 'at' if words['place'] in ('top', 'bottom') else 'on' if words['place'] in ('left', 'right') else 'in'
    return f'{text} {preposition} the {words["place"]}'
