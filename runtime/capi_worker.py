"""One session and the thread that serves its requests, behind one lock.

Finished segments wait in a queue of a few; when it is full, generation waits for the caller.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

from ..engine.errors import Cancelled
from ..engine.profile import Profile
from ..engine.sampler import stage_sigmas
from ..engine.segments import plan_segments
from .capi_status import CallError, Stage, State, Status, status_of, text_of
from .session import FrameChunk, Progress, Request, Session

LOG = logging.getLogger(__name__)
T = TypeVar("T")
STAGES = {"prompt": Stage.PROMPT, "stage1": Stage.STAGE1, "stage2": Stage.STAGE2}


def say(level: int, text: str) -> None:
    """A line of the log. A handler of the host that raises loses it: no request and no session ends by that."""
    with contextlib.suppress(Exception):
        LOG.log(level, text)


class Place(NamedTuple):
    """Where a request is: its state and stage, progress from 0 to 1, and how many segments are made and waiting."""

    state: State
    stage: Stage
    progress: float
    segments_made: int
    segments_waiting: int


@dataclass
class Run:
    """One request on its way. Everything but the request changes under the worker's lock."""

    request: Request
    started: bool = False
    state: State = State.RUNNING
    stage: Stage = Stage.NONE
    parts: int = 0  # done so far
    made: int = 0
    chunks: deque[FrameChunk] = field(default_factory=deque)
    failure: tuple[Status, str] | None = None


class Worker:
    """Serves one request at a time; every method may be called from any thread. The session is the worker's now."""

    def __init__(self, session: Session, name: str, bound: int) -> None:
        self.profile = session.profile
        self.last_error = ""
        self._session = session
        self._name = name
        self._bound = bound
        self._parts = count_parts(session.profile)
        self._changed = threading.Condition()
        self._run: Run | None = None
        self._closed = False
        # A daemon, so that a host that forgets to destroy a session can still end.
        self._thread = threading.Thread(target=self._serve, name=f"swifti2v {name}", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Start a request. CallError while segments of the last one are still to come."""
        with self._changed:
            self._check_open()
            run = self._run
            if run is not None and (run.state is State.RUNNING or run.chunks):
                raise CallError(
                    Status.INVALID_STATE,
                    f"{self._name}: got a request while segments of the last one are still to come, "
                    "want one at a time; fetch them to the END, or cancel",
                )
            self._run = Run(request)
            self._changed.notify_all()

    def place(self) -> Place:
        """Where the request last submitted is."""
        with self._changed:
            self._check_open()
            run = self._run
            if run is None:
                return Place(State.IDLE, Stage.NONE, 0.0, 0, 0)
            return Place(run.state, run.stage, min(run.parts / self._parts, 1.0), run.made, len(run.chunks))

    def take(self, timeout: float | None, use: Callable[[FrameChunk], T]) -> tuple[Status, T | None]:
        """Wait for the next segment and hand it to `use`; if that raises, the segment stays the next one.

        END after the last one, TIMEOUT if none came in `timeout` seconds; what stopped the request is raised.
        """
        with self._changed:
            self._check_open()
            run = self._run
            if run is None:
                want = "want one; submit it first"
                raise CallError(Status.INVALID_STATE, f"{self._name}: got no request yet, {want}")
            self._changed.wait_for(lambda: self._closed or run.chunks or run.state is not State.RUNNING, timeout)
            self._check_open()
            if run.chunks:
                used = use(run.chunks[0])
                run.chunks.popleft()
                self._changed.notify_all()
                return Status.OK, used
            if run.state is State.CANCELLED:
                raise Cancelled(f"{self._name}: got no more segments, want none, as it was cancelled; submit again")
            if run.failure is not None:
                raise CallError(*run.failure)
            return (Status.END if run.state is State.FINISHED else Status.TIMEOUT), None

    def cancel(self) -> None:
        """Stop the request after its current step and drop what was not fetched. The next may be submitted at once."""
        with self._changed:
            self._check_open()
            if self._run is not None and (self._run.state is State.RUNNING or self._run.chunks):
                self._run.state = State.CANCELLED
                self._run.chunks.clear()
                self._changed.notify_all()

    def close(self) -> None:
        """Cancel, wait for the thread to end after its current step, and free the session."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise CallError(
                Status.INVALID_HANDLE, f"{self._name}: got a destroyed session, want an open one; create it"
            )

    def _serve(self) -> None:
        while (run := self._next_run()) is not None:
            say(logging.INFO, f"{self._name}: request started")
            state, failure = State.FINISHED, None
            try:
                for chunk in self._session.generate(run.request, partial(self._note, run)):
                    self._put(run, chunk)
            except Cancelled:
                state = State.CANCELLED
            except BaseException as error:  # every one ends this request, and none the thread
                state, failure = State.FAILED, (status_of(error), text_of(error))
                say(logging.ERROR, f"{self._name}: {failure[1]}")
            with self._changed:
                if run.state is State.RUNNING:
                    run.state, run.failure = state, failure
                self._changed.notify_all()
            say(logging.INFO, f"{self._name}: request {run.state.name.lower()}")
        self._session.close()
        say(logging.INFO, f"{self._name}: closed")

    def _next_run(self) -> Run | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._run is not None and not self._run.started))
            if self._closed or self._run is None:
                return None
            self._run.started = True
            return self._run

    def _note(self, run: Run, progress: Progress) -> bool:
        """Count a part that is done; False stops the run."""
        with self._changed:
            run.parts, run.stage = run.parts + 1, STAGES.get(progress.phase, run.stage)
            return run.state is State.RUNNING and not self._closed

    def _put(self, run: Run, chunk: FrameChunk) -> None:
        """Queue a segment, when there is room."""
        with self._changed:
            stopped = lambda: self._closed or run.state is not State.RUNNING  # noqa: E731
            self._changed.wait_for(lambda: stopped() or len(run.chunks) < self._bound)
            if stopped():
                raise Cancelled(f"{self._name}: stopped on request")
            run.chunks.append(chunk)
            run.made += 1
            self._changed.notify_all()


def count_parts(profile: Profile) -> int:
    """How many times a run reports progress: the prompt, Stage I's image and steps, every segment's."""
    segments = len(plan_segments(profile.blocks, profile.noisy, profile.neighbours))
    steps = len(stage_sigmas(profile.stage2, profile.stage2_start))
    return 1 + 1 + len(stage_sigmas(profile.stage1)) + segments * (steps + 2)
