"""From pixels on the device to frames on the host. A GPU's go to page-locked memory, on a stream of their own."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..engine.errors import NumericsError
from ..kernels.pixels import to_bytes_eager

ToBytes = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Copying:
    """Frames on their way to the host; `done` is None where they are there already."""

    segment: int
    frames: Tensor  # uint8 [n, H, W, 3]
    deep: Tensor | None  # fp32 [n, H, W, 3]
    broken: Tensor  # int32 [2]: 1 where latents, pixels are not finite
    done: torch.cuda.Event | None

    def wait(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The frames and the deep ones, once they are there. NumericsError where values were not finite."""
        if self.done is not None:
            self.done.synchronize()
        for broken, what in zip(self.broken.tolist(), ("latents", "pixels"), strict=True):
            if broken:
                raise NumericsError(
                    f"segment {self.segment}: got {what} that are not finite, want numbers; "
                    "check the weights, or run in a wider dtype such as float32"
                )
        return self.frames.numpy(), None if self.deep is None else self.deep.numpy()


class FrameCopier:
    """Makes frames of a session's pixels and starts their way to the host, beside what the device does next."""

    def __init__(self, device: torch.device, to_bytes: ToBytes = to_bytes_eager) -> None:
        self._to_bytes = to_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, pixels: Tensor, latents: Tensor, segment: int, deep: bool) -> Copying:
        """pixels [1, 3, n, H, W] in [-1, 1]; the latents they were decoded from are asked whether they are finite.

        Nothing here waits for the device.
        """
        frames, broken = self._to_bytes(pixels, 1)  # [1, n, H, W, 3], [1]
        broken = torch.cat(((~torch.isfinite(latents).all()).to(torch.int32).view(1), broken))
        parts = [frames[0], broken, *([deep_frames(pixels)] if deep else [])]
        done = None
        if self._stream is not None:
            parts, done = self._leave(parts, self._stream)
        return Copying(segment, parts[0], parts[2] if deep else None, parts[1], done)

    def _leave(self, parts: list[Tensor], stream: torch.cuda.Stream) -> tuple[list[Tensor], torch.cuda.Event]:
        """Copies in page-locked host memory, and the event after the last of them."""
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        hosts = []
        with torch.cuda.stream(stream):
            for part in parts:
                host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
                hosts.append(host.copy_(part, non_blocking=True))
                part.record_stream(stream)  # its memory is free for others only after the copy
            done = torch.cuda.Event(blocking=True)  # who waits leaves the core to the thread that launches
            done.record(stream)
        return hosts, done


def deep_frames(pixels: Tensor) -> Tensor:
    """The frames without rounding. pixels [1, 3, n, H, W] in [-1, 1] -> fp32 [n, H, W, 3] in [0, 1]."""
    levels = pixels[0].float().add(1).mul_(0.5).clamp_(0, 1)  # [3, n, H, W]
    return levels.permute(1, 2, 3, 0).contiguous()  # [n, H, W, 3]
