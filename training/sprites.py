"""The object in front of the scene: cut from a picture, soft at the edge, drawn over the frames where it is.

Axes: T frames, H rows, W columns.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .motion import Draws, Sprite
from .render import DENSITY, SUPERSAMPLING, Window, shrink

REACH = 1.35  # the outline's farthest point, in radii
EDGE = 2.5  # pixels from clear to covered


@dataclass(frozen=True)
class Cutout:
    """A sprite ready to draw: its texture [1, 3, h, w], and what shapes its outline."""

    sprite: Sprite
    texels: Tensor
    waves: tuple[tuple[int, float, float], ...]  # of a blob: (periods round the outline, amplitude, phase)
    tint: tuple[float, float, float]


def cut_out(sprite: Sprite, texels: Tensor, window: Window, draws: Draws) -> Cutout:
    """Take a random square of a picture [1, 3, h, w] as the sprite's texture, at the size it is drawn in."""
    height, width = texels.shape[2:]
    side = int(min(height, width) * draws.uniform(0.35, 0.9))
    y, x = draws.below(height - side + 1), draws.below(width - side + 1)
    target = max(4, math.ceil(2 * REACH * sprite.radius * window.height * DENSITY))
    texels = shrink(texels[:, :, y : y + side, x : x + side], target, target)
    waves = tuple((k, draws.uniform(0.04, 0.11), draws.uniform(0, 2 * math.pi)) for k in (2, 3, 5))
    tint = (draws.uniform(0.75, 1.15), draws.uniform(0.75, 1.15), draws.uniform(0.75, 1.15))
    return Cutout(sprite, texels, waves, tint)


def draw_sprite(frames: Tensor, cutout: Cutout, time: np.ndarray, window: Window) -> Tensor:
    """Draw the sprite at these times, [n], into fp32 [n, 3, H, W], in place.

    Returns how much of each pixel it covers, fp32 [n, H, W].
    """
    sprite, covered = cutout.sprite, torch.zeros_like(frames[:, 0])
    half = math.ceil(sprite.radius * REACH * window.height + EDGE) + 1
    for n, s in enumerate(time):
        u = sprite.start[0] + sprite.travel[0] * s
        v = sprite.start[1] + sprite.travel[1] * s + sprite.gravity * s * s
        column, row = math.floor(u * window.height + window.width / 2), math.floor((v + 0.5) * window.height)
        x0, x1 = max(column - half, window.left), min(column + half, window.left + window.crop_width)
        y0, y1 = max(row - half, window.top), min(row + half, window.top + window.crop_height)
        if x0 >= x1 or y0 >= y1:
            continue
        colour, alpha = _patch(cutout, (x0, y0, x1, y1), (u, v), sprite.spin * s, window)
        rows, columns = slice(y0 - window.top, y1 - window.top), slice(x0 - window.left, x1 - window.left)
        behind = frames[n, :, rows, columns]
        frames[n, :, rows, columns] = behind * (1 - alpha) + colour
        covered[n, rows, columns] = alpha
    return covered


def _patch(
    cutout: Cutout, box: tuple[int, int, int, int], centre: tuple[float, float], angle: float, window: Window
) -> tuple[Tensor, Tensor]:
    """The sprite within a box of whole pixels: (colour times cover [3, h, w], cover [h, w])."""
    sprite, k = cutout.sprite, SUPERSAMPLING
    x0, y0, x1, y1 = box
    device = cutout.texels.device
    # Offsets of the finer pixels from the sprite's centre, in radii, before and after turning with it.
    dx = ((np.arange(x0 * k, x1 * k) + 0.5) / k - window.width / 2) / window.height - centre[0]
    dy = ((np.arange(y0 * k, y1 * k) + 0.5) / k - window.height / 2) / window.height - centre[1]
    x = torch.from_numpy((dx / sprite.radius).astype(np.float32)).to(device)[None, :]  # [1, w]
    y = torch.from_numpy((dy / sprite.radius).astype(np.float32)).to(device)[:, None]  # [h, 1]
    cos, sin = math.cos(angle), math.sin(angle)
    p, q = cos * x + sin * y, cos * y - sin * x  # [h, w], in the sprite's own axes
    alpha = (0.5 - _outline(cutout, p, q) * (sprite.radius * window.height / EDGE)).clamp_(0, 1)
    grid = torch.stack((p, q), -1)[None] / REACH  # [h, w] x 2 -> [1, h, w, 2]
    colour = F.grid_sample(cutout.texels, grid, padding_mode="border", align_corners=False)[0]  # [3, h, w]
    colour = colour * torch.tensor(cutout.tint, device=device)[:, None, None]
    # Lit from above left, whatever way it has turned: a thing, and not a hole in the picture.
    shade = 0.5 if sprite.shape == "ball" else 0.2
    dome = (1 - 0.5 * ((x + 0.35) ** 2 + (y + 0.45) ** 2)).clamp(-1, 1)
    colour = (colour * (1 - shade + shade * 1.3 * dome)).clamp_(0, 1) * alpha
    both = F.avg_pool2d(torch.cat((colour, alpha[None])), k)  # [4, kh, kw] -> [4, h, w]
    return both[:3], both[3]


def _outline(cutout: Cutout, p: Tensor, q: Tensor) -> Tensor:
    """Distance from the outline in radii, negative inside; near enough where it matters, at the edge.

    Sums, products and roots only: a sine's last bit depends on the processor and on the number of threads.
    """
    if cutout.sprite.shape == "box":
        corner = 0.25
        a, b = p.abs() - (0.95 - corner), q.abs() - (0.75 - corner)
        return _length(a.clamp(min=0), b.clamp(min=0)) + torch.maximum(a, b).clamp(max=0) - corner
    distance = _length(p, q)
    if cutout.sprite.shape == "ball":
        return distance - 1
    size = distance.clamp(min=1e-6)
    cos, sin, reach = p / size, q / size, torch.ones_like(p)
    for periods, amplitude, phase in cutout.waves:
        many_cos, many_sin = cos, sin  # of 1, 2, 3.. times the angle
        for _ in range(periods - 1):
            many_cos, many_sin = many_cos * cos - many_sin * sin, many_sin * cos + many_cos * sin
        reach = reach + amplitude * (many_sin * math.cos(phase) + many_cos * math.sin(phase))
    return distance - reach


def _length(a: Tensor, b: Tensor) -> Tensor:
    return (a * a + b * b).sqrt()
