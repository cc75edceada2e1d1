"""A farm job: shots to files, each in a folder that a killed worker leaves ready to be gone on with.

A segment's files are written first, then its record, then the state that the next one takes. Whatever moment a worker
dies in, the next one goes on from a state whose earlier segments are all there, and writes no finished file again.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from .. import __version__
from ..engine.errors import EnvironmentMismatch, NumericsError, SwiftError
from ..engine.profile import Profile
from ..engine.segments import plan_segments
from ..engine.state import SegmentState
from .backend_registry import code_digest
from .farm_errors import FarmError, LockLost, is_transient
from .farm_folder import FORMAT, JOB, Asked, Job, Output, SegmentFiles, ShotFolder, Worker, open_job
from .farm_lock import ShotLock
from .farm_output import ShotOutput, open_output
from .farm_shots import Shot
from .farm_state import Saved, load_state, save_state
from .image import fit_image, load_image, reason
from .models import Loaded
from .session import FrameChunk, Progress, Request, Session
from .sidecar import Run, describe, dtype_name

FINISHED = "finished"
Status = Literal["done", "skipped", "busy", "failed", "stopped"]


@dataclass(frozen=True)
class Result:
    """What became of a shot. `busy`: another worker has it; `stopped`: the job stopped there and may be run again."""

    shot: str
    status: Status
    text: str = ""


@dataclass(frozen=True)
class News:
    """What happens: `fraction` is how much of this worker's part of the job is done."""

    shot: str
    event: Literal["started", "progress", "segment", "done", "skipped", "busy", "failed", "stopped"]
    fraction: float
    text: str = ""


OnNews = Callable[[News], object]


@dataclass(frozen=True)
class Farm:
    """One worker on one job folder."""

    folder: Path
    session: Session
    loaded: Loaded
    weights: dict[str, str]  # fingerprints
    output: Output
    allow_different: bool = False
    state_every: int = 1  # segments between states; fewer states cost less disk time and more lost work

    def render(self, shots: Sequence[Shot], on_news: OnNews) -> list[Result]:
        """Make the shots that are not finished, one after another. Stops early where the next one would fail too.

        EnvironmentMismatch for a worker unlike the one that began the job; FarmError for another profile or output.
        """
        job = Job(FORMAT, describe_worker(self.loaded, self.weights), self.loaded.profile, self.output)
        open_job(self.folder, job, self.allow_different)
        results: list[Result] = []
        for index, shot in enumerate(shots):
            tell = partial(_tell, on_news, shot.name, index, len(shots))
            results.append(self._try(shot, tell))
            tell(results[-1].status, 1.0, results[-1].text)
            if results[-1].status == "stopped":
                break
        return results

    def _try(self, shot: Shot, tell: Callable[..., None]) -> Result:
        """One shot, and what became of it."""
        try:
            return Result(shot.name, self._render(shot, tell))
        except EnvironmentMismatch:
            raise
        except (SwiftError, OSError, RuntimeError, MemoryError) as error:
            if is_transient(error) or not (self.folder / JOB).is_file():  # what a lost mount looks like
                return Result(shot.name, "stopped", " ".join(str(error).split()))
            if isinstance(error, LockLost):
                return Result(shot.name, "busy", str(error))
            if isinstance(error, SwiftError):
                return Result(shot.name, "failed", str(error))
            if isinstance(error, OSError):
                return Result(shot.name, "failed", f"{self.folder}: got '{reason(error)}', want to go on; check it")
            raise

    def _render(self, shot: Shot, tell: Callable[..., None]) -> Status:
        request = read_request(shot, self.loaded.profile, deep=self.output.format == "exr")
        asked, folder = asked_for(shot, request), ShotFolder(self.folder, shot.name)
        folder.make()
        folder.check(asked)
        if folder.is_done():
            folder.clear()
            return "skipped"
        lock = ShotLock.take(folder.lock)
        if lock is None:
            return "busy"
        with lock:
            if folder.is_done():  # another worker finished it just now
                return "skipped"
            folder.begin(asked)
            before = self.session.timings.seconds()
            output = open_output(self.output, folder, shot, self.loaded.profile)
            try:
                segments = self._segments(folder, lock, request, output, tell)
                files = output.finish([folder.path / file.path for segment in segments for file in segment.files])
            except Exception:
                lock.check()  # whatever else went wrong for a worker that lost the shot, it lost the shot
                raise
            lock.check()
            seconds = {name: round(s - before.get(name, 0.0), 4) for name, s in self.session.timings.seconds().items()}
            run = Run(Path(output.name), Path(shot.image).name, shot.fit, request, self.loaded, self.weights, seconds)
            folder.finish({**describe(run), "files": [asdict(folder.artifact(path)) for path in files]})
        return "done"

    def _segments(
        self, folder: ShotFolder, lock: ShotLock, request: Request, output: ShotOutput, tell: Callable[..., None]
    ) -> list[SegmentFiles]:
        """All segments of the shot: those that are there already, then new ones."""
        profile = self.loaded.profile
        total = len(plan_segments(profile.blocks, profile.noisy, profile.neighbours))
        done = folder.finished(total)
        tell("started", 0.0, f"{len(done)} of {total} segments are there")
        if len(done) == total:
            return done
        saved, why = _load_usable(folder, len(done), self.loaded)
        if why:
            tell("started", 0.0, f"starts over: {why}")
        on_progress = partial(_tell_progress, tell, total)
        clip, state = self.session.prepare(request, on_progress, saved.motion if saved else None)
        state = saved.state if saved else state
        done = done[: state.segment]
        latest: list[SegmentState] = []
        chunks = self.session.resume(request, clip, state, on_progress, on_state=latest.append)
        del saved, state  # the session lets go of its caches segment by segment; nothing else may hold them
        for chunk in chunks:
            lock.check()
            done.append(self._keep(folder, output, chunk))
            if len(done) < total and len(done) % self.state_every == 0:
                save_state(folder.state, Saved(clip.motion, latest[-1]))
            latest.clear()
            tell("segment", (len(done) + 1) / (total + 1), f"segment {len(done)}/{total}")
        return done

    def _keep(self, folder: ShotFolder, output: ShotOutput, chunk: FrameChunk) -> SegmentFiles:
        """Write a segment's files and record. One that is finished already, as its state was lost, is compared."""
        pixels = chunk.frames if chunk.deep is None else chunk.deep
        digest = hashlib.sha256(pixels.data).hexdigest()
        there = folder.segment(chunk.segment)
        if there is None:
            return folder.finish_segment(chunk.segment, chunk.index, len(pixels), digest, output.write(chunk))
        if there.pixels != digest and not self.allow_different:
            raise NumericsError(
                f"{folder.path} segment {chunk.segment}: got other frames than the first time, want the same; "
                "check that this worker is deterministic, or pass --allow-different to keep the first ones"
            )
        return there


def describe_worker(loaded: Loaded, weights: dict[str, str]) -> Worker:
    """What decides the bits of the frames here."""
    device = loaded.device
    gpu = device.type == "cuda"
    return Worker(
        backend=loaded.backend,
        device=torch.cuda.get_device_name(device) if gpu else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        dtype=dtype_name(loaded.dtype),
        bundle=None if loaded.bundle is None else loaded.bundle.manifest.digest,
        weights=dict(sorted(weights.items())),
        versions={"swifti2v": __version__, "model code": code_digest(), "torch": torch.__version__},
    )


def read_request(shot: Shot, profile: Profile, deep: bool) -> Request:
    """The shot's request, its image read and fitted. MediaError for an image that cannot be read."""
    frame = fit_image(load_image(shot.image), profile.width, profile.height, shot.fit)
    return Request(frame, shot.prompt, shot.negative, shot.seed, deep)


def asked_for(shot: Shot, request: Request) -> Asked:
    digest = hashlib.sha256(request.image.tobytes()).hexdigest()
    return Asked(digest, shot.prompt, shot.negative, shot.seed, shot.fit)


def look_at(folder: ShotFolder, asked: Asked, segments: int) -> str:
    """One word on how far a shot is, for whoever only asks: `finished`, `new`, or how many segments are there."""
    folder.check(asked)
    if folder.is_done():
        return FINISHED
    there = len(folder.finished(segments))
    return f"{there} of {segments} segments" if there else "new"


def _load_usable(folder: ShotFolder, segments: int, loaded: Loaded) -> tuple[Saved | None, str]:
    """The saved state, or why the shot starts over: a damaged state, or one ahead of the finished segments."""
    try:
        saved = load_state(folder.state, loaded.device, loaded.dtype)
    except FileNotFoundError:
        return None, ""
    except FarmError as error:
        return None, str(error)
    if saved.state.segment > segments:
        return None, f"the files of segment {segments + 1} are damaged or gone"
    return saved, ""


def _tell(on_news: OnNews, shot: str, index: int, count: int, event: Any, part: float, text: str = "") -> None:
    on_news(News(shot, event, (index + part) / count, text))


def _tell_progress(tell: Callable[..., None], segments: int, progress: Progress) -> None:
    """Stage I counts as much as a segment."""
    part = progress.done / progress.total
    if progress.phase == "stage2":
        place = f"segment {progress.segment + 1}/{segments}, {progress.what}"
        tell("progress", (1 + progress.segment + part) / (segments + 1), place)
    elif progress.phase == "stage1":
        tell("progress", part / (segments + 1), f"Stage I, {progress.what}")
