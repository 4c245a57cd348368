"""Outlines of the shapes as polygons, and an even-odd scan-line rasteriser.

Curves are polygons of 48 corners.  The rasteriser uses elementwise IEEE arithmetic only (no SIMD-dependent sums, no
library whose drawing changes between versions), so that the same outline gives the same mask on every machine.
"""

import math
from collections.abc import Callable

import numpy as np

Contours = list[np.ndarray]
"""Closed polygons [V, 2] of (x, y); a point is inside if it is inside an odd number of them."""

_CORNERS = 48
SUPERSAMPLING = 4


def _arc(radius: float, start: float, stop: float, count: int, center_x: float = 0.0) -> list[tuple[float, float]]:
    angles = [start + (stop - start) * i / count for i in range(count)]
    return [(center_x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _circle() -> Contours:
    return [np.array(_arc(1.0, 0.0, 2 * math.pi, _CORNERS))]


def _ring() -> Contours:
    return [np.array(_arc(1.0, 0.0, 2 * math.pi, _CORNERS)), np.array(_arc(0.52, 0.0, 2 * math.pi, _CORNERS))]


def _square() -> Contours:
    return [np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])]


def _triangle() -> Contours:
    return [np.array(_arc(1.0, -math.pi / 2, 1.5 * math.pi, 3))]


def _star() -> Contours:
    outer = _arc(1.0, -math.pi / 2, 1.5 * math.pi, 5)
    inner = _arc(0.42, -math.pi / 2 + math.pi / 5, 1.5 * math.pi + math.pi / 5, 5)
    return [np.array([point for pair in zip(outer, inner, strict=True) for point in pair])]


def _cross() -> Contours:
    a = 0.34
    quarter = [(a, -1.0), (a, -a), (1.0, -a)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return [np.array(corners)]


def _bar() -> Contours:
    return [np.array([(-1.0, -0.26), (1.0, -0.26), (1.0, 0.26), (-1.0, 0.26)])]


def _crescent() -> Contours:
    # The unit disc without the disc of radius r at (d, 0); both circles meet at (x, +-y).
    d, r = 0.5, 0.8
    x = (1 - r * r + d * d) / (2 * d)
    y = math.sqrt(1 - x * x)
    outer, inner = math.atan2(y, x), math.atan2(y, x - d)
    return [
        np.array(
            _arc(1.0, outer, 2 * math.pi - outer, _CORNERS // 2)
            + _arc(r, 2 * math.pi - inner, inner, _CORNERS // 2, center_x=d)
        )
    ]


def _heart() -> Contours:
    corners = []
    for i in range(_CORNERS):
        t = 2 * math.pi * i / _CORNERS
        x = 16 * math.sin(t) ** 3
        y = -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        corners.append((x / 16, y / 16))
    return [np.array(corners)]


def _arrow() -> Contours:
    return [np.array([(1.0, 0.0), (0.1, -0.8), (0.1, -0.3), (-1.0, -0.3), (-1.0, 0.3), (0.1, 0.3), (0.1, 0.8)])]


_OUTLINES: dict[str, Callable[[], Contours]] = {
    'circle': _circle,
    'square': _square,
    'triangle': _triangle,
    'star': _star,
    'ring': _ring,
    'cross': _cross,
    'bar': _bar,
    'crescent': _crescent,
    'heart': _heart,
    'arrow': _arrow,
}


def outline(name: str, size: float, aspect: float, angle: float) -> Contours:
    """The outline of a shape, turned and scaled, with the centre of its box at the origin.

    Args:
        name: A name of :data:`boltz_mm.datasets.shapes.classes.THING_CLASSES`.
        size: Longer side of the axis-aligned box of the result, in pixels.
        aspect: Stretching of the shape along its own x axis before it is turned.
        angle: Rotation in radians.

    Returns:
        Contours in pixels.

    Raises:
        ValueError: If there is no shape of that name.
    """
    if name not in _OUTLINES:
        raise ValueError(f'unknown shape {name!r}, known are {sorted(_OUTLINES)}')
    cos, sin = math.cos(angle), math.sin(angle)
    turned = [
        np.stack([c[:, 0] * (aspect * cos) - c[:, 1] * sin, c[:, 0] * (aspect * sin) + c[:, 1] * cos], axis=1)
        for c in _OUTLINES[name]()
    ]
    corners = np.concatenate(turned)
    low, high = corners.min(axis=0), corners.max(axis=0)
    scale = size / float((high - low).max())
    return [(c - (low + high) / 2) * scale for c in turned]


def rasterize(contours: Contours, width: int, height: int) -> np.ndarray:
    """Share of every pixel that lies inside the contours (even-odd rule).

    Args:
        contours: Polygons [V, 2] in pixels; pixel (i, j) covers [j, j + 1) x [i, i + 1).
        width: Columns of the result.
        height: Rows of the result.

    Returns:
        float32 [height, width] in 0..1, in steps of 1 / 16.
    """
    s = SUPERSAMPLING
    start = np.concatenate(contours)
    stop = np.concatenate([np.roll(c, -1, axis=0) for c in contours])
    (xa, ya), (xb, yb) = start.T, stop.T
    rows = ((np.arange(height * s) + 0.5) / s)[:, None]  # [R, 1]
    crossing = (ya <= rows) != (yb <= rows)  # [R, E]; never for a horizontal edge
    slope = (xb - xa) / np.where(ya == yb, 1.0, yb - ya)
    x = xa + (rows - ya) * slope
    column = np.clip(np.ceil(x * s - 0.5), 0, width * s).astype(np.int64)
    flat = (np.arange(height * s)[:, None] * (width * s + 1) + column)[crossing]
    toggles = np.bincount(flat, minlength=height * s * (width * s + 1)).reshape(height * s, width * s + 1)
    inside = np.cumsum(toggles, axis=1)[:, : width * s] & 1
    return (inside.reshape(height, s, width, s).sum(axis=(1, 3)) / (s * s)).astype(np.float32)
