"""Flow matching for training: batches of clips, noise levels, velocities and short samplers on plain modules.

Axes: B batch, C channels, T latent blocks, H and W latent rows and columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..engine.dit import DiT
from ..engine.errors import SpecError
from ..engine.presets import A14B_BOUNDARY
from ..engine.profile import StageConfig
from ..engine.rope import rope_tables
from ..engine.sampler import TIMESTEPS, flow_sigmas, shift_sigma
from ..engine.vae import VAE

PIXELS_AT_ONCE = 2**24  # of one call of a VAE in training: at 2K one latent block, at small sizes the whole clip
Velocity = Callable[[Tensor, Tensor], Tensor]
Expert = Literal["high", "low"]


@dataclass(frozen=True)
class ClipBatch:
    """Clips with known truth: pixels in [-1, 1], high [B, 3, T, H, W] and low [B, 3, T, H/4, W/4], and what moves.

    `origin` [B, T, H/4, W/4, 2] is how far off in the first frame each low pixel was, where that is known.
    """

    high: Tensor
    low: Tensor
    prompts: Sequence[str]
    origin: Tensor | None = None


@dataclass(frozen=True)
class LatentBatch:
    """What a DiT learns from: the truth, normalised [B, z, T, H, W], and the channels it reads beside noisy latents.

    Those are [B, 4+z, T, H, W] for Stage I (mask and first frame), [B, z, T, H, W] for Stage II (reference).
    `image_tokens` [B, n, image_dim] are those of CLIP, for a Stage I that reads them; `places` [B, T, H/2, W/2, 2] is
    where in the first frame each of the DiT's tokens was, see training/matching.py.
    """

    latents: Tensor
    channels: Tensor
    prompts: Sequence[str]
    image_tokens: Tensor | None = None
    places: Tensor | None = None


@dataclass(frozen=True)
class NoiseLevels:
    """Which noise levels are trained: for a share exactly those of inference, else uniform before a shift."""

    shift: float = 5.0
    steps: int = 4
    grid_share: float = 0.5
    between: float | None = None  # the shift of those that are not inference's, if it is another; 1 = uniform

    def at(self, stage: StageConfig) -> "NoiseLevels":
        """These with the schedule of a stage."""
        return replace(self, shift=stage.shift, steps=stage.steps)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` sigmas in (0, 1], fp32 [count] on the CPU."""
        uniform = 1 - torch.rand(count, generator=generator)
        shifted = _shifted(uniform, self.shift if self.between is None else self.between)
        grid = torch.tensor(flow_sigmas(self.steps, self.shift))
        chosen = grid[torch.randint(self.steps, (count,), generator=generator)]
        return torch.where(torch.rand(count, generator=generator) < self.grid_share, chosen, shifted)


@dataclass(frozen=True)
class ExpertLevels(NoiseLevels):
    """Of those levels the ones at which one of two experts works: `high` from `boundary` up, `low` below it."""

    boundary: float = A14B_BOUNDARY
    expert: Expert = "high"

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` sigmas of that side, fp32 [count] on the CPU."""
        kept = torch.empty(0)
        while len(kept) < count:  # drawn again where they fall on the other side
            drawn = super().draw(count, generator)
            kept = torch.cat((kept, drawn[(drawn >= self.boundary) == (self.expert == "high")]))
        return kept[:count]


def noised(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x + sigma noise, with one sigma [B] per sample of x [B, C, T, H, W]."""
    level = sigma.to(x.device).view(-1, 1, 1, 1, 1)  # [B] -> [B, 1, 1, 1, 1]
    return (1 - level) * x + level * noise


def dit_velocity(
    dit: DiT,
    latents: Tensor,
    sigma: Tensor,
    text: Tensor,
    clean: int = 0,
    positions: Sequence[int] | None = None,
    image_tokens: Tensor | None = None,
) -> Tensor:
    """Velocity fp32 [B, C_out, T, H, W] of latents [B, C_in, T, H, W], text rows [B, L, D], CLIP tokens [B, n, D'].

    The first `clean` blocks have timestep 0, the others the sample's sigma [B]. As DiT.denoise, but the tables stay
    fp32 under autocast. SpecError for tokens that the DiT does not read, and for none where it does.
    """
    device, config = latents.device, dit.config
    batch, blocks = latents.shape[0], latents.shape[2]  # row 0 is timestep 0, row 1 + b that of sample b
    got = None if image_tokens is None else tuple(image_tokens.shape)
    want = (batch, config.image_tokens, config.image_dim) if config.image_dim else None
    if got != want:
        raise SpecError(f"CLIP image tokens: got {got}, want {want}; pass the image encoder that this DiT is made for")
    if image_tokens is not None:
        image_tokens = image_tokens.to(next(dit.img_emb.parameters()).dtype)  # as its graph is fed
    timesteps = torch.cat((sigma.new_zeros(1), TIMESTEPS * sigma)).to(device)  # of each row
    rows = torch.arange(1, batch + 1, device=device).unsqueeze(1).repeat(1, blocks)  # [B] -> [B, T]
    rows[:, :clean] = 0
    with torch.autocast(device.type, enabled=False):
        modulation, head_modulation = dit.time_tables(timesteps)
    height, width = latents.shape[3] // 2, latents.shape[4] // 2
    cos, sin = rope_tables(dit.config.head_dim, positions or range(blocks), height, width)
    rope = (cos.to(device), sin.to(device))
    return dit(latents, modulation, head_modulation, rows, rope, dit.text_kv(text, image_tokens)).float()


def few_steps(velocity: Velocity, x: Tensor, start: Tensor, steps: int, shift: float) -> Tensor:
    """Euler from each sample's own noise level `start` [B] down to 0, in `steps` steps. x [B, C, T, H, W]."""
    origin = start / (shift - (shift - 1) * start)  # unshifted
    for step in range(steps):
        now, after = (_shifted(origin * (1 - i / steps), shift).to(x.device) for i in (step, step + 1))
        x = x + (after - now).view(-1, 1, 1, 1, 1) * velocity(x, now)  # [B] -> [B, 1, 1, 1, 1]
    return x


def _shifted(sigma: Tensor, shift: float) -> Tensor:
    return torch.tensor([shift_sigma(value, shift) for value in sigma.tolist()])


def fuse(dit: DiT) -> DiT:
    """Compile the DiT's layers in place with torch.compile: minutes at the first steps, twice as fast after."""
    for layer in dit.layers:
        layer.compile(dynamic=True)
    return dit


@torch.no_grad()
def encode_clip(vae: VAE, pixels: Tensor) -> Tensor:
    """Normalised latents fp32 [B, z, 1+k, H, W] of pixels [B, 3, 1+4k, ...]; long or large clips in several calls."""
    step = vae.config.time * _blocks_at_once(pixels.shape[0] * pixels.shape[3] * pixels.shape[4] * vae.config.time)
    latents, caches = vae.encode_chunk(pixels[:, :, :1], None)
    blocks = [latents.float()]
    for chunk in pixels[:, :, 1:].split(step, dim=2):
        latents, caches = vae.encode_chunk(chunk, caches)
        blocks.append(latents.float())
    return torch.cat(blocks, dim=2)


@torch.no_grad()
def decode_clip(vae: VAE, latents: Tensor) -> Tensor:
    """Pixels fp32 [B, 3, 1+4k, ...] in [-1, 1] of normalised latents [B, z, 1+k, H, W]; as `encode_clip`."""
    config = vae.config
    step = _blocks_at_once(latents.shape[0] * latents.shape[3] * latents.shape[4] * config.spatial**2 * config.time)
    pixels, caches = vae.decode_chunk(latents[:, :, :1], None)
    frames = [pixels.float()]
    for chunk in latents[:, :, 1:].split(step, dim=2):
        pixels, caches = vae.decode_chunk(chunk, caches)
        frames.append(pixels.float())
    return torch.cat(frames, dim=2)


def _blocks_at_once(pixels_of_a_block: int) -> int:
    return max(1, PIXELS_AT_ONCE // pixels_of_a_block)
