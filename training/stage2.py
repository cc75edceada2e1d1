"""Stage II on the windows of segment-wise generation: clean conditioning blocks, loss on the noisy ones alone."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.segments import Segment, plan_segments
from ..engine.vae import VAE
from .flow import ClipBatch, LatentBatch, NoiseLevels, dit_velocity, encode_clip, few_steps, noised
from .matching import AttentionWatch, MatchConfig, stage_places
from .stage1 import TextEncoder, encode_prompts
from .trainer import Parts
from .transition import StageOne, TransitionConfig, hybrid_reference, transit


@dataclass(frozen=True)
class Stage2Config:
    """Windows, noise levels, and how often the context is the model's own output rather than the truth."""

    levels: NoiseLevels = field(default_factory=NoiseLevels)
    transition: TransitionConfig = field(default_factory=TransitionConfig)
    noisy: tuple[int, ...] = (3, 3, 3, 2, 4)  # M is drawn from these
    neighbours: tuple[int, ...] = (1, 1, 1, 0, 2)  # N is drawn from these
    own_context: float = 0.25
    matching: MatchConfig = field(default_factory=MatchConfig)


@torch.no_grad()
def stage2_batch(stage1: StageOne, vae: VAE, clips: ClipBatch, transition: TransitionConfig, seed: int) -> LatentBatch:
    """What Stage II learns from these clips: references made by stage transition with the finished first stage."""
    low = transit(stage1, clips, transition, torch.Generator().manual_seed(seed))
    reference, places = hybrid_reference(vae, low, clips.high), stage_places(clips.origin, clips.high, vae)
    return LatentBatch(encode_clip(vae, clips.high), reference, clips.prompts, places=places)


class Stage2Task:
    """Trains the second DiT; the word encoder is finished and stays as it is."""

    def __init__(
        self,
        dit: DiT,
        words: TextEncoder,
        batch: Callable[[int, int], LatentBatch],
        config: Stage2Config | None = None,
        **settings: Any,
    ) -> None:
        """`batch(step, seed)` gives the samples of a step; equal arguments give equal ones."""
        self.dit, self.words, self.batch = dit, words.requires_grad_(False).eval(), batch
        self.config = config or Stage2Config()
        self.watch = AttentionWatch(dit, self.config.matching)
        self.settings = {"kind": "stage2", "config": asdict(self.config), **settings}  # what a resumed run must share

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"stage2": self.dit}

    def loss(self, step: int, seed: int) -> tuple[Tensor, Parts]:
        """Mean squared error of the velocity of the noisy blocks of one random window."""
        samples, config = self.batch(step, seed), self.config
        generator = torch.Generator().manual_seed(seed)
        latents, reference = samples.latents, samples.channels
        text = encode_prompts(self.words, list(samples.prompts), latents.device)
        segments = draw_plan(latents.shape[2], config, generator)
        segment = segments[int(torch.randint(len(segments), (), generator=generator))]
        context = latents
        if segment.context and torch.rand((), generator=generator) < config.own_context:
            context = self.with_own_output(latents, reference, text, segments[segment.index - 1], generator)
        noise = torch.randn(latents[:, :, list(segment.noisy)].shape, generator=generator).to(latents.device)
        sigma = config.levels.draw(latents.shape[0], generator)
        target = latents[:, :, list(segment.noisy)]
        x = noised(target, noise, sigma)
        velocity = self.window_velocity(context, reference, text, segment, x, sigma)
        loss = F.mse_loss(velocity, noise - target)
        loss, parts = self.watch.add(loss, samples.places, segment.noisy, generator)
        return loss, {"sigma": sigma.mean().item(), "segment": float(segment.index), **parts}

    def window_velocity(
        self, clean: Tensor, reference: Tensor, text: Tensor, segment: Segment, x: Tensor, sigma: Tensor
    ) -> Tensor:
        """Velocity [B, z, m, H, W] of a window's noisy blocks x; clean latents and reference are those of the clip."""
        conditioning = clean[:, :, [segment.anchor, *segment.context]]  # [B, z, 1+context, H, W]
        window = torch.cat((conditioning, x), dim=2)
        window = torch.cat((window, reference[:, :, list(segment.window)]), dim=1)  # [B, 2z, T, H, W]
        return dit_velocity(self.dit, window, sigma, text, segment.clean, segment.window)[:, :, segment.clean :]

    @torch.no_grad()
    def with_own_output(
        self, latents: Tensor, reference: Tensor, text: Tensor, before: Segment, generator: torch.Generator
    ) -> Tensor:
        """The clip's latents with the blocks of the segment before made by the model, from true context of its own."""
        levels = self.config.levels
        noise = torch.randn(latents[:, :, list(before.noisy)].shape, generator=generator).to(latents.device)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self.window_velocity(latents, reference, text, before, x, sigma)

        made = few_steps(velocity, noise, torch.ones(len(noise)), levels.steps, levels.shift)
        mixed = latents.clone()
        mixed[:, :, list(before.noisy)] = made
        return mixed


def draw_plan(blocks: int, config: Stage2Config, generator: torch.Generator) -> tuple[Segment, ...]:
    """Segments of a clip with M and N drawn from the configuration, kept to what the clip's length allows."""
    noisy = config.noisy[int(torch.randint(len(config.noisy), (), generator=generator))]
    neighbours = config.neighbours[int(torch.randint(len(config.neighbours), (), generator=generator))]
    noisy = min(noisy, blocks - 1)
    short = (blocks - 1 - noisy) % noisy or noisy
    return plan_segments(blocks, noisy, min(neighbours, short if blocks <= 1 + 2 * noisy else noisy))
