"""Textures of backgrounds and fills: weights in 0..1 that blend two colours.

Elementwise arithmetic only, for the reason given in :mod:`boltz_mm.datasets.shapes.geometry`.
"""

import math

import numpy as np

from boltz_mm.datasets.shapes.draws import Draws


def value_noise(draws: Draws, height: int, width: int, cell: float, octaves: int = 1) -> np.ndarray:
    """Smooth noise: random values on a grid, interpolated, with finer and weaker copies added.

    Args:
        draws: Source of chance.
        height: Rows.
        width: Columns.
        cell: Distance of the grid's points in pixels, of the coarsest octave.
        octaves: How many grids; each is twice as fine and half as strong as the one before.

    Returns:
        float32 [height, width] in 0..1.
    """
    total = np.zeros((height, width), np.float32)
    strength = weight = 1.0
    norm = 0.0
    for _ in range(octaves):
        total += np.float32(weight) * _noise_octave(draws, height, width, max(cell * strength, 1.0))
        norm += weight
        weight /= 2
        strength /= 2
    return total / np.float32(norm)


def _noise_octave(draws: Draws, height: int, width: int, cell: float) -> np.ndarray:
    grid = draws.array(int(height / cell) + 2, int(width / cell) + 2)

    def position(length: int) -> tuple[np.ndarray, np.ndarray]:
        at = (np.arange(length) + 0.5) / cell
        low = at.astype(np.int64)
        frac = (at - low).astype(np.float32)
        return low, frac * frac * (3 - 2 * frac)

    y, fy = position(height)
    x, fx = position(width)
    rows = grid[y] + (grid[y + 1] - grid[y]) * fy[:, None]
    return rows[:, x] + (rows[:, x + 1] - rows[:, x]) * fx


def _wave(phase: np.ndarray, softness: float) -> np.ndarray:
    """A square wave of period 1 whose edges are ramps of the width ``softness``."""
    distance = np.abs(phase - np.floor(phase) - np.float32(0.5))  # 0 in the middle of a band, 0.5 between bands
    return np.clip((np.float32(0.25) - distance) / np.float32(softness) + np.float32(0.5), 0, 1)


def pattern(kind: str, height: int, width: int, period: float, angle: float, shift: float = 0.0) -> np.ndarray:
    """A regular pattern.

    Args:
        kind: ``'striped'``, ``'checked'`` or ``'dotted'``.
        height: Rows.
        width: Columns.
        period: Pixels after which the pattern repeats.
        angle: Its direction in radians.
        shift: Its phase in periods.

    Returns:
        float32 [height, width] in 0..1.

    Raises:
        ValueError: If the kind is unknown.
    """
    y, x = np.mgrid[:height, :width].astype(np.float32)
    cos, sin = np.float32(math.cos(angle) / period), np.float32(math.sin(angle) / period)
    u = x * cos + y * sin + np.float32(shift)
    softness = min(0.5, 1.0 / period)
    if kind == 'striped':
        return _wave(u, softness)
    v = y * cos - x * sin + np.float32(shift)
    if kind == 'checked':
        a, b = _wave(u, softness), _wave(v, softness)
        return a + b - 2 * a * b
    if kind == 'dotted':
        du, dv = u - np.floor(u) - np.float32(0.5), v - np.floor(v) - np.float32(0.5)
        return np.clip((np.float32(0.3) - np.sqrt(du * du + dv * dv)) / np.float32(softness) + np.float32(0.5), 0, 1)
    raise ValueError(f'unknown pattern {kind!r}')


def ramp(height: int, width: int, angle: float) -> np.ndarray:
    """A linear ramp over the area, float32 [height, width] in 0..1, rising in the direction ``angle`` (radians)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    cos, sin = math.cos(angle), math.sin(angle)
    reach = (abs(cos) * width + abs(sin) * height) / 2
    u = (x + np.float32(0.5 - width / 2)) * np.float32(cos) + (y + np.float32(0.5 - height / 2)) * np.float32(sin)
    return np.clip(u / np.float32(2 * reach) + np.float32(0.5), 0, 1)


def background(kind: str, draws: Draws, size: int) -> np.ndarray:
    """Texture of one stuff class.

    Args:
        kind: A name of :data:`boltz_mm.datasets.shapes.classes.STUFF_CLASSES`.
        draws: Source of chance.
        size: Side of the square image.

    Returns:
        float32 [size, size] in 0..1.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind == 'smooth':
        return ramp(size, size, draws.uniform(0, 2 * math.pi))
    if kind == 'cloudy':
        return value_noise(draws, size, size, draws.uniform(0.15, 0.35) * size, octaves=3)
    if kind == 'speckled':
        noise = value_noise(draws, size, size, draws.uniform(2.0, 3.5))
        return np.clip((noise - np.float32(0.62)) * np.float32(5) + np.float32(0.5), 0, 1)
    if kind in ('striped', 'checked'):
        period, angle = draws.uniform(7, 18), draws.uniform(0, math.pi)
        return pattern(kind, size, size, period, angle, draws.uniform(0, 1))
    raise ValueError(f'unknown background {kind!r}')
