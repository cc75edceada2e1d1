"""Endless seeded clips whose truth is known: what moves, in numbers and in words, and the flow of the picture.

Axes: T frames, H rows, W columns. Low resolution is `low_factor` times smaller, each pixel the mean of the frames'
pixels that it covers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.profile import Profile
from .camera import camera_flow, camera_origin, camera_path, clip_time, screen_grid
from .motion import ClipError, Draws, Motion, MotionOdds, draw_motion
from .prompts import describe
from .render import Window, draw_ground, lay_ground, light_up, to_texels
from .sprites import cut_out, draw_sprite
from .textures import draw_texture

# Streams of random numbers: a given motion or another phrasing leaves the rest of a clip as it is.
MOTION_STREAM, SCENE_STREAM, SPRITE_STREAM, SHAKE_STREAM, WORDS_STREAM = range(5)
FRAMES_AT_ONCE = {"cpu": 1, "cuda": 16}


def low_factor(profile: Profile) -> int:
    """How many times smaller Stage I is."""
    return profile.stage2.width // profile.stage1.width


@dataclass(frozen=True)
class ClipConfig:
    """Sizes in pixels, and how often what happens."""

    width: int = 512
    height: int = 320
    frames: int = 33
    low_factor: int = 4
    procedural: float = 0.15  # clips over a procedural texture; all, where there are no photographs
    colour_jitter: float = 0.12  # per channel, relative; 0 for evaluation
    mirror: float = 0.5  # photographs seen in the mirror; 0 for evaluation
    # For models trained from nothing: a few photographs, seen many times, are learned by heart unless they change.
    turn: float = 0.0  # upside down
    swap: float = 0.0  # with its colour channels exchanged
    blend: float = 0.0  # of a photograph with another one
    odds: MotionOdds = field(default_factory=MotionOdds)

    def __post_init__(self) -> None:
        f = self.low_factor
        if self.frames < 1 or f < 1 or self.width < f or self.height < f or self.width % f or self.height % f:
            got = f"{self.width}x{self.height}, {self.frames} frames, factor {f}"
            raise ClipError(f"clip size: got {got}, want sides that the factor divides; round them")


@dataclass(frozen=True)
class Clip:
    """A clip, or a crop of one, with its truth; tensors on the device it was made on."""

    frames: Tensor  # uint8 [T, H, W, 3]
    low: Tensor  # uint8 [T, H/f, W/f, 3]
    prompt: str
    motion: Motion
    flow: np.ndarray  # float32 [T-1, H/f, W/f, 2], see camera_flow; in low-resolution pixels, the sprite left out
    origin: np.ndarray  # float32 [T, H/f, W/f, 2], see camera_origin; in the same pixels, NaN where the sprite is
    covered: Tensor  # float32 [T, H/f, W/f], how much of a pixel the sprite hides


def make_clip(
    photos: Sequence[np.ndarray],
    seed: int,
    config: ClipConfig,
    motion: Motion | None = None,
    *,
    crop: tuple[int, int, int, int] | None = None,
    device: torch.device | str = "cpu",
) -> Clip:
    """Make the clip of that seed over photographs uint8 [h, w, 3]; a `motion` given replaces the one drawn.

    `crop` (x, y, width, height), in pixels of the whole and multiples of the low factor, draws only that part, with
    the same pixels. Raises ClipError for a negative seed, a crop that does not fit, or an array that is no picture.
    """
    device = torch.device(device)
    window = _window(config, crop)
    if seed < 0:
        raise ClipError(f"clip seed: got {seed}, want 0 or more; use a positive one")
    aspect = config.width / config.height
    if motion is None:
        motion = draw_motion(Draws(MOTION_STREAM, seed), config.odds, aspect)
    path = camera_path(motion, config.frames, aspect, Draws(SHAKE_STREAM, seed))
    scene, front = Draws(SCENE_STREAM, seed), Draws(SPRITE_STREAM, seed)
    picture, used = _picture(photos, config, scene, device)
    ground = lay_ground(picture, path, window, scene)
    cutout = None
    if motion.sprite:
        other, _ = _picture(photos, config, front, device, used)
        cutout = cut_out(motion.sprite, other, window, front)
    time = clip_time(config.frames, 0.0)
    frames = torch.empty(config.frames, window.crop_height, window.crop_width, 3, dtype=torch.uint8, device=device)
    f = config.low_factor
    low_size = (window.crop_height // f, window.crop_width // f)
    covered = torch.zeros(config.frames, *low_size, device=device)
    step = FRAMES_AT_ONCE.get(device.type, 1)
    for first in range(0, config.frames, step):
        now = slice(first, first + step)
        drawn = draw_ground(ground, path[now], window)  # [n, 3, H, W]
        if cutout:
            covered[now] = F.avg_pool2d(draw_sprite(drawn, cutout, time[now], window), f)
        if motion.light:
            drawn = light_up(drawn, motion.light, time[now], window)
        drawn = drawn.mul_(255).round_().clamp_(0, 255)
        frames[now] = drawn.permute(0, 2, 3, 1)  # [n, 3, H, W] -> [n, H, W, 3]
    u, v = screen_grid(
        low_size[1],
        low_size[0],
        config.height / f,
        window.left / f,
        window.top / f,
        (config.width // f, config.height // f),
    )
    flow = camera_flow(path, u, v, config.height / f)
    origin = camera_origin(path, u, v, config.height / f)
    origin[covered.cpu().numpy() > 0] = np.nan
    prompt = describe(motion, Draws(WORDS_STREAM, seed))
    return Clip(frames, shrink_frames(frames, f), prompt, motion, flow, origin, covered)


def shrink_frames(frames: Tensor, factor: int) -> Tensor:
    """The mean of squares of `factor` pixels, in whole numbers, halves up: uint8 [T, H, W, 3] -> [T, H/f, W/f, 3]."""
    squares = frames.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # -> [T, H/f, f, W/f, f, 3]
    total = squares.sum((2, 4), dtype=torch.int32)  # [T, H/f, W/f, 3]
    return torch.div(total + factor * factor // 2, factor * factor, rounding_mode="floor").to(torch.uint8)


def _window(config: ClipConfig, crop: tuple[int, int, int, int] | None) -> Window:
    if crop is None:
        return Window(config.width, config.height, 0, 0, config.width, config.height)
    x, y, width, height = crop
    inside = min(x, y) >= 0 and min(width, height) > 0 and x + width <= config.width and y + height <= config.height
    if not inside or any(side % config.low_factor for side in crop):
        want = f"want multiples of {config.low_factor} within {config.width}x{config.height}"
        raise ClipError(f"crop: got {crop}, {want}; move it")
    return Window(config.width, config.height, x, y, width, height)


def _picture(
    photos: Sequence[np.ndarray], config: ClipConfig, draws: Draws, device: torch.device, avoid: int = -1
) -> tuple[Tensor, int]:
    """A photograph other than number `avoid`, or a texture: (fp32 [1, 3, h, w] in [0, 1], its number or -1)."""
    procedural, number = draws.chance(config.procedural), draws.below(max(1, len(photos)))
    if not photos or procedural:
        texels, number = to_texels(draw_texture(draws), device), -1
    else:
        if number == avoid:
            number = (number + 1) % len(photos)
        texels = _photo(photos, number, device)
        if draws.chance(config.mirror):
            texels = texels.flip(3)
        texels = _changed(texels, photos, number, config, draws)
    jitter = 1 + config.colour_jitter * (2 * draws.grid(3, 1, 1) - 1)
    return (texels * torch.from_numpy(jitter).to(device)).clamp_(max=1), number


def _photo(photos: Sequence[np.ndarray], number: int, device: torch.device) -> Tensor:
    photo = photos[number]
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise ClipError(f"photo {number}: got {photo.dtype} {photo.shape}, want uint8 (h, w, 3); convert it")
    return to_texels(photo, device)


def _changed(texels: Tensor, photos: Sequence[np.ndarray], number: int, config: ClipConfig, draws: Draws) -> Tensor:
    """Photograph `number`, fp32 [1, 3, h, w], turned, recoloured, blended; what is never done draws nothing."""
    if config.turn and draws.chance(config.turn):
        texels = texels.flip(2)
    if config.swap and draws.chance(config.swap):
        order = list(range(3))
        channels = [order.pop(draws.below(len(order))) for _ in range(3)]
        texels = texels[:, channels]
    if config.blend and len(photos) > 1 and draws.chance(config.blend):
        other = _photo(photos, (number + 1 + draws.below(len(photos) - 1)) % len(photos), texels.device)
        other = F.interpolate(other, texels.shape[2:], mode="bilinear", align_corners=False)
        texels = texels.lerp(other, draws.uniform(0.3, 0.7))
    return texels
