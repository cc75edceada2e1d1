"""Attention that is shown where to look: in generated clips it is known what of the first frame each token shows.

To carry detail through a clip, a token has to find its own place in the anchor. From the error of the latents alone a
small model learns that late; a cross-entropy on the attention of a few heads teaches it directly.

Axes: B batch, T latent blocks, h and w rows and columns of tokens, S = h*w tokens of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.dit import DiT
from ..engine.vae import VAE
from .log import TrainingError


@dataclass(frozen=True)
class MatchConfig:
    """Which heads are taught, and how much: they are the first ones of each of these layers."""

    weight: float = 0.0  # of the cross-entropy in the loss; 0 = off
    layers: tuple[int, ...] = (2, 3)
    heads: int = 2
    queries: int = 128  # tokens of a sample that ask, drawn at random


class AttentionWatch:
    """Keeps the queries and keys [B, heads, L, D/heads] of a DiT's latest call, for the layers that are taught."""

    def __init__(self, dit: DiT, config: MatchConfig) -> None:
        """TrainingError for layers or heads that the DiT lacks."""
        self.config = config
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        if not config.weight:
            return
        have, heads = range(len(dit.layers)), dit.config.heads
        if not config.layers or set(config.layers) - set(have) or not 1 <= config.heads <= heads:
            raise TrainingError(
                f"matching: got layers {config.layers} and {config.heads} heads, want some of layers {have[0]} to "
                f"{have[-1]} and 1 to {heads} heads; correct them"
            )
        for layer in config.layers:
            attention = dit.layers[layer].self_attn
            attention.kernels = replace(attention.kernels, attend=self._watched(layer, attention.kernels.attend))

    def _watched(self, layer: int, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watch(q: Tensor, k: Tensor, *more: Tensor) -> Tensor:
            self.seen[layer] = (q, k)
            return attend(q, k, *more)

        return cast(Callable[..., Tensor], torch.compiler.disable(watch))  # it keeps what a compiled layer may not

    def add(
        self, loss: Tensor, places: Tensor | None, blocks: Sequence[int], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the weighted cross-entropy of the latest call's attention, and both apart where that is taught.

        places [B, T, h, w, 2] are those of the whole clip, `blocks` the ones that ask, which ended the call's window.
        TrainingError for clips of which no places are known.
        """
        if not self.config.weight:
            return loss, {}
        if places is None:
            raise TrainingError("matching: got clips without known motion, want generated ones; set its weight to 0")
        asked = places[:, list(blocks)].flatten(1, 3)  # [B, b, h, w, 2] -> [B, b*S, 2]
        tokens = asked.shape[1]
        chosen = torch.randperm(tokens, generator=generator)[: self.config.queries].to(asked.device)
        targets, weights = corners(asked[:, chosen], *places.shape[2:4])  # [B, n, 4]
        weights = weights * seen_in_first(places, targets, weights).unsqueeze(-1)
        heads, losses = self.config.heads, []
        for layer in self.config.layers:
            q, k = self.seen.pop(layer)
            losses.append(cross_entropy(q[:, :heads, -tokens:][:, :, chosen], k[:, :heads], targets, weights))
        missed = torch.stack(losses).mean()
        return loss + self.config.weight * missed, {"velocity": loss.detach(), "matching": missed.detach()}


def cross_entropy(q: Tensor, k: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Of the attention of q [B, heads, n, D] to k [B, heads, L, D] against keys `targets` [B, n, 4] of these weights.

    A mean over heads and over the queries whose weights are not 0; 0 where there are none.
    """
    with torch.autocast(q.device.type, enabled=False):  # in bf16 the gradient of a head that is right is noise
        scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5  # [B, heads, n, L]
        index = targets.unsqueeze(1).expand(-1, scores.shape[1], -1, -1)  # [B, n, 4] -> [B, heads, n, 4]
        missed = scores.logsumexp(-1, keepdim=True) - scores.gather(-1, index)  # [B, heads, n, 4]
    return (missed * weights.unsqueeze(1)).sum() / (scores.shape[1] * weights.sum().clamp(min=1))


def corners(places: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four tokens around places [..., 2], (x, y) in tokens: int64 indices and weights fp32, both [..., 4].

    The weights are bilinear, and 0 for a place that is unknown (NaN) or outside of the frame, whose edges are half a
    token from the outermost places.
    """
    limits = places.new_tensor([width - 1, height - 1])
    known = ((places >= -0.5) & (places <= limits + 0.5)).all(-1, keepdim=True)  # NaN is not
    places = places.nan_to_num().clamp(min=0).minimum(limits)
    low = places.floor().minimum((limits - 1).clamp(min=0))
    part = places - low  # [..., 2]
    x, y = low.long().unbind(-1)
    u, v = part.unbind(-1)
    across, down = int(width > 1), width * int(height > 1)
    first = y * width + x
    indices = torch.stack((first, first + across, first + down, first + across + down), -1)
    weights = torch.stack(((1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v), -1)
    return indices, weights * known


def seen_in_first(places: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Whether the first frame shows what tokens look for there, and no object before it: bool [B, n].

    places [B, T, h, w, 2], NaN where an object is; targets and weights [B, n, 4] as `corners` gives them.
    """
    object_there = places[:, 0].isnan().any(-1).flatten(1)  # [B, h, w, 2] -> [B, S]
    at_targets = object_there.gather(1, targets.flatten(1)).view_as(targets)  # [B, n, 4]
    return ~(at_targets & (weights > 0)).any(-1)


def stage_places(origin: Tensor | None, pixels: Tensor, vae: VAE) -> Tensor | None:
    """Places [B, T, h, w, 2] of the tokens of a DiT that reads latents of `pixels` [B, 3, T', H, W]; see token_places.

    origin [B, T', H', W', 2] is in pixels of the low resolution.
    """
    if origin is None:
        return None
    side = 2 * vae.config.spatial * origin.shape[3] // pixels.shape[4]
    return token_places(origin, side, vae.config.time)


def token_places(moved: Tensor, side: int, time: int) -> Tensor:
    """Where in the first frame each token's content was: fp32 [B, T, h, w, 2], (x, y) in tokens.

    moved [B, 1+time*k, H, W, 2] is how far back it was in pixels, NaN where unknown; a token is `side` pixels wide and,
    but for the first block's, `time` frames long.
    """
    volume = moved.movedim(-1, 1)  # [B, frames, H, W, 2] -> [B, 2, frames, H, W]
    first = F.avg_pool3d(volume[:, :, :1], (1, side, side))
    mean = torch.cat((first, F.avg_pool3d(volume[:, :, 1:], (time, side, side))), dim=2) / side  # [B, 2, T, h, w]
    rows, columns = (torch.arange(n, device=moved.device) for n in mean.shape[3:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return (mean + torch.stack((x, y))[None, :, None]).movedim(1, -1)  # -> [B, T, h, w, 2]
