"""Numbered frame files: PNG from the 8-bit frames, half-float EXR from the frames before rounding."""

import contextlib
import io
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, PngImagePlugin

from ..engine.errors import EnvironmentMismatch, MediaError
from .frame_colour import SRGB, Colour, from_srgb
from .image import part_of, reason
from .session import FrameChunk

FRAME_SUFFIXES = (".png", ".exr")
NUMBER = re.compile(r"#+|%(?:0(\d))?d|\$F(\d)?")  # shot.####.exr, shot.%04d.exr, shot.$F4.exr
# IPTC's word for media made by a model; the EXR header is the only place for it.
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@dataclass(frozen=True)
class FramePattern:
    """The path of a sequence with a place for the frame's number."""

    folder: Path
    before: str
    digits: int
    after: str  # with the suffix

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> "FramePattern":
        """Read `shot.####.png`, `shot.%04d.png` or `shot.$F4.png`. MediaError for no number, or for two."""
        path = Path(path)
        found = list(NUMBER.finditer(path.name))
        if len(found) != 1:
            want = "want one number such as shot.####.png"
            raise MediaError(f"frames {path}: got {len(found)} places for the frame number, {want}; add or remove it")
        if path.suffix.lower() not in FRAME_SUFFIXES:
            raise MediaError(f"frames {path}: got suffix '{path.suffix}', want .png or .exr; name the files so")
        match = found[0]
        digits = len(match[0]) if match[0][0] == "#" else int(match[1] or match[2] or 1)
        return cls(path.parent, path.name[: match.start()], digits, path.name[match.end() :])

    @property
    def suffix(self) -> str:
        return Path(f"x{self.after}").suffix.lower()  # a name that begins with a dot has no suffix

    @property
    def record(self) -> Path:
        """Where the record of the sequence goes: shot.json for shot.####.png."""
        return self.folder / ((self.before.rstrip("._-") or "frames") + ".json")

    def file(self, number: int) -> Path:
        return self.folder / f"{self.before}{number:0{self.digits}d}{self.after}"


@dataclass(frozen=True)
class FrameStyle:
    """What every file of a sequence says. `first` is the number of the clip's first frame."""

    fps: Fraction
    first: int = 1001
    colour: Colour = SRGB
    attributes: Mapping[str, str] = field(default_factory=dict)  # the caller's own, written as swifti2v/NAME


class FrameFiles:
    """Writes the chunks of a clip as numbered files, each whole or not at all."""

    def __init__(self, pattern: FramePattern, style: FrameStyle) -> None:
        self.pattern, self.style = pattern, style
        if pattern.suffix == ".exr":
            _openexr()
        elif style.colour != SRGB:
            raise MediaError(f"PNG colour: got {style.colour.name}, want srgb; write EXR for linear light")

    def write(self, chunk: FrameChunk) -> list[Path]:
        """The files of a chunk, in order. EXR needs `chunk.deep`. A file that has these bytes already is left alone."""
        deep = self.pattern.suffix == ".exr"
        frames = chunk.deep if deep else chunk.frames
        if frames is None:
            raise MediaError("EXR frames: got 8-bit ones, want float; make them with Request(deep=True)")

        def write_one(offset: int) -> Path:
            number = self.style.first + chunk.index + offset
            data = encode_exr(frames[offset], number, self.style) if deep else encode_png(frames[offset], self.style)
            return write_bytes(self.pattern.file(number), data)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # encoders work without the interpreter's lock
            return list(pool.map(write_one, range(len(frames))))


def encode_png(frame: np.ndarray, style: FrameStyle) -> bytes:
    """An 8-bit PNG of a frame, uint8 [H, W, 3], tagged sRGB. The rate and the caller's attributes are text entries."""
    info = PngImagePlugin.PngInfo()
    info.add(b"sRGB", b"\1")  # relative colorimetric, as image.py reads pictures
    for name, value in _texts(style).items():
        info.add_itxt(name, value)
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", pnginfo=info, compress_level=1)  # level 6: a tenth smaller, 9 times slower
    return file.getvalue()


def encode_exr(frame: np.ndarray, number: int, style: FrameStyle) -> bytes:
    """A half-float EXR of a frame, float32 [H, W, 3], sRGB in [0, 1], in the colour space of the style.

    The timecode is the frame's number at the clip's rate; above 30 frames per second there is none, as its format
    ends there.
    """
    openexr = _openexr()
    header = {
        "type": openexr.scanlineimage,
        "compression": openexr.ZIP_COMPRESSION,
        "chromaticities": style.colour.primaries,
        "colorInteropID": style.colour.interop,
        "framesPerSecond": style.fps,
        "imageCounter": number,
        **_texts(style),
    }
    if style.fps <= 30:
        header["timeCode"] = openexr.TimeCode(*timecode(number, style.fps), *[0] * 14)
    pixels = from_srgb(frame, style.colour).astype(np.float16)  # [H, W, 3]
    file = io.BytesIO()
    openexr.File(header, {"RGB": pixels}, 1).write(file)
    return file.getvalue()


def timecode(number: int, fps: Fraction) -> tuple[int, int, int, int]:
    """Hours, minutes, seconds and frames of a frame's number, without dropping any; a day is where it starts again."""
    base = round(fps)
    seconds, frames = divmod(number, base)
    minutes, seconds = divmod(seconds, 60)
    return minutes // 60 % 24, minutes % 60, seconds, frames


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file so that it appears whole or not at all, also after a power cut. Equal bytes are left as they are."""
    part = part_of(path)
    try:
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return path
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        want = f"want a finished file; check {path.parent} for free space and permissions"
        raise MediaError(f"file {path}: got '{reason(error)}', {want}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def _texts(style: FrameStyle) -> dict[str, str]:
    own = {f"swifti2v/{name}": value for name, value in style.attributes.items()}
    return {"swifti2v/fps": str(style.fps), "swifti2v/digitalSourceType": SOURCE_TYPE, **own}


def _openexr() -> ModuleType:
    try:
        import OpenEXR
    except ImportError as error:
        want = "want it for .exr files; pip install 'swifti2v[exr]'"
        raise EnvironmentMismatch(f"OpenEXR: got no such package, {want}") from error
    return OpenEXR
