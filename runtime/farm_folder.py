"""A farm job on disk: job.json says what all shots share; a folder per shot holds its frames and what resumes it.

DIR/job.json                      worker, profile, output
DIR/<shot>/shot.json              what the shot was asked for
DIR/<shot>/segments/0003.json     a finished segment: its files and their SHA-256
DIR/<shot>/state.safetensors      what the next segment takes
DIR/<shot>/record.json            written last: how the shot was made, and its files
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..engine.errors import EnvironmentMismatch
from ..engine.manifest import Artifact, damage, sha256_of
from ..engine.plain import PlainError, from_plain, to_plain
from ..engine.profile import Profile
from .farm_errors import FarmError, Transient
from .frame_files import write_bytes
from .image import part_of

FORMAT = 1
JOB, SHOT, RECORD, STATE, SEGMENTS, LOCK = (
    "job.json", "shot.json", "record.json", "state.safetensors", "segments", "lock",
)  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True)
class Worker:
    """What decides the bits of the frames, beside the shot and the profile."""

    backend: str
    device: str  # the GPU's name, or the CPU's instruction set
    dtype: str
    bundle: str | None  # its digest
    weights: dict[str, str]  # fingerprints
    versions: dict[str, str]


@dataclass(frozen=True)
class Output:
    """What files a job makes. `first` is the number of the first frame of a sequence."""

    format: str  # mp4, png or exr
    colour: str
    first: int


@dataclass(frozen=True)
class Job:
    """What all shots of a folder share."""

    format: int
    worker: Worker
    profile: Profile
    output: Output


@dataclass(frozen=True)
class Asked:
    """What a shot was asked for, its image by the SHA-256 of the fitted pixels."""

    image: str
    prompt: str
    negative: str | None
    seed: int
    fit: str


@dataclass(frozen=True)
class SegmentFiles:
    """A finished segment: frames from `first` on, the SHA-256 of their values, and their files."""

    segment: int
    first: int
    frames: int
    pixels: str
    files: tuple[Artifact, ...]


def open_job(folder: Path, job: Job, allow_different: bool) -> None:
    """Make the folder's job.json, or compare with the one that is there.

    EnvironmentMismatch for another worker, unless allowed; FarmError for another profile or output, always.
    """
    folder.mkdir(exist_ok=True)
    path = folder / JOB
    if not path.exists():
        part = part_of(path)
        write_bytes(part, _text(to_plain(job)))
        try:
            os.link(part, path)  # the first of several workers wins
        except FileExistsError:
            pass
        except (NotImplementedError, OSError):  # no links here
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    there = check_job(folder, job.profile, job.output)
    if there.worker != job.worker and not allow_different:
        raise EnvironmentMismatch(
            f"{path} worker: got {_differences(job.worker, there.worker)} here, want the same for the same frames; "
            "use a worker like the first one, or pass --allow-different"
        )


def check_job(folder: Path, profile: Profile, output: Output) -> Job:
    """The job of a folder. FarmError if it was begun with another profile or output."""
    path = folder / JOB
    there = _read(Job, path)
    for what, one, other in (("profile", there.profile, profile), ("output", there.output, output)):
        if one != other:
            raise FarmError(
                f"{path} {what}: got {_differences(other, one)} here, want what the job was begun with; "
                "use another folder for another job"
            )
    return there


class ShotFolder:
    """One shot of a job."""

    def __init__(self, job: Path, name: str) -> None:
        self._job, self.name, self.path = job, name, job / name
        self.state = self.path / STATE
        self.lock = self.path / LOCK

    def make(self) -> None:
        """Make the folder. Transient if the job's own folder has gone, which is what a lost mount looks like."""
        if not (self._job / JOB).is_file():
            raise Transient(f"{self._job}: got no {JOB}, want the job's folder; check the mount, then run it again")
        (self.path / SEGMENTS).mkdir(parents=True, exist_ok=True)

    def begin(self, asked: Asked) -> None:
        """Write what is asked for. Refuses a folder that was begun with something else, and clears what a kill left."""
        self.check(asked)
        for part in (*self.path.glob("*.part"), *(self.path / SEGMENTS).glob("*.part")):
            part.unlink(missing_ok=True)
        write_bytes(self.path / SHOT, _text(to_plain(asked)))

    def check(self, asked: Asked) -> None:
        """FarmError if the folder was begun with something else."""
        path = self.path / SHOT
        if path.is_file() and (there := _read(Asked, path)) != asked:
            raise FarmError(
                f"{path}: got {_differences(asked, there)} in the list, want what the shot was begun with; "
                f"use another folder, or delete {self.path}"
            )

    def is_done(self) -> bool:
        """Whether the record is there and so are its files, by their sizes."""
        try:
            files = json.loads((self.path / RECORD).read_text(encoding="utf-8"))["files"]
            return all(not damage(self.path, from_plain(Artifact, item, "file"), hashes=False) for item in files)
        except (FileNotFoundError, ValueError, KeyError, TypeError, PlainError):
            return False

    def segment(self, index: int) -> SegmentFiles | None:
        """A finished segment, or None where it is missing or a file of it is damaged."""
        try:
            found = _read(SegmentFiles, self._segment_path(index))
        except (FileNotFoundError, FarmError):
            return None
        return None if any(damage(self.path, file) for file in found.files) else found

    def finished(self, segments: int) -> list[SegmentFiles]:
        """The finished segments, from the first one to where one is missing. Reads every file of theirs."""
        found = []
        for index in range(segments):
            segment = self.segment(index)
            if segment is None:
                break
            found.append(segment)
        return found

    def finish_segment(self, segment: int, first: int, frames: int, pixels: str, files: Sequence[Path]) -> SegmentFiles:
        """Write down that a segment is finished, with the checksums of its files."""
        record = SegmentFiles(segment, first, frames, pixels, tuple(self.artifact(path) for path in files))
        write_bytes(self._segment_path(segment), _text(to_plain(record)))
        return record

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write how the shot was made; what resumed it goes."""
        write_bytes(self.path / RECORD, _text(record))
        self.clear()

    def clear(self) -> None:
        """Delete what only an unfinished shot needs."""
        self.state.unlink(missing_ok=True)
        shutil.rmtree(self.path / SEGMENTS, ignore_errors=True)

    def artifact(self, path: Path) -> Artifact:
        return Artifact(path.relative_to(self.path).as_posix(), path.stat().st_size, sha256_of(path))

    def _segment_path(self, index: int) -> Path:
        return self.path / SEGMENTS / f"{index:04d}.json"


def _read(kind: type[T], path: Path) -> T:
    data = path.read_bytes()
    try:
        return from_plain(kind, json.loads(data.decode()), path.name)
    except (ValueError, RecursionError, PlainError) as error:
        raise FarmError(f"{path}: got '{error}', want what a worker wrote; delete it or use another folder") from error


def _text(plain: Any) -> bytes:
    return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def _differences(got: Any, want: Any) -> str:
    """The fields in which two values differ, as `name X in place of Y`."""
    one, other = _flat(to_plain(got)), _flat(to_plain(want))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    words = [f"{name} {one.get(name)!r:.80} in place of {other.get(name)!r:.80}" for name in names[:3]]
    return ", ".join(words) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _flat(plain: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(plain, dict):
        return {place: plain}
    return {
        key: leaf for name, value in plain.items() for key, leaf in _flat(value, f"{place}.{name}".strip(".")).items()
    }
