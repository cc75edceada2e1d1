"""The clips that quality is measured on: drawn ones with known truth, footage, and crops of photographs.

All are of held-out photographs and of seeds that no training draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..engine.profile import Profile
from ..runtime.image import fit_image
from ..training.clips import ClipConfig, low_factor, make_clip, shrink_frames
from ..training.motion import Draws, Motion
from ..training.trainer import step_seed

LARGEST_CROP = 2.0  # in sizes of the clip


@dataclass(frozen=True)
class TruthClip:
    """A clip that is known: frames uint8 [T, H, W, 3], low uint8 [T, H/f, W/f, 3], and the seed for what is drawn."""

    name: str
    frames: np.ndarray
    low: np.ndarray
    prompt: str
    seed: int


def truth_clip(photos: Sequence[np.ndarray], profile: Profile, seed: int, index: int) -> TruthClip:
    """Clip number `index`: photograph `index`, in turn, with a motion drawn at random."""
    number = index % len(photos)
    own = step_seed(seed, "quality", "truth", index)
    config = _config(profile, profile.stage2.width, profile.stage2.height, low_factor(profile))
    clip = make_clip([photos[number]], own, config)
    return TruthClip(f"photo {number + 1}, clip {index + 1}", clip.frames.numpy(), clip.low.numpy(), clip.prompt, own)


def canonical_low(photos: Sequence[np.ndarray], profile: Profile, seed: int, index: int, motion: Motion) -> np.ndarray:
    """A true clip of one motion at low resolution, uint8 [T, h, w, 3]; drawn at twice that size, which is as sharp."""
    stage = profile.stage1
    own = step_seed(seed, "quality", "control", index)
    config = _config(profile, 2 * stage.width, 2 * stage.height, 2)
    return make_clip([photos[index % len(photos)]], own, config, motion).low.numpy()


def footage_clip(name: str, frames: np.ndarray, profile: Profile, seed: int) -> TruthClip:
    """Real footage as a known clip; nobody wrote what moves, so its prompt is empty."""
    return TruthClip(name, frames, shrink(frames, low_factor(profile)), "", step_seed(seed, "quality", name))


def shrink(frames: np.ndarray, factor: int) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, H/f, W/f, 3], each pixel the mean of those it covers."""
    small = [shrink_frames(torch.from_numpy(frame[None]), factor).numpy() for frame in frames]
    return np.concatenate(small)


def whole_photo(photos: Sequence[np.ndarray], profile: Profile, index: int) -> np.ndarray:
    """Photograph `index`, in turn, as the input image: uint8 [H, W, 3]."""
    return fit_image(Image.fromarray(photos[index % len(photos)]), profile.width, profile.height, "crop")


def photo_crop(photos: Sequence[np.ndarray], profile: Profile, seed: int, index: int) -> np.ndarray:
    """A random crop of photograph `index`, in turn, as the input image: uint8 [H, W, 3].

    It has one to two times the clip's size where the photograph has that many pixels.
    """
    photo = photos[index % len(photos)]
    draws = Draws(step_seed(seed, "quality", "crop", index))
    height, width = photo.shape[:2]
    most = min(width / profile.width, height / profile.height)
    scale = draws.uniform(min(1.0, most), min(LARGEST_CROP, most))
    w, h = min(width, round(scale * profile.width)), min(height, round(scale * profile.height))
    x, y = draws.below(width - w + 1), draws.below(height - h + 1)
    return fit_image(Image.fromarray(photo[y : y + h, x : x + w]), profile.width, profile.height, "crop")


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> fp32 [1, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1)


def _config(profile: Profile, width: int, height: int, factor: int) -> ClipConfig:
    return ClipConfig(width, height, profile.frames, factor, procedural=0, colour_jitter=0, mirror=0)
