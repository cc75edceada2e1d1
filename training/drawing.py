"""Clips drawn here or by processes beside this one: a GPU learns from them faster than one core draws them."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from .clips import ClipConfig, make_clip

Photos = Sequence[np.ndarray]
AHEAD = 3  # batches of clips that are being drawn before they are asked for
_photos: Photos = ()  # of a process that draws


@dataclass(frozen=True)
class Crop:
    """One clip to draw: its seed, and (x, y, width, height) of the part that is drawn."""

    seed: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Drawn:
    """What training reads of a clip: uint8 frames [T, H, W, 3] and low [T, H/f, W/f, 3], and the prompt."""

    frames: Tensor
    low: Tensor
    prompt: str


class Drawer:
    """Draws clips over photographs: as they are asked for, or ahead of that in `workers` processes."""

    def __init__(self, photos: Photos, workers: int = 0) -> None:
        self.photos = photos
        self._pool = None
        if workers:
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__])  # importing torch once, not in each
            self._pool = ProcessPoolExecutor(workers, context, _start, (photos,))
            self._pool.submit(int)  # they start now, not when the first clip is asked for

    def ahead(self, config: ClipConfig, crops: Callable[[int], Sequence[Crop]]) -> Callable[[int], list[Drawn]]:
        """Batch `index` of clips, `crops(index)` saying which; batches are asked for in order."""
        if self._pool is None:
            return lambda index: [_draw(self.photos, config, crop) for crop in crops(index)]
        pool, under_way = self._pool, dict[int, list[Future[_Sent]]]()

        def take(index: int) -> list[Drawn]:
            for number in range(index, index + 1 + AHEAD):
                if number not in under_way:
                    under_way[number] = [pool.submit(_send, config, crop) for crop in crops(number)]
            return [_receive(future.result()) for future in under_way.pop(index)]

        return take

    def close(self) -> None:
        """End the processes; what they had not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_Sent = tuple[np.ndarray, np.ndarray, str]


def _draw(photos: Photos, config: ClipConfig, crop: Crop) -> Drawn:
    clip = make_clip(photos, crop.seed, config, crop=crop.box)
    return Drawn(clip.frames, clip.low, clip.prompt)


def _start(photos: Photos) -> None:
    global _photos  # noqa: PLW0603  # a process that draws has nothing else
    _photos = photos
    torch.set_num_threads(1)


def _send(config: ClipConfig, crop: Crop) -> _Sent:
    clip = _draw(_photos, config, crop)
    return clip.frames.numpy(), clip.low.numpy(), clip.prompt


def _receive(sent: _Sent) -> Drawn:
    frames, low, prompt = sent
    return Drawn(torch.from_numpy(frames), torch.from_numpy(low), prompt)
