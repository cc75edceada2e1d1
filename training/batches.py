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
    frames: int | None = None  # consecutive ones, from anywhere in the clip; None = the whole clip
    cuts: int = 1  # how often `frames` are cut out of each clip


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
    """Stretches of `crops.frames` frames, [B * cuts, 3, T, H, W] in [-1, 1]; `low` takes the low-resolution ones."""
    length = crops.frames or config.frames

    def make(_step: int, seed: int) -> Tensor:
        draws = torch.Generator().manual_seed(step_seed(seed, "cuts"))
        stretches = []
        for clip in _clips(photos, config, crops, seed, device):
            pixels = _pixels(clip.low if low else clip.frames)
            for start in torch.randint(config.frames - length + 1, (crops.cuts,), generator=draws).tolist():
                stretches.append(pixels[:, start : start + length])
        return torch.stack(stretches)

    return make


class Ahead(Generic[Made]):
    """A batch callable that makes the next step's batch on a thread while this one is used."""

    def __init__(self, make: Callable[[int, int], Made], run_seed: int) -> None:
        self._make, self._run_seed = make, run_seed
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[tuple[int, int], Future[Made]] | None = None

    def __call__(self, step: int, seed: int) -> Made:
        ready, self._next = self._next, None
        made = ready[1].result() if ready and ready[0] == (step, seed) else self._make(step, seed)
        after = (step + 1, step_seed(self._run_seed, step + 1))
        self._next = (after, self._pool.submit(self._make, *after))
        return made


class Pool:
    """Samples made once, in order, on a thread, and used `reuse` times on average.

    Step s draws `count` of the first `first + s * count / reuse`: a function of (step, seed), so that a resumed run
    draws the same, and makes again what it draws. Making a sample costs more than a training step on it.
    """

    def __init__(self, make: Callable[[int], LatentBatch], count: int, first: int, reuse: float) -> None:
        self._make, self._count, self._first, self._reuse = make, count, first, reuse
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._made: list[Future[LatentBatch]] = []

    def size(self, step: int) -> int:
        """How many samples step `step` draws from."""
        return self._first + int(step * self._count / self._reuse)

    def __call__(self, step: int, seed: int) -> LatentBatch:
        for index in range(len(self._made), self.size(step + POOL_AHEAD)):
            self._made.append(self._thread.submit(self._make, index))
        draws = torch.Generator().manual_seed(step_seed(seed, "pool"))
        chosen = torch.randint(self.size(step), (self._count,), generator=draws).tolist()
        samples = [self._made[index].result() for index in chosen]
        return LatentBatch(
            torch.cat([sample.latents for sample in samples]),
            torch.cat([sample.channels for sample in samples]),
            [prompt for sample in samples for prompt in sample.prompts],
        )

    def close(self) -> None:
        """Stop making samples."""
        self._thread.shutdown(wait=False, cancel_futures=True)


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
