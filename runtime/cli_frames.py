"""Where `generate` writes frames: an MP4, numbered files, or a pipe."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import click

from ..engine.errors import MediaError
from ..engine.profile import Profile
from .frame_colour import COLOURS
from .frame_files import FRAME_SUFFIXES, FrameFiles, FramePattern, FrameStyle
from .frame_pipe import Chroma, PipeWriter
from .image import check_target
from .session import FrameChunk
from .sidecar import record_path
from .video import VIDEO_SUFFIXES, VideoWriter

PIPE = Path("-")
Sink = Callable[[FrameChunk], object]


def frame_options(command: Callable) -> Callable:
    """The options of numbered files."""
    help_text = "Colour space of EXR; lin_rec709 by default."
    command = click.option("--colour", type=click.Choice(list(COLOURS)), help=help_text)(command)
    return click.option(
        "--first-frame", type=click.IntRange(0, 9_000_000), default=1001, show_default=True, help="Number of frame 0."
    )(command)


def pick_colour(colour: str | None, suffix: str) -> str:
    """The colour space of a format: EXR is linear by default, all else is sRGB. Refuses another."""
    if suffix == ".exr":
        return colour or "lin_rec709"
    if colour not in (None, "srgb"):
        raise click.UsageError(
            f"--colour: got {colour}, want srgb, which {suffix or 'a pipe'} holds; write .exr for it"
        )
    return "srgb"


@dataclass(frozen=True)
class Target:
    """Where the frames of one clip go, checked before any work is done."""

    output: Path
    pattern: FramePattern | None  # of numbered files
    colour: str
    first: int
    chroma: Chroma

    @classmethod
    def check(cls, output: Path, colour: str | None, first: int, chroma: Chroma) -> "Target":
        """MediaError or a usage error for what cannot be written."""
        pattern = None
        if output.suffix.lower() in FRAME_SUFFIXES:
            pattern = FramePattern.parse(output)
            if not pattern.folder.is_dir():
                raise MediaError(f"frames {output}: got no folder {pattern.folder}, want one; create it first")
        elif output == PIPE:
            if sys.stdout.isatty():
                raise click.UsageError("-o -: got a terminal on stdout, want a pipe or a file; add '| mpv -' or a name")
        else:
            check_target("video", output, (*VIDEO_SUFFIXES, *FRAME_SUFFIXES))
        return cls(output, pattern, pick_colour(colour, output.suffix.lower()), first, chroma)

    @property
    def deep(self) -> bool:
        """Whether the files hold more than 8 bits."""
        return self.output.suffix.lower() == ".exr"

    @property
    def record(self) -> Path | None:
        """Where the record goes; a pipe has none."""
        if self.output == PIPE:
            return None
        return self.pattern.record if self.pattern else record_path(self.output)

    def files(self, frames: int) -> set[Path]:
        """The files that will be written, resolved."""
        if self.output == PIPE:
            return set()
        if self.pattern is None:
            return {self.output.resolve()}
        return {self.pattern.file(self.first + index).resolve() for index in range(frames)}

    @contextmanager
    def open(self, profile: Profile, said: dict[str, str]) -> Iterator[Sink]:
        """A function that takes the chunks of the clip in order. `said` goes into the header of numbered files."""
        if self.pattern is not None:
            style = FrameStyle(Fraction(profile.fps), self.first, COLOURS[self.colour], said)
            yield FrameFiles(self.pattern, style).write
        elif self.output == PIPE:
            pipe = PipeWriter(sys.stdout.buffer, profile.width, profile.height, profile.fps, self.chroma)
            yield lambda chunk: pipe.write(chunk.frames)
        else:
            with VideoWriter(self.output, profile.width, profile.height, profile.fps) as video:
                yield lambda chunk: video.write(chunk.frames)
