"""Procedural pictures: checkers, noise, gradients and strokes like writing. uint8 [H, W, 3], from seeded draws."""

import math

import numpy as np
from PIL import Image, ImageDraw

from .motion import Draws

KINDS = ("checker", "noise", "gradient", "strokes")


TEXTURE_WIDTH, TEXTURE_HEIGHT = 1024, 640


def draw_texture(draws: Draws, width: int = TEXTURE_WIDTH, height: int = TEXTURE_HEIGHT) -> np.ndarray:
    """A random texture of that size, uint8 [H, W, 3]."""
    makers = (_checker, _noise, _gradient, _strokes)
    return makers[draws.below(len(makers))](draws, width, height)


def checker(width: int, height: int, side: float, colours: np.ndarray) -> np.ndarray:
    """Squares of `side` pixels in two colours [2, 3] of 0..255: uint8 [H, W, 3]."""
    rows, columns = np.arange(height) // side, np.arange(width) // side
    odd = ((rows[:, None] + columns[None, :]) % 2).astype(int)  # [H, 1] + [1, W] -> [H, W]
    return np.round(colours[odd]).astype(np.uint8)  # [2, 3] -> [H, W, 3]


def octaves(draws: Draws, width: int, height: int, cells: int, levels: int, fade: float) -> np.ndarray:
    """Noise of `levels` scales, each twice as fine and `fade` times as strong: float32 [H, W, 3] in [0, 1]."""
    total = np.zeros((height, width, 3), np.float32)
    for level in range(levels):
        across = cells * 2**level
        down = max(2, across * height // width)
        coarse = draws.grid(down, across, 3)
        total += np.float32(fade**level) * _stretch(_stretch(coarse, height, 0), width, 1)
    low, high = total.min((0, 1)), total.max((0, 1))
    return (total - low) / (high - low)


def _stretch(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Enlarge one axis to `size` by linear interpolation, first and last value at the ends.

    Plain sums and products: torch's own interpolation depends on the number of threads in its last bit.
    """
    at = np.linspace(0, values.shape[axis] - 1, size)
    before = np.minimum(at.astype(int), values.shape[axis] - 2)
    part = (at - before).astype(np.float32)
    part = part[:, None, None] if axis == 0 else part[None, :, None]  # [size] -> [size, 1, 1] or [1, size, 1]
    return values.take(before, axis) * (1 - part) + values.take(before + 1, axis) * part


def _colours(draws: Draws, count: int) -> np.ndarray:
    """Colours that differ in brightness, float32 [count, 3] of 0..255."""
    return 255 * (0.75 * draws.grid(count, 3) + 0.25 * draws.grid(count, 1))


def _checker(draws: Draws, width: int, height: int) -> np.ndarray:
    picture = checker(width, height, draws.uniform(width / 60, width / 12), _colours(draws, 2))
    # Marks make the squares tell apart: over a bare pattern, a pan by two squares is no pan.
    shade = 0.6 + 0.4 * octaves(draws, width, height, 3, 3, 0.6)
    return (picture * shade).astype(np.uint8)


def _noise(draws: Draws, width: int, height: int) -> np.ndarray:
    field = octaves(draws, width, height, 3, 8, draws.uniform(0.55, 0.8))
    ends = _colours(draws, 2)
    mixed = 0.7 * field.mean(2, keepdims=True) + 0.3 * field  # [H, W, 3], mostly one field for all colours
    sharper = np.clip((mixed - 0.5) * 1.6 + 0.5, 0, 1)
    return (ends[0] + (ends[1] - ends[0]) * sharper).astype(np.uint8)


def _gradient(draws: Draws, width: int, height: int) -> np.ndarray:
    angle = draws.uniform(0, 2 * math.pi)
    x, y = np.linspace(-1, 1, width)[None, :], np.linspace(-1, 1, height)[:, None]
    along = np.clip(0.5 + 0.4 * (x * math.cos(angle) + y * math.sin(angle)), 0, 1)[..., None]  # [H, W, 1]
    ends = _colours(draws, 2)
    image = Image.fromarray((ends[0] + (ends[1] - ends[0]) * along).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for colour in _colours(draws, 14):
        cx, cy = draws.uniform(0, width), draws.uniform(0, height)
        r, squash = draws.uniform(0.02, 0.12) * width, draws.uniform(0.4, 1.0)
        box = (cx - r, cy - r * squash, cx + r, cy + r * squash)
        fill = tuple(int(c) for c in colour)
        (pen.ellipse if draws.chance(0.5) else pen.rectangle)(box, fill=fill)
    return np.array(image)


def _strokes(draws: Draws, width: int, height: int) -> np.ndarray:
    """Rows of short pen strokes, in words of a few letters, on slightly uneven paper."""
    paper = octaves(draws, width, height, 4, 5, 0.6).mean(2, keepdims=True)
    ground, ink = _colours(draws, 2)
    if ground.mean() < ink.mean():
        ground, ink = ink, ground
    ground, ink = np.clip(ground + 50, 0, 255), ink * 0.5
    image = Image.fromarray((ground * (0.85 + 0.15 * paper)).astype(np.uint8))
    pen, fill = ImageDraw.Draw(image), tuple(int(c) for c in ink)
    size = draws.uniform(0.022, 0.05) * height
    y = size
    while y < height - size:
        x = size * draws.uniform(0.5, 2)
        end = width - size * draws.uniform(1, 8)
        while x < end:
            points = [
                (x + a * size * 0.6, y + (b - 0.5) * size) for a, b in draws.grid(1 + 2 + draws.below(2), 2).tolist()
            ]
            pen.line(points, fill=fill, width=max(1, round(size / 9)))
            x += size * (0.75 if draws.chance(0.82) else 1.6)
        y += size * 1.7
    return np.array(image)
