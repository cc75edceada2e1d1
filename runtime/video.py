"""Writing frames to an H.264 MP4 file while they arrive; the file appears under its name only when it is whole."""

import contextlib
import os
from fractions import Fraction
from types import TracebackType

import av
import av.container
import numpy as np
from av.video.reformatter import ColorRange

from ..engine.errors import MediaError
from .image import check_target, part_of, reason

VIDEO_SUFFIXES = (".mp4",)
BT709 = 1  # the same number for matrix, transfer and primaries, in H.264, MP4 and FFmpeg
# FFmpeg's SWS_BICUBIC and SWS_ACCURATE_RND; without the second, red and blue come out a fifth of a level dark.
SCALER = 0x4 | 0x40000


def has_x264() -> bool:
    """Whether this build of PyAV encodes H.264."""
    return "libx264" in av.codecs_available


def frame_rate(fps: float | Fraction) -> Fraction:
    """Frames per second as files say it; 1001 is the denominator of the NTSC rates, such as 30000/1001."""
    return Fraction(fps).limit_denominator(1001)


def to_yuv(frame: np.ndarray, pixel_format: str = "yuv420p") -> av.VideoFrame:
    """A frame, uint8 [H, W, 3], in 8-bit BT.709 limited range; `yuv420p` or `yuv444p`."""
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")  # [H, W, 3]
    yuv = rgb.reformat(
        format=pixel_format,
        interpolation=SCALER,
        dst_colorspace=BT709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )
    # x264 writes the tags of its context; other encoders go by those of the frame.
    yuv.colorspace = yuv.color_trc = yuv.color_primaries = BT709
    yuv.color_range = ColorRange.MPEG
    return yuv


class VideoWriter:
    """A context manager that encodes RGB frames to `path` as H.264, yuv420p, BT.709 limited range.

    Frames go to a `.part` file beside it, which takes the name `path` when the block ends well and is deleted when it
    does not; until then an existing file stays as it is. crf (0 to 51, lower is better) and preset are those of x264.
    Raises MediaError for a path, size or setting that cannot work, for wrong or no frames, and for a failed write.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: float | Fraction,
        crf: int = 16,
        preset: str = "medium",
    ):
        self.path = check_target("video", path, VIDEO_SUFFIXES)
        self.width, self.height = width, height
        self.fps = frame_rate(fps)
        self.crf, self.preset = crf, preset
        self.frames_written = 0
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise MediaError(f"video {path}: got size {width}x{height}, want even numbers; use multiples of 32")
        if self.fps <= 0:
            raise MediaError(f"video {path}: got {fps} frames per second, want a positive rate; try 24")
        self._part = part_of(self.path)

    def __enter__(self) -> "VideoWriter":
        try:
            self._part.open("wb").close()  # the encoder opens it late: find out now whether it can be written
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._open()
        except BaseException as error:
            self._part.unlink(missing_ok=True)
            if isinstance(error, (OSError, av.FFmpegError)):
                want = "want settings that x264 knows; check crf and preset"
                raise MediaError(f"video {self.path}: got '{reason(error)}', {want}") from error
            raise
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames, uint8 [n, H, W, 3]."""
        size = (self.height, self.width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != size:
            got, want = f"{frames.dtype} {frames.shape}", f"want uint8 (n, {size[0]}, {size[1]}, 3)"
            raise MediaError(f"frames for {self.path}: got {got}, {want}; write frames of the opened size")
        try:
            for frame in frames:
                self._container.mux(self._stream.encode(self._to_yuv(frame)))
                self.frames_written += 1
        except (OSError, av.FFmpegError) as error:
            raise self._failed(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            # After a failure, closing tries to complete the file and may fail once more.
            with contextlib.suppress(OSError, av.FFmpegError):
                self._container.close()
            with contextlib.suppress(OSError):
                self._part.unlink()  # gone already if all went well

    def _open(self) -> None:
        # The index goes to the front of the file, so that a browser plays it before it has all of it.
        # An absolute path, as FFmpeg takes what stands before a colon for a protocol.
        self._container = av.open(str(self._part.absolute()), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream = self._container.add_stream("libx264", rate=self.fps)
        # x264's macroblock tree reads memory that nobody set, so that equal frames make different files with it.
        self._stream.options = {"crf": str(self.crf), "preset": self.preset, "x264-params": "mbtree=0"}
        self._stream.width, self._stream.height, self._stream.pix_fmt = self.width, self.height, "yuv420p"
        context = self._stream.codec_context
        context.colorspace = context.color_trc = context.color_primaries = BT709
        context.color_range = ColorRange.MPEG
        self._container.start_encoding()

    def _to_yuv(self, frame: np.ndarray) -> av.VideoFrame:
        yuv = to_yuv(frame)
        yuv.pts, yuv.time_base = self.frames_written, 1 / self.fps
        return yuv

    def _finish(self) -> None:
        if not self.frames_written:
            raise MediaError(f"video {self.path}: got no frames, want at least one; write some before the block ends")
        try:
            self._container.mux(self._stream.encode(None))  # what the encoder still holds
            self._container.close()
            self._part.replace(self.path)
        except (OSError, av.FFmpegError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> MediaError:
        want = f"want a finished file; check {self.path.parent} for free space and permissions"
        return MediaError(f"video {self.path}: got '{reason(error)}', {want}")
