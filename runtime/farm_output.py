"""The files of one shot: a numbered sequence as it comes, or a clip that is encoded when all frames are there."""

import io
import secrets
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np

from ..engine.profile import Profile
from .farm_folder import SEGMENTS, Output, ShotFolder
from .farm_shots import Shot
from .frame_colour import COLOURS
from .frame_files import FrameFiles, FramePattern, FrameStyle, write_bytes
from .session import FrameChunk
from .video import VideoWriter


class ShotOutput(Protocol):
    """Where the frames of a shot go. `name` is what the record calls the whole."""

    name: str

    def write(self, chunk: FrameChunk) -> list[Path]:
        """The files of a finished segment."""
        ...

    def finish(self, files: Sequence[Path]) -> list[Path]:
        """The files of the finished shot, from those of its segments."""
        ...


class SequenceOutput:
    """PNG or EXR files, which are final when they are written."""

    def __init__(self, files: FrameFiles) -> None:
        self._files = files
        self.name = files.pattern.before + "#" * files.pattern.digits + files.pattern.after

    def write(self, chunk: FrameChunk) -> list[Path]:
        return self._files.write(chunk)

    def finish(self, files: Sequence[Path]) -> list[Path]:
        return list(files)


class ClipOutput:
    """An MP4. An encoder cannot be stopped and continued, so frames are kept as arrays until the last one is there.

    Arrays, as they are what the encoder takes and cost a fiftieth of the time of PNG; a 2K segment is 130 MB.
    """

    def __init__(self, folder: ShotFolder, profile: Profile) -> None:
        self._folder, self._profile = folder, profile
        self.name = f"{folder.name}.mp4"

    def write(self, chunk: FrameChunk) -> list[Path]:
        file = io.BytesIO()
        np.save(file, chunk.frames, allow_pickle=False)
        path = self._folder.path / SEGMENTS / f"{chunk.segment:04d}.npy"
        return [write_bytes(path, file.getvalue())]

    def finish(self, files: Sequence[Path]) -> list[Path]:
        path, profile = self._folder.path / self.name, self._profile
        # Under a name of its own, as a worker that lost its lock may still be encoding.
        part = self._folder.path / SEGMENTS / f"{secrets.token_hex(6)}.mp4"
        with VideoWriter(part, profile.width, profile.height, profile.fps) as writer:
            for file in files:
                writer.write(np.load(file, allow_pickle=False))
        part.replace(path)
        return [path]


def open_output(output: Output, folder: ShotFolder, shot: Shot, profile: Profile) -> ShotOutput:
    """The output of a shot."""
    if output.format == "mp4":
        return ClipOutput(folder, profile)
    said = {"shot": shot.name, "seed": str(shot.seed), "profile": profile.name}
    style = FrameStyle(Fraction(profile.fps), output.first, COLOURS[output.colour], said)
    return SequenceOutput(FrameFiles(FramePattern.parse(folder.path / f"{shot.name}.####.{output.format}"), style))
