"""Stage transition: references for training that carry the artifacts Stage I makes.

Low-resolution truth is noised to a random level, denoised by the trained Stage I in a few steps, decoded, upsampled,
given the image as its first frame, and encoded: what Stage II meets at inference, with the truth beside it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..engine.dit import DiT
from ..engine.profile import StageConfig
from ..engine.reference import upsample
from ..engine.vae import VAE
from .flow import ClipBatch, decode_clip, dit_velocity, encode_clip, few_steps, noised
from .log import TrainingError
from .stage1 import ImageEncoder, TextEncoder, encode_prompts, first_frame_condition, first_frame_tokens


@dataclass(frozen=True)
class TransitionConfig:
    """How often Stage I has its hand in a reference, and from which noise levels; the same in evaluation."""

    probability: float = 0.8
    lowest: float = 0.1
    highest: float = 0.5
    steps: int = 4
    shift: float = 5.0

    def at(self, stage1: StageConfig) -> "TransitionConfig":
        """This with the schedule of a Stage I."""
        return replace(self, shift=stage1.shift, steps=stage1.steps)


@dataclass(frozen=True)
class StageOne:
    """The finished first stage that transition runs; no DiT where no sample is ever given to it.

    Of two experts `dit` works from the sigma `boundary` up, `low` below it.
    """

    dit: DiT | None
    words: TextEncoder
    vae: VAE
    low: DiT | None = None
    boundary: float = 0.0
    images: ImageEncoder | None = None  # for a DiT that reads CLIP image tokens

    def velocity(self, x: Tensor, sigma: Tensor, text: Tensor, tokens: Tensor | None) -> Tensor:
        """Velocity [B, z, T, h, w] of x [B, z + 4+z, T, h, w], each sample by the expert of its sigma [B]."""
        made, order = [], []
        high = sigma >= self.boundary
        for dit, chosen in ((self.dit, high), (self.low, ~high)):
            rows = chosen.nonzero().flatten()  # [b], the samples of this expert
            if not len(rows):
                continue
            if dit is None:
                raise TrainingError(f"transition: got no Stage I for noise levels {sigma.tolist()}, want one; pass it")
            given = None if tokens is None else tokens[rows]
            made.append(dit_velocity(dit, x[rows], sigma[rows], text[rows], image_tokens=given))
            order.append(rows)
        return torch.cat(made)[torch.cat(order).argsort()]


@torch.no_grad()
def transit(stage1: StageOne, clips: ClipBatch, config: TransitionConfig, generator: torch.Generator) -> Tensor:
    """Low-resolution pixels [B, 3, T, h, w] as Stage I would hand them on; a share of the samples only decoded."""
    return decode_clip(stage1.vae, transit_latents(stage1, clips, config, generator))


@torch.no_grad()
def transit_latents(stage1: StageOne, clips: ClipBatch, config: TransitionConfig, generator: torch.Generator) -> Tensor:
    """What `transit` decodes: motion latents [B, z, 1+k, h, w], normalised."""
    latents = encode_clip(stage1.vae, clips.low)
    if config.probability == 0:
        return latents
    if stage1.dit is None and stage1.low is None:
        raise TrainingError(f"transition: got no Stage I, want one for probability {config.probability}; pass it, or 0")
    count = latents.shape[0]
    spread = config.highest - config.lowest
    # Drawn before the noise: models whose latents are of other sizes get the same levels.
    start = config.lowest + spread * torch.rand(count, generator=generator)
    taken = (torch.rand(count, generator=generator) < config.probability).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    text = encode_prompts(stage1.words, list(clips.prompts), latents.device)
    condition = first_frame_condition(stage1.vae, clips.low)
    tokens = first_frame_tokens(stage1.images, clips.high)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return stage1.velocity(torch.cat((x, condition), dim=1), sigma, text, tokens)

    made = few_steps(velocity, noised(latents, noise, start), start, config.steps, config.shift)
    return torch.where(taken.view(-1, 1, 1, 1, 1), made, latents)  # [B] -> [B, 1, 1, 1, 1]


@torch.no_grad()
def hybrid_reference(vae2: VAE, low: Tensor, high: Tensor) -> Tensor:
    """z_ref [B, z, 1+k, H, W]: low pixels upsampled to the size of high, the first frame taken from high, encoded."""
    pixels = upsample(low, *high.shape[3:])
    return encode_clip(vae2, torch.cat((high[:, :, :1], pixels[:, :, 1:]), dim=2))
