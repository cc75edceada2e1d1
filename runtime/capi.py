"""Flat calls for callers that know no Python objects: opaque integer handles in, (status, result) out.

No exception crosses: a call that cannot be done gives a negative status, and `last_error` its text. Each session has
one worker thread that generates. Many threads may call at once, each with its own session; calls on one handle take
turns, and one that waits for a segment lets the others through. KeyboardInterrupt alone passes, as it is the host's.

The table of sessions is one for the process, because a handle is a number.
"""

import atexit
import itertools
import logging
import threading
from collections.abc import Callable
from functools import wraps
from math import isnan
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np

from .. import __version__
from ..engine.segments import plan_segments
from .capi_json import Pixels, open_models, read_config, read_request
from .capi_status import API_VERSION, CallError, Status, status_of, text_of
from .capi_worker import Place, Worker, say
from .session import FrameChunk, Session

__all__ = [
    "API_VERSION", "Info", "Pixels", "Place", "SegmentInfo", "Status", "borrow_segment", "cancel", "create", "destroy",
    "info", "last_error", "next_segment", "poll", "release_segment", "set_log", "submit", "version",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")
Answer = tuple[Status, R | None]
LogCallback = Callable[[int, str], Any]  # level as in logging (20 info, 30 warning, 40 error), text


class Info(NamedTuple):
    """What a session makes: the clip's size, and the most that one segment takes."""

    width: int
    height: int
    frames: int
    segments: int
    segment_frames: int
    segment_bytes: int
    fps: float


class SegmentInfo(NamedTuple):
    """Frames handed over: uint8 [frames, height, width, 3], the first one's index in the clip, and their segment."""

    segment: int
    first_frame: int
    frames: int
    width: int
    height: int
    bytes: int


class _Open(NamedTuple):
    worker: Worker
    borrowed: dict[int, np.ndarray]  # by lease


class _Table:
    """Open sessions by handle. A number is never used twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._numbers = itertools.count(1)
        self.opening = threading.Lock()  # untrained weights come from torch's generator, which all threads share
        # .error: the text of this thread's last failure; .logs: whether it is in the log callback
        self.thread = threading.local()
        atexit.register(self.close)

    def number(self) -> int:
        return next(self._numbers)

    def add(self, handle: int, worker: Worker) -> None:
        with self._lock:
            self._open[handle] = _Open(worker, {})

    def find(self, handle: int, take: bool = False) -> _Open:
        with self._lock:
            known = type(handle) is int and handle in self._open
            if not known:
                want = "want one that create gave and destroy has not taken; create it"
                raise CallError(Status.INVALID_HANDLE, f"session: got {str(handle)[:40]}, {want}")
            return self._open.pop(handle) if take else self._open[handle]

    def close(self) -> None:
        """Destroy whatever is still open, before the interpreter goes."""
        for handle in list(self._open):
            destroy(handle)


class _LogHandler(logging.Handler):
    """Hands records of the package to one callback."""

    callback: LogCallback | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.callback is None:
            return
        before, _TABLE.thread.logs = getattr(_TABLE.thread, "logs", False), True
        try:
            self.callback(record.levelno, record.getMessage())
        except Exception:  # a callback that raises loses its line; the run goes on
            pass
        finally:
            _TABLE.thread.logs = before


_TABLE = _Table()
_LOG = _LogHandler()


def _outside_callback(what: str) -> None:
    """Refuse what may wait for another thread: the handler is locked while its callback runs, and that one may log."""
    if getattr(_TABLE.thread, "logs", False):
        want = "want it outside; do it there, or wait 0 seconds"
        raise CallError(Status.INVALID_STATE, f"{what}: got called from a log callback, {want}")


def _flat(function: Callable[P, Answer[R]]) -> Callable[P, Answer[R]]:
    """The call, with its exceptions turned into statuses and its text kept for this thread."""

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> Answer[R]:
        try:
            return function(*args, **options)
        except Exception as error:
            _TABLE.thread.error = text_of(error)
            return status_of(error), None

    return call


def _on_session(function: Callable[Concatenate[_Open, P], Answer[R]]) -> Callable[Concatenate[int, P], Answer[R]]:
    """The same for a call on a session, found by its handle; the text is kept for the handle too."""

    @wraps(function)
    def call(handle: int, *args: P.args, **options: P.kwargs) -> Answer[R]:
        opened = _TABLE.find(handle)
        try:
            return function(opened, *args, **options)
        except Exception as error:
            opened.worker.last_error = text_of(error)
            raise

    return _flat(call)


@_flat
def version() -> Answer[tuple[int, str]]:
    """The version of these calls, and the package's."""
    return Status.OK, (API_VERSION, __version__)


@_flat
def create(config: str | bytes) -> Answer[int]:
    """Open a session on what a JSON object names (`capi_json.Config`), and give its handle, never 0."""
    _outside_callback("create")
    wanted = read_config(config)
    handle = _TABLE.number()
    with _TABLE.opening:
        session = Session.open(open_models(wanted))
    _TABLE.add(handle, Worker(session, f"session {handle}", wanted.queue))
    profile = session.profile
    size = f"{profile.frames} frames of {profile.width}x{profile.height}"
    say(logging.INFO, f"session {handle}: opened, {profile.name}, {size} on {session.device}")
    return Status.OK, handle


@_flat
def destroy(handle: int) -> Answer[None]:
    """Cancel what runs, wait for its current step to end, free everything, borrowed segments too."""
    _outside_callback("destroy")
    _TABLE.find(handle).worker.close()
    _TABLE.find(handle, take=True)
    return Status.OK, None


@_on_session
def info(opened: _Open) -> Answer[Info]:
    """What the session makes."""
    profile = opened.worker.profile
    segments = len(plan_segments(profile.blocks, profile.noisy, profile.neighbours))
    most = min(1 + profile.noisy * profile.block_frames, profile.frames)
    size = most * profile.height * profile.width * 3
    return Status.OK, Info(profile.width, profile.height, profile.frames, segments, most, size, float(profile.fps))


@_on_session
def submit(opened: _Open, request: str | bytes, pixels: Pixels | None = None) -> Answer[None]:
    """Start what a JSON object asks (`capi_json.Ask`), on its image or these pixels, which are copied."""
    profile = opened.worker.profile
    opened.worker.submit(read_request(request, pixels, profile.width, profile.height))
    return Status.OK, None


@_on_session
def poll(opened: _Open) -> Answer[Place]:
    """Where the request is. A failed one is a state here; fetching its next segment gives the status."""
    return Status.OK, opened.worker.place()


@_on_session
def next_segment(opened: _Open, memory: Any, timeout: float = -1) -> Answer[SegmentInfo]:
    """Copy the next segment into writable memory (buffer protocol), waiting `timeout` seconds; under 0 for ever."""

    def copy(chunk: FrameChunk) -> SegmentInfo:
        if room.nbytes < chunk.frames.nbytes:
            want = f"want {chunk.frames.nbytes}; see info().segment_bytes"
            raise CallError(Status.BUFFER_TOO_SMALL, f"memory: got {room.nbytes} bytes, {want}")
        target = np.frombuffer(room, np.uint8, chunk.frames.nbytes)
        np.copyto(target, chunk.frames.reshape(-1))  # [n, H, W, 3] -> [n * H * W * 3]
        return _describe(chunk)

    try:
        room = memoryview(memory).cast("B")
    except TypeError as error:
        raise CallError(Status.INVALID_ARGUMENT, f"memory: got {error}, want a contiguous buffer; pass one") from error
    if room.readonly:
        raise CallError(Status.INVALID_ARGUMENT, "memory: got a read-only buffer, want a writable one; pass that")
    return opened.worker.take(_seconds(timeout), copy)


@_on_session
def borrow_segment(opened: _Open, timeout: float = -1) -> Answer[tuple[SegmentInfo, int, np.ndarray]]:
    """The next segment without a copy, and the lease to release it by. Memory is held until then, or destroy."""

    def lend(chunk: FrameChunk) -> tuple[SegmentInfo, int, np.ndarray]:
        lease = _TABLE.number()
        frames = np.ascontiguousarray(chunk.frames)
        frames.flags.writeable = False
        opened.borrowed[lease] = frames
        return _describe(chunk), lease, frames

    return opened.worker.take(_seconds(timeout), lend)


@_on_session
def release_segment(opened: _Open, lease: int) -> Answer[None]:
    """Give a borrowed segment back."""
    if opened.borrowed.pop(lease, None) is None:
        want = "want one that is still borrowed; release each once"
        raise CallError(Status.INVALID_ARGUMENT, f"lease: got {str(lease)[:40]}, {want}")
    return Status.OK, None


@_on_session
def cancel(opened: _Open) -> Answer[None]:
    """Stop the request after its current step; nothing to do if none runs."""
    opened.worker.cancel()
    return Status.OK, None


@_flat
def last_error(handle: int = 0) -> Answer[str]:
    """The text of the last failed call on a session, or, for 0, by this thread; empty if there was none."""
    if handle == 0:
        return Status.OK, getattr(_TABLE.thread, "error", "")
    return Status.OK, _TABLE.find(handle).worker.last_error


@_flat
def set_log(callback: LogCallback | None, level: int = logging.INFO) -> Answer[None]:
    """Send the package's log lines from `level` up to a callback, in place of the last one; None sends none.

    It is called from any thread. When this returns, the former callback is not running and is never called again.
    """
    if not (callback is None or callable(callback)) or type(level) is not int:
        raise CallError(Status.INVALID_ARGUMENT, "log: got no function, or no number as level; pass both, or None")
    logger = logging.getLogger(__name__.partition(".")[0])
    _LOG.acquire()
    _LOG.callback = callback
    _LOG.release()
    if callback is None:
        logger.removeHandler(_LOG)
        logger.setLevel(logging.NOTSET)
    else:
        logger.setLevel(level)
        logger.addHandler(_LOG)
    return Status.OK, None


def _describe(chunk: FrameChunk) -> SegmentInfo:
    count, height, width, _ = chunk.frames.shape
    return SegmentInfo(chunk.segment, chunk.index, count, width, height, chunk.frames.nbytes)


def _seconds(timeout: float) -> float | None:
    """None for ever; anything that is no number is refused."""
    if not isinstance(timeout, (int, float)) or isnan(timeout):
        raise CallError(Status.INVALID_ARGUMENT, f"timeout: got {timeout!r}, want seconds; pass -1 to wait for ever")
    if timeout != 0:
        _outside_callback("waiting")
    return None if timeout < 0 else min(timeout, threading.TIMEOUT_MAX)
