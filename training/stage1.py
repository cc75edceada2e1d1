"""Stage I: flow matching on low-resolution latents, conditioned on the first frame and the prompt."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.text import WordEncoder
from ..engine.vae import VAE
from .flow import ClipBatch, LatentBatch, NoiseLevels, dit_velocity, encode_clip, noised
from .matching import AttentionWatch, MatchConfig, stage_places
from .trainer import Parts


@dataclass(frozen=True)
class Stage1Config:
    """Noise levels, and how often a prompt is left empty (which is what guidance needs)."""

    levels: NoiseLevels = field(default_factory=NoiseLevels)
    drop_prompt: float = 0.1
    matching: MatchConfig = field(default_factory=MatchConfig)


def first_frame_condition(vae: VAE, low: Tensor) -> Tensor:
    """Mask and latents [B, 4+z, T, h, w] of the first frame and then mid-grey, from clips low [B, 3, T', H, W]."""
    still = torch.cat((low[:, :, :1], torch.zeros_like(low[:, :, 1:])), dim=2)
    latents = encode_clip(vae, still)
    mask = latents.new_zeros(latents.shape[0], 4, *latents.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat((mask, latents), dim=1)


class FixedText(nn.Module):
    """Ready embeddings [1, L, D] of one prompt, in place of a text encoder that is not at hand."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """One empty row for each prompt: what they say is not read."""
        return torch.empty(len(prompts), 0, dtype=torch.int64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rows.expand(len(tokens), -1, -1)


TextEncoder = WordEncoder | FixedText


def encode_prompts(words: TextEncoder, prompts: list[str], device: torch.device) -> Tensor:
    """Text rows [B, text_len, D]; gradients reach the encoder."""
    return words(words.tokenize(prompts).to(device))


class ImageEncoder(Protocol):
    """The CLIP tower of a Stage I that reads image tokens; equal fingerprints mean equal results."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, image: Tensor) -> Tensor:
        """Pixels [1, 3, 1, H, W] in [-1, 1] -> tokens fp32 [1, n, image_dim]."""
        ...


@torch.no_grad()
def first_frame_tokens(images: ImageEncoder | None, high: Tensor) -> Tensor | None:
    """Tokens fp32 [B, n, image_dim] of the first frames of clips high [B, 3, T, H, W]; None without an encoder."""
    if images is None:
        return None
    with torch.autocast(high.device.type, enabled=False):  # as at inference
        return torch.cat([images.encode(frame) for frame in high[:, :, :1].split(1)])


@torch.no_grad()
def stage1_batch(vae: VAE, clips: ClipBatch, images: ImageEncoder | None = None) -> LatentBatch:
    """What Stage I learns from these clips, by its finished VAE and, where it reads image tokens, their encoder."""
    condition, tokens = first_frame_condition(vae, clips.low), first_frame_tokens(images, clips.high)
    places = stage_places(clips.origin, clips.low, vae)
    return LatentBatch(encode_clip(vae, clips.low), condition, clips.prompts, tokens, places)


class Stage1Task:
    """Trains a DiT with image channels and the word encoder together."""

    def __init__(
        self,
        dit: DiT,
        words: TextEncoder,
        batch: Callable[[int, int], LatentBatch],
        config: Stage1Config | None = None,
        **settings: Any,
    ) -> None:
        """`batch(step, seed)` gives the samples of a step; equal arguments give equal ones."""
        self.dit, self.words, self.batch = dit, words, batch
        self.config = config or Stage1Config()
        self.watch = AttentionWatch(dit, self.config.matching)
        self.settings = {"kind": "stage1", "config": asdict(self.config), **settings}  # what a resumed run must share

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"stage1": self.dit, "text": self.words}

    def loss(self, step: int, seed: int) -> tuple[Tensor, Parts]:
        """Mean squared error of the velocity, over all blocks."""
        samples = self.batch(step, seed)
        generator = torch.Generator().manual_seed(seed)
        latents, count = samples.latents, samples.latents.shape[0]
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        sigma = self.config.levels.draw(count, generator)
        kept = torch.rand(count, generator=generator) >= self.config.drop_prompt
        prompts = [prompt if keep else "" for prompt, keep in zip(samples.prompts, kept.tolist(), strict=True)]
        x = torch.cat((noised(latents, noise, sigma), samples.channels), dim=1)  # [B, z + 4+z, T, h, w]
        text = encode_prompts(self.words, prompts, latents.device)
        velocity = dit_velocity(self.dit, x, sigma, text, image_tokens=samples.image_tokens)
        loss = F.mse_loss(velocity, noise - latents)
        loss, parts = self.watch.add(loss, samples.places, range(1, latents.shape[2]), generator)
        return loss, {"sigma": sigma.mean().item(), **parts}
