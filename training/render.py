"""Draws the frames of a scene: the plane under the camera, a sprite in front, light over both.

Every picture is drawn at twice the size and averaged, from a texture first reduced so far that no frame of the clip
reads it more coarsely than `DENSITY`: fine detail turns grey, it never turns into patterns, and sharpness does not
jump between frames. All coordinates are those of the whole picture, so a crop has the pixels of the whole.

Axes: T frames, H rows, W columns.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .camera import corner_extent, screen_grid, widest_step
from .motion import Draws, Light

SUPERSAMPLING = 2
DENSITY = 1.5  # texels per pixel where the camera is farthest: a zoom in by that much stays sharp


@dataclass(frozen=True)
class Window:
    """The picture being made: whole size, and the crop of it that is drawn, in pixels."""

    width: int
    height: int
    left: int
    top: int
    crop_width: int
    crop_height: int


@dataclass(frozen=True)
class Ground:
    """The plane's texture, fp32 [1, 3, h, w] in [0, 1], and where plane coordinates are on it."""

    texels: Tensor
    centre: tuple[float, float]  # of the plane's origin, in texels from the left top corner
    scale: tuple[float, float]  # texels per plane unit, across and down


def to_texels(photo: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """uint8 [H, W, 3] -> fp32 [1, 3, H, W] in [0, 1] on the device."""
    tensor = torch.as_tensor(photo, device=device)
    return tensor.permute(2, 0, 1).unsqueeze(0).float().div_(255)  # [H, W, 3] -> [1, 3, H, W]


def shrink(texels: Tensor, width: int, height: int) -> Tensor:
    """Reduce fp32 [1, 3, h, w] to a size without aliasing; never enlarges."""
    size = (min(height, texels.shape[2]), min(width, texels.shape[3]))
    if size == texels.shape[2:]:
        return texels
    return F.interpolate(texels, size, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)


def lay_ground(texels: Tensor, path: np.ndarray, window: Window, draws: Draws) -> Ground:
    """Place the camera's path on a picture [1, 3, h, w] so that it never looks past the edge, and reduce it."""
    aspect = window.width / window.height
    left, top, right, bottom = corner_extent(path, aspect)
    height, width = texels.shape[2:]
    largest = min((width - 2) / (right - left), (height - 2) / (bottom - top))
    # Closer than one texel per pixel would be blurred, so only small pictures get that.
    scale = draws.uniform(max(0.6 * largest, min(largest, window.height)), largest)
    x = draws.uniform(1 - left * scale, width - 1 - right * scale)
    y = draws.uniform(1 - top * scale, height - 1 - bottom * scale)
    # Cut what is never seen, at whole texels with a margin for the filter, before the costly reduction.
    margin = math.ceil(4 * scale / window.height) + 4
    x0, y0 = max(0, math.floor(x + left * scale) - margin), max(0, math.floor(y + top * scale) - margin)
    x1, y1 = math.ceil(x + right * scale) + margin, math.ceil(y + bottom * scale) + margin
    texels = texels[:, :, y0:y1, x0:x1]
    ratio = min(1.0, DENSITY * window.height / (scale * widest_step(path, aspect)))
    height, width = texels.shape[2:]
    small = shrink(texels, math.ceil(width * ratio), math.ceil(height * ratio))
    # Rounding up makes the two axes' factors differ by a hair, so each has its own.
    rx, ry = small.shape[3] / width, small.shape[2] / height
    return Ground(small, ((x - x0) * rx, (y - y0) * ry), (scale * rx, scale * ry))


def draw_ground(ground: Ground, path: np.ndarray, window: Window) -> Tensor:
    """The plane seen through homographies [n, 3, 3]: fp32 [n, 3, H, W] in [0, 1], the window's crop."""
    height, width = ground.texels.shape[2:]
    (cx, cy), (sx, sy) = ground.centre, ground.scale
    # plane -> texels -> the [-1, 1] of grid_sample, whose ends are the outer edges
    place = np.array([[2 * sx / width, 0, 2 * cx / width - 1], [0, 2 * sy / height, 2 * cy / height - 1], [0, 0, 1]])
    device = ground.texels.device
    m = torch.from_numpy((place @ path).astype(np.float32)).to(device)[:, :, :, None, None]  # [n, 3, 3, 1, 1]
    u, v = _fine_grid(window, device)  # [1, 2W], [2H, 1]
    grid = torch.empty(len(path), v.shape[0], u.shape[1], 2, device=device)  # [n, 2H, 2W, 2]
    for axis in (0, 1):
        torch.add(m[:, axis, 0] * u + m[:, axis, 2], m[:, axis, 1] * v, out=grid[..., axis])
    if np.any(path[:, 2, :2]):
        grid /= (m[:, 2, 0] * u + m[:, 2, 2] + m[:, 2, 1] * v)[..., None]
    texels = ground.texels.expand(len(path), -1, -1, -1)  # [1, 3, h, w] -> [n, 3, h, w], no copy
    fine = F.grid_sample(texels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(fine, SUPERSAMPLING)  # [n, 3, 2H, 2W] -> [n, 3, H, W]


def _fine_grid(window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """Screen coordinates of the finer pixels of the crop: u [1, 2W], v [2H, 1], fp32."""
    k = SUPERSAMPLING
    size = (window.crop_width * k, window.crop_height * k)
    whole = (window.width * k, window.height * k)
    u, v = screen_grid(*size, window.height * k, window.left * k, window.top * k, whole)
    return tuple(torch.from_numpy(x.astype(np.float32)).to(device) for x in (u, v))  # type: ignore[return-value]


def light_up(frames: Tensor, light: Light, time: np.ndarray, window: Window) -> Tensor:
    """Apply the light at these times, [n], to fp32 [n, 3, H, W]; may exceed 1."""
    gains = np.ones((len(time), 3, 1, 1))
    change = light.amount * time[:, None]  # [n, 1]
    if light.kind in ("warmer", "cooler"):
        sign = 1 if light.kind == "warmer" else -1
        gains = (1 + change * np.array([[sign, 0.1 * sign, -sign]]))[:, :, None, None]  # [n, 3] -> [n, 3, 1, 1]
    elif light.kind in ("brighter", "dimmer"):
        gains = (1 + change * (1 if light.kind == "brighter" else -1))[:, :, None, None]  # [n, 1] -> [n, 1, 1, 1]
    else:
        sign = 1 if light.kind == "passes right" else -1
        u, v = screen_grid(
            window.crop_width, window.crop_height, window.height, window.left, window.top, (window.width, window.height)
        )
        centre = sign * (time - 0.5)[:, None, None] * window.width / window.height  # [n] -> [n, 1, 1]
        spot = np.exp(-((u[None] - centre) ** 2 + v[None] ** 2) / (2 * 0.35**2))  # [n, H, W]
        gains = (1 - 0.3 * light.amount + light.amount * spot)[:, None]  # [n, H, W] -> [n, 1, H, W]
    return frames * torch.from_numpy(gains.astype(np.float32)).to(frames.device)
