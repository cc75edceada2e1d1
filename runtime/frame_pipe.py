"""Frames as a raw stream (YUV4MPEG2, "y4m") that ffmpeg, x264 and mpv read from a pipe."""

from fractions import Fraction
from typing import BinaryIO, Literal

import numpy as np

from ..engine.errors import MediaError
from .image import reason
from .video import frame_rate, to_yuv

Chroma = Literal["420", "444"]
# The scaler averages the pixels that share a sample, which is where `420jpeg` says that samples sit.
TAGS: dict[Chroma, str] = {"420": "C420jpeg XYSCSS=420JPEG", "444": "C444 XYSCSS=444"}


class PipeWriter:
    """Writes frames to a binary stream as y4m, 8-bit BT.709 limited range. Raises MediaError when nobody reads."""

    def __init__(self, stream: BinaryIO, width: int, height: int, fps: float | Fraction, chroma: Chroma = "420"):
        """The header goes out with the first frames, so a run that fails before them writes nothing."""
        rate = frame_rate(fps)
        self._stream = stream
        self._format = f"yuv{chroma}p"
        # y4m has no tag for the matrix. Readers take BT.709 for HD sizes or as told.
        self._header = (
            f"YUV4MPEG2 W{width} H{height} F{rate.numerator}:{rate.denominator} Ip A1:1 "
            f"{TAGS[chroma]} XCOLORRANGE=LIMITED\n"
        ).encode()

    def write(self, frames: np.ndarray) -> None:
        """Append frames, uint8 [n, H, W, 3]."""
        try:
            for frame in frames:
                self._stream.write(self._header)
                self._header = b""
                self._stream.write(b"FRAME\n")
                for plane in to_yuv(frame, self._format).planes:
                    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
                    self._stream.write(rows[:, : plane.width].tobytes())  # lines are padded in memory
            self._stream.flush()
        except OSError as error:
            raise MediaError(
                f"pipe: got '{reason(error)}', want a reader until the end; check what reads it"
            ) from error
