"""Batches for the tasks: crops of generated clips, a pure function of (step, seed), made ahead on a thread.

Axes: B batch, T frames, H rows, W columns.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from .clips import Clip, ClipConfig, make_clip
from .flow import ClipBatch, LatentBatch
from .trainer import step_seed

Made = TypeVar("Made")
Photos = Sequence[np.ndarray]
POOL_AHEAD = 50  # steps for which a pool makes samples before they are asked for


@dataclass(frozen=True)
class Crops:
    """What a batch is cut from: `count` clips of `width` x `height` pixels, at places drawn over the whole picture."""

    count: int
    width: int
    height: int


def clip_batch(photos: Photos, config: ClipConfig, crops: Crops, device: str) -> Callable[[int, int], ClipBatch]:
    """Whole clips with prompts: high [B, 3, T, H, W] and low [B, 3, T, H/f, W/f] in [-1, 1]."""

    def make(_step: int, seed: int) -> ClipBatch:
        clips = _clips(photos, config, crops, seed, device)
        high = torch.stack([_pixels(clip.frames) for clip in clips])
        low = torch.stack([_pixels(clip.low) for clip in clips])
        return ClipBatch(high, low, [clip.prompt for clip in clips])

    return make


def video_batch(
    photos: Photos, config: ClipConfig, crops: Crops, device: str, *, low: bool = False
) -> Callable[[int, int], Tensor]:
    """Clips [B, 3, T, H, W] in [-1, 1]; `low` takes the low-resolution ones."""

    def make(_step: int, seed: int) -> Tensor:
        return torch.stack([_pixels(c.low if low else c.frames) for c in _clips(photos, config, crops, seed, device)])

    return make


@dataclass(frozen=True)
class Cuts:
    """Pieces of clips: `count` of them, `side` x `side` pixels of `frames` frames, from anywhere in a clip."""

    count: int
    side: int
    frames: int

    def take(self, clips: Sequence[Tensor], seed: int) -> Tensor:
        """One piece of each clip [1, 3, T, H, W] -> [B, 3, frames, side, side]."""
        draws = torch.Generator().manual_seed(step_seed(seed, "cuts"))
        pieces = []
        for clip in clips:
            length = (self.frames, self.side, self.side)
            t, y, x = (
                int(torch.randint(whole - part + 1, (), generator=draws))
                for whole, part in zip(clip.shape[2:], length, strict=True)
            )
            pieces.append(clip[:, :, t : t + self.frames, y : y + self.side, x : x + self.side].float())
        return torch.cat(pieces)


class Pool(Generic[Made]):
    """Samples made once, in order, on a thread, and used `reuse` times on average.

    Step s draws `count` of the first `first + s * count / reuse`: a function of (step, seed), so that a resumed run
    draws the same, and makes again what it draws. Making a sample costs more than a training step on it.
    """

    def __init__(self, make: Callable[[int], Made], count: int, first: int, reuse: float) -> None:
        self._make, self._count, self._first, self._reuse = make, count, first, reuse
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._made: list[Future[Made]] = []

    def size(self, step: int) -> int:
        """How many samples step `step` draws from."""
        return self._first + int(step * self._count / self._reuse)

    def __call__(self, step: int, seed: int) -> list[Made]:
        for index in range(len(self._made), self.size(step + POOL_AHEAD)):
            self._made.append(self._thread.submit(self._make, index))
        draws = torch.Generator().manual_seed(step_seed(seed, "pool"))
        chosen = torch.randint(self.size(step), (self._count,), generator=draws).tolist()
        return [self._made[index].result() for index in chosen]

    def close(self) -> None:
        """Stop making samples."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def joined(samples: Sequence[LatentBatch]) -> LatentBatch:
    """Samples of one size as one batch."""
    return LatentBatch(
        torch.cat([sample.latents for sample in samples]),
        torch.cat([sample.channels for sample in samples]),
        [prompt for sample in samples for prompt in sample.prompts],
    )


def mixed(batches: Sequence[Callable[[int, int], Made]], shares: Sequence[float]) -> Callable[[int, int], Made]:
    """One of several batch callables at each step, by these shares."""

    def make(step: int, seed: int) -> Made:
        draws = torch.Generator().manual_seed(step_seed(seed, "mixed"))
        return batches[int(torch.multinomial(torch.tensor(shares), 1, generator=draws))](step, seed)

    return make


def _clips(photos: Photos, config: ClipConfig, crops: Crops, seed: int, device: str) -> list[Clip]:
    places = torch.Generator().manual_seed(step_seed(seed, "places"))
    clips = []
    for index in range(crops.count):
        x, y = (
            config.low_factor * int(torch.randint((whole - part) // config.low_factor + 1, (), generator=places))
            for whole, part in ((config.width, crops.width), (config.height, crops.height))
        )
        crop = (x, y, crops.width, crops.height)
        clips.append(make_clip(photos, step_seed(seed, "clip", index), config, crop=crop, device=device))
    return clips


def _pixels(frames: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] -> fp32 [3, T, H, W] in [-1, 1]."""
    return frames.permute(3, 0, 1, 2).float().div_(127.5).sub_(1)  # [T, H, W, 3] -> [3, T, H, W]
