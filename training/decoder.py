"""The decoder of a finished VAE, trained on latents as Stage II makes them: it mends what few steps leave undone.

The encoder stays, and so do the latents that DiTs were trained on. A causal decoder remembers the frames before, so it
learns to carry their detail on where the latents lack it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.segments import plan_segments
from ..engine.vae import VAE
from .flow import ClipBatch, encode_clip
from .stage1 import encode_prompts
from .stage2 import Stage2Config, Stage2Task, stage2_batch
from .trainer import step_seed
from .transition import StageOne
from .vae import VaeLoss, reconstruct, vae_loss

Sample = tuple[Tensor, Tensor]  # latents [1, z, 1+k, h, w] and their pixels [1, 3, 1+4k, H, W]


@dataclass(frozen=True)
class DecoderConfig:
    """How Stage II is run, how often its latents take the truth's place, and the side of a piece in cells."""

    stage2: Stage2Config
    made: float = 0.7
    side: int = 12
    loss: VaeLoss = field(default_factory=lambda: VaeLoss(kl=0.0))


@torch.no_grad()
def decoder_samples(
    one: StageOne, dit: DiT, vae: VAE, clips: ClipBatch, config: DecoderConfig, seed: int
) -> list[Sample]:
    """Clips as Stage II makes them from references after transition, for a share, or as the VAE encodes them."""
    generator = torch.Generator().manual_seed(step_seed(seed, "made"))
    latents = encode_clip(vae, clips.high)
    taken = (torch.rand(len(latents), generator=generator) < config.made).nonzero().flatten().tolist()
    if taken:
        some = ClipBatch(clips.high[taken], clips.low[taken], [str(clips.prompts[i]) for i in taken])
        batch = stage2_batch(one, vae, some, config.stage2.transition, seed)
        task = Stage2Task(dit, one.words, lambda *_: batch, config.stage2)
        text, made = encode_prompts(one.words, list(some.prompts), latents.device), batch.latents
        for segment in plan_segments(made.shape[2]):  # each on what the DiT made before
            made = task.with_own_output(made, batch.channels, text, segment, generator)
        latents[taken] = made
    return list(zip(latents.half().split(1), clips.high.half().split(1), strict=True))


class DecoderTask:
    """Trains what of a finished VAE requires gradients; `batch` gives latents and the pixels they stand for."""

    def __init__(
        self, vae: VAE, batch: Callable[[int, int], Sequence[Sample]], config: DecoderConfig, **settings: Any
    ) -> None:
        self.vae, self.batch, self.config = vae, batch, config
        self.modules: dict[str, nn.Module] = {"vae": vae}
        self.settings = {"kind": "decoder", "vae": asdict(vae.config), "config": asdict(config), **settings}

    def loss(self, step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of pieces of one batch, and its terms."""
        draws = torch.Generator().manual_seed(step_seed(seed, "pieces"))
        pieces = [_piece(*sample, self.config.side, draws) for sample in self.batch(step, seed)]
        latents, video = (torch.cat(part) for part in zip(*pieces, strict=True))
        vae = self.vae
        pixels = reconstruct(vae, latents * vae.std + vae.mean)
        none = latents.new_zeros(1)
        total, parts = vae_loss(pixels, video, none, none, self.config.loss)
        return total, {name: part.detach() for name, part in parts.items()}


def _piece(latents: Tensor, video: Tensor, side: int, draws: torch.Generator) -> Sample:
    """A square of `side` cells from anywhere, from the clip's first frame on."""
    scale = video.shape[3] // latents.shape[3]
    y, x = (int(torch.randint(max(1, n - side + 1), (), generator=draws)) for n in latents.shape[3:])
    pixels = video[:, :, :, y * scale : (y + side) * scale, x * scale : (x + side) * scale]
    return latents[:, :, :, y : y + side, x : x + side].float(), pixels.float()
