"""Clips made by the engine for measuring, and what is seen on the way: Stage I's pixels, the frame before the image."""

import copy
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..engine.calls import stream_call
from ..engine.dit import DiT
from ..engine.errors import ProfileError
from ..engine.reference import upsample
from ..engine.stage1 import decode_motion
from ..engine.text import WordEncoder
from ..engine.vae import VAE
from ..runtime.image import to_frames
from ..runtime.models import Loaded
from ..runtime.prompts import WordPrompts
from ..runtime.session import Request, Session
from ..training.flow import ClipBatch
from ..training.transition import StageOne, TransitionConfig, transit_latents
from .measure import Cost, measured
from .quality_clips import TruthClip, to_pixels


@dataclass(frozen=True)
class Made:
    """A finished clip: frames and upsampled [T, H, W, 3], first [H, W, 3], low [T, h, w, 3], all uint8."""

    frames: np.ndarray
    first: np.ndarray  # frame 0 as decoded, before the image takes its place
    low: np.ndarray  # what Stage I handed on
    upsampled: np.ndarray  # the same, bicubic
    cost: Cost  # of Stage II: reference, denoising and decoding


def generate(session: Session, request: Request, motion: Tensor | None = None) -> Made:
    """The whole clip on the engine's own path; `motion` takes the place of what Stage I would make."""
    clip, state = session.prepare(request, motion=motion)
    first, _ = stream_call(session.graphs, "decode", state.anchor, ())
    low = motion_pixels(session, clip.motion)
    with measured(session.device) as cost:
        frames = np.concatenate([chunk.frames for chunk in session.resume(request, clip, state)])
    profile = session.profile
    upsampled = to_frames(upsample(low, profile.height, profile.width))
    return Made(frames, to_frames(first)[0], to_frames(low), upsampled, cost)


def stage1_low(session: Session, request: Request) -> np.ndarray:
    """Stage I's clip alone, uint8 [T, h, w, 3]."""
    clip, _ = session.prepare(request)
    return to_frames(motion_pixels(session, clip.motion))


def motion_pixels(session: Session, motion: Tensor) -> Tensor:
    """Motion latents [1, z, F, h', w'] as pixels [1, 3, T, h, w], decoded as the engine decodes them."""
    chunks, cache = [], ()
    for block in range(session.profile.blocks):
        pixels, cache = decode_motion(session.graphs, motion, block, cache)
        chunks.append(pixels.float())
    return torch.cat(chunks, dim=2)


def stage_one(loaded: Loaded) -> StageOne:
    """An fp32 copy of the first stage for stage transition, which mixes dtypes. Raises ProfileError for large models.

    Transition exists for one expert and the word encoder that is trained with it.
    """
    if not isinstance(loaded.prompts, WordPrompts) or "stage1" not in loaded.modules:
        raise ProfileError(
            f"quality of {loaded.profile.name}: got a Stage I without the word encoder of `nano` or with two experts, "
            "want one that stage transition can run; pass --profile nano"
        )
    dit, vae, words = (
        copy.deepcopy(module).float()
        for module in (loaded.modules["stage1"], loaded.modules["vae1"], loaded.prompts.model)
    )
    return StageOne(cast(DiT, dit), cast(WordEncoder, words), cast(VAE, vae))


def transition_motion(one: StageOne, clip: TruthClip, config: TransitionConfig) -> Tensor:
    """Motion latents [1, z, F, h', w'] of the truth after stage transition, by the clip's seed."""
    low = to_pixels(clip.low).to(next(one.vae.parameters()).device)
    batch = ClipBatch(low, low, [clip.prompt])  # the high resolution is not read
    return transit_latents(one, batch, config, torch.Generator().manual_seed(clip.seed))


@torch.no_grad()
def round_trip(vae: VAE, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] encoded and decoded block by block, as the engine does it."""
    parameter = next(vae.parameters())
    pixels = to_pixels(frames).to(parameter.device, parameter.dtype)
    return to_frames(vae.decode(vae.encode(pixels)))


def upsample_frames(low: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, uint8 [T, h, w, 3] -> [T, height, width, 3]."""
    return to_frames(upsample(to_pixels(low), height, width))
