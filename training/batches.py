"""Batches for the tasks: crops of generated clips, a pure function of (step, seed), made ahead on a thread.

Axes: B batch, T frames, H rows, W columns.
"""

import atexit
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .clips import ClipConfig
from .drawing import Crop, Drawer, Drawn, Photos
from .flow import ClipBatch, LatentBatch
from .trainer import TrainConfig, autocast, step_seed

Made = TypeVar("Made")
POOL_AHEAD = 50  # steps for which a pool makes samples before they are asked for


@dataclass(frozen=True)
class Crops:
    """What a batch is cut from: `count` clips of `width` x `height` pixels, at places drawn over the whole picture."""

    count: int
    width: int
    height: int

    def places(self, config: ClipConfig, seed: int) -> list[Crop]:
        """Where each clip of a batch is cut, and the seed it is drawn from."""
        draws = torch.Generator().manual_seed(step_seed(seed, "places"))
        crops = []
        for index in range(self.count):
            x, y = (
                config.low_factor * int(torch.randint((whole - part) // config.low_factor + 1, (), generator=draws))
                for whole, part in ((config.width, self.width), (config.height, self.height))
            )
            crops.append(Crop(step_seed(seed, "clip", index), (x, y, self.width, self.height)))
        return crops


def clip_batch(clips: Sequence[Drawn], device: str) -> ClipBatch:
    """Drawn clips as one batch: high [B, 3, T, H, W] and low [B, 3, T, H/f, W/f] in [-1, 1], with prompts."""
    high = torch.stack([_pixels(clip.frames.to(device)) for clip in clips])
    low = torch.stack([_pixels(clip.low.to(device)) for clip in clips])
    origin = torch.stack([clip.origin.to(device) for clip in clips])
    return ClipBatch(high, low, [clip.prompt for clip in clips], origin)


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
    """Samples made once, in order, on a thread, and used `reuse` times on average: making one costs more than a step.

    `make(index)` gives a group of `group` samples, as a GPU makes many at once. Step s draws `count` of a window of
    `window` samples that moves on by `share * count / reuse` a step, `share` being how many of the steps draw from this
    pool. The first steps draw from fewer groups, one more at each, so that none waits for a whole window. What is drawn
    is a function of (step, seed): a resumed run makes the window's groups again and draws the same. Nothing is made for
    steps beyond `steps`.
    """

    def __init__(
        self, make: Callable[[int], Sequence[Made]], count: int, window: int, reuse: float, steps: int,
        share: float = 1.0, group: int = 1,
    ) -> None:  # fmt: skip
        self._make, self._count, self._steps, self._group = make, count, steps, group
        self._window = max(1, window // group)  # in groups, as everything below
        self._pace = share * count / reuse / group
        self._changed = threading.Condition()
        self._wanted = range(0)
        self._made: dict[int, Sequence[Made]] = {}
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def window(self, step: int) -> range:
        """The groups that step `step` draws from."""
        step = min(step, self._steps - 1)
        start = int(step * self._pace)
        return range(start, start + min(self._window, 2 + step))

    def __call__(self, step: int, seed: int) -> list[Made]:
        now, later = self.window(step), self.window(step + POOL_AHEAD)
        draws = torch.Generator().manual_seed(step_seed(seed, "pool"))
        drawn = torch.randint(len(now) * self._group, (self._count,), generator=draws).tolist()
        chosen = [(now[i // self._group], i % self._group) for i in drawn]
        with self._changed:
            self._wanted = range(now.start, later.stop)
            self._made = {index: made for index, made in self._made.items() if index >= now.start}
            if self._thread is None:
                # What is still to be made must not hold up the end, and a thread must not be torn down at work.
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure or all(index in self._made for index, _ in chosen))
            if self._failure is not None:
                raise self._failure
            return [self._made[index][member] for index, member in chosen]

    def close(self) -> None:
        """Stop making samples, once the one at work is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or any(index not in self._made for index in self._wanted))
                if self._closed:
                    return
                index = next(index for index in self._wanted if index not in self._made)
            try:
                made = self._make(index)
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._made[index] = made
                self._changed.notify_all()


@dataclass(frozen=True)
class Samples:
    """A pool of samples cut to one size, and its share of the steps."""

    crops: Crops  # count: how many a step takes
    window: int  # how many a step chooses from
    reuse: float  # how often each is used, on average
    share: float = 1.0
    group: int = 1  # how many are made at once


def sample_pool(
    drawer: Drawer,
    config: ClipConfig,
    item: Samples,
    train: TrainConfig,
    learn: Callable[[ClipBatch, int], Sequence[Made]],
    *names: int | str,
) -> Pool[Made]:
    """A pool of what `learn(clips, seed)` makes of the clips of a group; `names` tell its seeds from others'."""
    crops = replace(item.crops, count=item.group)

    def places(index: int) -> list[Crop]:
        return crops.places(config, step_seed(train.seed, *names, index))

    clips = drawer.ahead(config, places)

    def make(index: int) -> Sequence[Made]:
        with autocast(train):
            return learn(clip_batch(clips(index), train.device), step_seed(train.seed, *names, index))

    return Pool(make, item.crops.count, item.window, item.reuse, train.steps, item.share, item.group)


def latent_pool(
    drawer: Drawer,
    config: ClipConfig,
    item: Samples,
    train: TrainConfig,
    learn: Callable[[ClipBatch, int], LatentBatch],
    keep: str,
    *names: int | str,
) -> Callable[[int, int], LatentBatch]:
    """Batches from a pool of encoded clips; `learn(clips, seed)` encodes a group, the device `keep` holds it."""
    drawn = sample_pool(drawer, config, item, train, lambda clips, seed: stored(learn(clips, seed), keep), *names)
    return lambda step, seed: joined(drawn(step, seed), train.device)


def stored(batch: LatentBatch, device: str) -> list[LatentBatch]:
    """The samples of a batch as a pool keeps them: in half precision; image tokens in fp32, as CLIP's have outliers."""
    latents, channels = batch.latents.half().to(device), batch.channels.half().to(device)
    tokens = None if batch.image_tokens is None else batch.image_tokens.float().to(device)
    places = None if batch.places is None else batch.places.to(device)

    def one(i: int) -> LatentBatch:
        known = (None if value is None else value[i : i + 1] for value in (tokens, places))
        return LatentBatch(latents[i : i + 1], channels[i : i + 1], [batch.prompts[i]], *known)

    return [one(i) for i in range(len(batch.prompts))]


def joined(samples: Sequence[LatentBatch], device: str) -> LatentBatch:
    """Stored samples of one size as one batch, fp32."""
    tokens = [sample.image_tokens.to(device) for sample in samples if sample.image_tokens is not None]
    places = [sample.places.to(device) for sample in samples if sample.places is not None]
    return LatentBatch(
        torch.cat([sample.latents.to(device).float() for sample in samples]),
        torch.cat([sample.channels.to(device).float() for sample in samples]),
        [prompt for sample in samples for prompt in sample.prompts],
        torch.cat(tokens) if tokens else None,
        torch.cat(places) if places else None,
    )


def photos_hash(photos: Photos) -> str:
    """SHA-256 (hex) of photographs, for the identity of a training."""
    digest = hashlib.sha256()
    for photo in photos:
        digest.update(f"{photo.shape}".encode())
        digest.update(photo.tobytes())
    return digest.hexdigest()


def mixed(batches: Sequence[Callable[[int, int], Made]], shares: Sequence[float]) -> Callable[[int, int], Made]:
    """One of several batch callables at each step, by these shares."""

    def make(step: int, seed: int) -> Made:
        draws = torch.Generator().manual_seed(step_seed(seed, "mixed"))
        return batches[int(torch.multinomial(torch.tensor(shares), 1, generator=draws))](step, seed)

    return make


def _pixels(frames: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] -> fp32 [3, T, H, W] in [-1, 1]."""
    return frames.permute(3, 0, 1, 2).float().div_(127.5).sub_(1)  # [T, H, W, 3] -> [3, T, H, W]
