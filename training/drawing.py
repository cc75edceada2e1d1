"""Clips drawn here or by processes beside this one: a GPU learns from them faster than one core draws them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from .clips import ClipConfig, make_clip
from .log import TrainingError

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
    """What training reads of a `Clip`."""

    frames: Tensor
    low: Tensor
    prompt: str
    origin: Tensor  # float32 [T, H/f, W/f, 2]


class Drawer:
    """Draws clips over photographs: as they are asked for, on `device`, or ahead of that in `workers` processes.

    TrainingError for fewer than no processes, and where one of them is gone.
    """

    def __init__(self, photos: Photos, workers: int = 0, device: str = "cpu") -> None:
        if workers < 0:
            raise TrainingError(f"--workers: got {workers}, want 0 or more; 0 draws in this process")
        self.photos, self.device = photos, device
        self._pool = None
        if workers:
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__])  # importing torch once, not in each
            self._pool = ProcessPoolExecutor(workers, context, _start, (photos, os.getpid()))

    def ahead(self, config: ClipConfig, crops: Callable[[int], Sequence[Crop]]) -> Callable[[int], list[Drawn]]:
        """Batch `index` of clips, `crops(index)` saying which; batches are asked for in order."""
        if self._pool is None:
            return lambda index: [_draw(self.photos, config, crop, self.device) for crop in crops(index)]
        pool, under_way = self._pool, dict[int, list[Future[_Sent]]]()

        def take(index: int) -> list[Drawn]:
            try:
                for number in range(index, index + 1 + AHEAD):
                    if number not in under_way:
                        under_way[number] = [pool.submit(_send, config, crop) for crop in crops(number)]
                return [_receive(future.result()) for future in under_way.pop(index)]
            except BrokenProcessPool as error:
                want = "want all of them; use fewer --workers if memory ran out, and resume"
                raise TrainingError(f"drawing of clips: got a process that is gone, {want}") from error

        return take

    def close(self) -> None:
        """End the processes; what they had not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_Sent = tuple[np.ndarray, np.ndarray, str, np.ndarray]  # arrays: tensors would travel as files of shared memory


def _draw(photos: Photos, config: ClipConfig, crop: Crop, device: str = "cpu") -> Drawn:
    clip = make_clip(photos, crop.seed, config, crop=crop.box, device=device)
    return Drawn(clip.frames, clip.low, clip.prompt, torch.from_numpy(clip.origin))


def _start(photos: Photos, owner: int) -> None:
    """In a process that draws: Ctrl-C is for its owner alone, whose end it does not outlive."""
    global _photos  # noqa: PLW0603  # a process that draws has nothing else
    _photos = photos
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()


def _end_with(owner: int) -> None:
    while True:
        try:
            os.kill(owner, 0)  # is it there?
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a clip, which nobody waits for
        time.sleep(1)


def _send(config: ClipConfig, crop: Crop) -> _Sent:
    clip = _draw(_photos, config, crop)
    return clip.frames.numpy(), clip.low.numpy(), clip.prompt, clip.origin.numpy()


def _receive(sent: _Sent) -> Drawn:
    frames, low, prompt, origin = sent
    return Drawn(torch.from_numpy(frames), torch.from_numpy(low), prompt, torch.from_numpy(origin))
