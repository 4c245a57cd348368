"""One image of the shapes dataset with its ground truth.

A scene is one to three regions of background texture and, from back to front, shapes that may cover each other.  The
masks are what remains visible.  Everything follows from (seed, split, index): images do not depend on how many others
are made, in which order or by which process.
"""

import colorsys
import dataclasses
import math

import numpy as np

from boltz_mm.datasets.shapes import geometry, textures
from boltz_mm.datasets.shapes.classes import COLORS, PATTERNS, STUFF_CLASSES, THING_CLASSES
from boltz_mm.datasets.shapes.draws import Draws
from boltz_mm.datasets.shapes.spec import ShapesSpec

SPLITS: tuple[str, ...] = ('train', 'val', 'test')
"""Names of splits; their positions enter the generator, so the order is fixed."""

_PLACEMENTS = 12  # places tried for an object before it is left out
_PLAIN_BELOW = 12  # pixels; a pattern on a smaller object could not be seen

_Color = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Instance:
    """One object.

    Attributes:
        label: Position of its class in ``THING_CLASSES``.
        mask: Visible pixels, bool [H, W].
        color: Colour word.
        pattern: Pattern word.
    """

    label: int
    mask: np.ndarray
    color: str
    pattern: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image and its ground truth.

    Attributes:
        image: RGB, uint8 [H, W, 3].
        instances: Objects from back to front.
        stuff: Position in ``STUFF_CLASSES`` of every pixel's background, uint8 [H, W] (under objects too).
    """

    image: np.ndarray
    instances: list[Instance]
    stuff: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A drawn but not yet placed shape: coverage [h, w] of its window whose corner is at (x, y)."""

    contours: geometry.Contours
    coverage: np.ndarray
    x: int
    y: int


def make_scene(spec: ShapesSpec, split: str, index: int) -> Scene:
    """Make image ``index`` of a split.

    Args:
        spec: What the set consists of.
        split: One of :data:`SPLITS`.
        index: Number of the image, from 0.

    Returns:
        The image with its ground truth.
    """
    draws = Draws(spec.seed, SPLITS.index(split), index)
    count = 0 if draws.chance(spec.empty) else draws.integer(spec.min_objects, spec.max_objects)
    return _compose(spec, draws, [draws.integer(0, spec.num_classes - 1) for _ in range(count)])


def make_classification_scene(spec: ShapesSpec, split: str, index: int) -> Scene:
    """Make image ``index`` of the one-object-per-image split; the classes take turns.

    Args:
        spec: What the set consists of (as for :func:`make_scene`).
        split: One of :data:`SPLITS`.
        index: Number of the image, from 0.

    Returns:
        The image with exactly one instance of class ``index % spec.num_classes``.
    """
    draws = Draws(spec.seed, len(SPLITS) + SPLITS.index(split), index)
    return _compose(spec.for_classification(), draws, [index % spec.num_classes])


def _compose(spec: ShapesSpec, draws: Draws, labels: list[int]) -> Scene:
    canvas, stuff, ground = _draw_background(spec, draws)
    if spec.hard:
        _draw_clutter(canvas, draws)
    owner = np.full((spec.size, spec.size), -1, np.int64)
    full_areas: list[int] = []
    looks: list[tuple[int, str, str]] = []
    for label in labels:
        candidate = _place(spec, draws, label, owner, full_areas)
        if candidate is None:
            continue
        color, pattern = _draw_shape(canvas, candidate, spec, draws, ground)
        looks.append((label, color, pattern))
    instances = [Instance(label, owner == k, color, pattern) for k, (label, color, pattern) in enumerate(looks)]
    return Scene(_expose(canvas, spec, draws), instances, stuff)


def _draw_background(spec: ShapesSpec, draws: Draws) -> tuple[np.ndarray, np.ndarray, list[_Color]]:
    """Return the canvas [H, W, 3] in 0..255, the stuff map [H, W] and the regions' mean colours."""
    size = spec.size
    kinds = draws.sample(range(len(STUFF_CLASSES)), draws.choice((1, 1, 2, 2, 3)))
    region = _regions(draws, size, len(kinds))
    canvas = np.zeros((size, size, 3), np.float32)
    stuff = np.zeros((size, size), np.uint8)
    ground = []
    for k, kind in enumerate(kinds):
        inside = region == k
        if not inside.any():
            continue
        base = colorsys.hsv_to_rgb(draws.uniform(0, 1), draws.uniform(0.05, 0.35), draws.uniform(0.3, 0.8))
        swing = draws.uniform(14, 34)
        weight = textures.background(STUFF_CLASSES[kind], draws, size)[inside][:, None] * 2 - 1
        canvas[inside] = np.array(base, np.float32) * 255 + weight * np.float32(swing)
        stuff[inside] = kind
        ground.append((base[0] * 255, base[1] * 255, base[2] * 255))
    return canvas, stuff, ground


def _regions(draws: Draws, size: int, count: int) -> np.ndarray:
    """Split the image into regions with wavy borders: number of the nearest of ``count`` points, int64 [H, W]."""
    if count == 1:
        return np.zeros((size, size), np.int64)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    x += (textures.value_noise(draws, size, size, size / 3, octaves=2) - np.float32(0.5)) * np.float32(size * 0.5)
    y += (textures.value_noise(draws, size, size, size / 3, octaves=2) - np.float32(0.5)) * np.float32(size * 0.5)
    distances = []
    for _ in range(count):
        dx, dy = x - np.float32(draws.uniform(0, size)), y - np.float32(draws.uniform(0, size))
        distances.append(dx * dx + dy * dy)
    return np.argmin(np.stack(distances), axis=0)


def _draw_clutter(canvas: np.ndarray, draws: Draws) -> None:
    """Thin lines across the background; they belong to it."""
    size = len(canvas)
    y, x = np.mgrid[:size, :size].astype(np.float32) + np.float32(0.5)
    for _ in range(draws.integer(2, 6)):
        half, angle = draws.uniform(0.1, 0.45) * size, draws.uniform(0, 2 * math.pi)
        dx, dy = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        px, py = x - np.float32(draws.uniform(0, size)), y - np.float32(draws.uniform(0, size))
        beyond = np.maximum(np.abs(px * dx + py * dy) - np.float32(half), 0)
        aside = px * dy - py * dx
        distance = np.sqrt(beyond * beyond + aside * aside)
        tone = np.array([draws.uniform(40, 215) for _ in range(3)], np.float32)
        _blend(canvas, np.clip(np.float32(1.1) - distance, 0, 1) * np.float32(0.6), tone)


def _place(spec: ShapesSpec, draws: Draws, label: int, owner: np.ndarray, full_areas: list[int]) -> _Candidate | None:
    """Find a place that keeps the visibility rule and enter it into ``owner`` and ``full_areas``.

    The first object of an image goes to the middle if chance finds no place, so that no image stays empty.
    """
    name = THING_CLASSES[label]
    smallest = float(spec.min_size)
    size = draws.log_uniform(smallest, max(smallest, float(spec.largest)))
    aspect = 1.0 if name == 'bar' else draws.log_uniform(0.8, 1.25)
    contours = geometry.outline(name, size, aspect, draws.uniform(0, 2 * math.pi))
    for attempt in range(_PLACEMENTS + 1):
        if attempt < _PLACEMENTS:
            margin = 0.42 * size
            x, y = (draws.uniform(margin, spec.size - margin) for _ in range(2))
        elif not full_areas:
            x = y = spec.size / 2
        else:
            break
        candidate = _rasterize_at(name, contours, x, y, spec.min_size)
        if _enter(candidate, spec, owner, full_areas):
            return candidate
    return None


def _rasterize_at(name: str, contours: geometry.Contours, x: float, y: float, min_size: int) -> _Candidate:
    """Rasterise at a centre; thin tips can fall between pixels, so grow the shape until it is ``min_size`` long."""
    while True:
        corners = np.concatenate(contours)
        left, top = (math.floor(v) - 1 for v in (x + corners[:, 0].min(), y + corners[:, 1].min()))
        right, bottom = (math.ceil(v) + 1 for v in (x + corners[:, 0].max(), y + corners[:, 1].max()))
        moved = [c + (x - left, y - top) for c in contours]
        coverage = geometry.rasterize(moved, right - left, bottom - top)
        if _longer_side(coverage >= 0.5) >= min_size:
            return _Candidate(moved, coverage, left, top)
        contours = [c * 1.06 for c in contours]


def _longer_side(mask: np.ndarray) -> int:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return 0 if len(rows) == 0 else int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1


def _enter(candidate: _Candidate, spec: ShapesSpec, owner: np.ndarray, full_areas: list[int]) -> bool:
    """Make the candidate the owner of its pixels unless it, or one that it covers, would be visible too little."""
    shape = candidate.coverage >= 0.5
    window, cut = _clip(candidate, spec.size)
    mine = shape[cut]
    after = owner.copy()
    after[window][mine] = len(full_areas)
    areas = [*full_areas, int(shape.sum())]
    touched = {len(full_areas), *np.unique(owner[window][mine]).tolist()} - {-1}
    for k in touched:
        visible = after == k
        if visible.sum() < max(1, spec.min_visible * areas[k]) or _longer_side(visible) < spec.min_size:
            return False
    owner[:] = after
    full_areas.append(areas[-1])
    return True


def _clip(candidate: _Candidate, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The candidate's window inside the image, as slices of the image and of the candidate's coverage."""
    height, width = candidate.coverage.shape
    x0, y0 = max(candidate.x, 0), max(candidate.y, 0)
    x1, y1 = min(candidate.x + width, size), min(candidate.y + height, size)
    window = (slice(y0, y1), slice(x0, x1))
    cut = (slice(y0 - candidate.y, y1 - candidate.y), slice(x0 - candidate.x, x1 - candidate.x))
    return window, cut


def _draw_shape(
    canvas: np.ndarray, shape: _Candidate, spec: ShapesSpec, draws: Draws, ground: list[_Color]
) -> tuple[str, str]:
    """Paint the shape; returns its colour word and its pattern word."""
    height, width = shape.coverage.shape
    word, rgb = _pick_color(draws, ground, wanted=60.0 if spec.hard else 130.0)
    small = max(height, width) < _PLAIN_BELOW
    kind = 'plain' if small or draws.chance(0.45) else draws.choice(PATTERNS[1:])
    fill = np.broadcast_to(np.array(rgb, np.float32), (height, width, 3))
    if kind == 'plain':
        shade = textures.ramp(height, width, draws.uniform(0, 2 * math.pi)) * np.float32(0.24) + np.float32(0.88)
        fill = fill * shade[..., None]
    else:
        period = max(3.5, draws.uniform(0.22, 0.38) * max(height, width))
        weight = textures.pattern(kind, height, width, period, draws.uniform(0, math.pi), draws.uniform(0, 1))
        other = np.array(_contrasting(rgb, draws.uniform(0.4, 0.6)), np.float32)
        fill = fill + (other - fill) * weight[..., None]
    if not small and draws.chance(0.5):
        edge = draws.uniform(0.82, 0.9)
        center = np.array([width / 2, height / 2])
        inner = geometry.rasterize([(c - center) * edge + center for c in shape.contours], width, height)
        rim = np.array(_contrasting(rgb, 0.65), np.float32)
        fill = fill + (rim - fill) * np.maximum(shape.coverage - inner, 0)[..., None]
    window, cut = _clip(shape, spec.size)
    _blend(canvas[window], shape.coverage[cut], fill[cut])
    return word, kind


def _pick_color(draws: Draws, ground: list[_Color], wanted: float) -> tuple[str, _Color]:
    """Draw colours until one differs enough from all backgrounds (L1 in RGB); the best of eight otherwise."""
    best: tuple[float, str, _Color] = (-1.0, '', (0.0, 0.0, 0.0))
    for _ in range(8):
        word = draws.choice(tuple(COLORS))
        red, green, blue = (min(255.0, max(0.0, c + draws.uniform(-18, 18))) for c in COLORS[word])
        contrast = min(abs(red - g[0]) + abs(green - g[1]) + abs(blue - g[2]) for g in ground)
        if contrast > best[0]:
            best = (contrast, word, (red, green, blue))
        if contrast >= wanted:
            break
    return best[1], best[2]


def _contrasting(rgb: _Color, amount: float) -> _Color:
    """The colour moved towards white if it is dark, else towards black."""
    target = 255.0 if sum(rgb) < 240 else 0.0
    red, green, blue = (c + (target - c) * amount for c in rgb)
    return red, green, blue


def _blend(canvas: np.ndarray, alpha: np.ndarray, color: np.ndarray) -> None:
    """Paint ``color`` [..., 3] over ``canvas`` [h, w, 3] in place, with the opacity ``alpha`` [h, w]."""
    canvas += (color - canvas) * alpha[..., None]


def _expose(canvas: np.ndarray, spec: ShapesSpec, draws: Draws) -> np.ndarray:
    """Uneven light and grain, then rounding to uint8."""
    size = spec.size
    light = textures.ramp(size, size, draws.uniform(0, 2 * math.pi)) * np.float32(draws.uniform(0.0, 0.3))
    grain = draws.uniform(4, 10) * (2.0 if spec.hard else 1.0)
    noise = (draws.array(size, size, 3) + draws.array(size, size, 3) - 1) * np.float32(grain)
    lit = canvas * (light + np.float32(0.85))[..., None] + noise
    return np.clip(np.floor(lit + np.float32(0.5)), 0, 255).astype(np.uint8)
