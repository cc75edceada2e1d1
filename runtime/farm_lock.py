"""One worker per shot: a lock file that says who holds it and whose modification time is its heartbeat.

Creating it is exclusive (O_EXCL, which NFS keeps from version 3 on). A holder that died on this machine is known at
once, as the kernel drops its flock; one on another machine by a heartbeat older than LEASE, by the file server's clock.
A worker that was only asleep finds at its next write that the shot is taken. Frames never depend on the lock: files
appear whole, and two workers would write the same bytes.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from .farm_errors import LockLost

try:
    import fcntl
except ImportError:  # Windows: the heartbeat alone decides
    fcntl = None

BEAT = 15.0  # seconds between heartbeats
LEASE = 150.0  # seconds without one after which a holder elsewhere counts as dead; NFS may show them a minute late
SETTLE = 1.0  # seconds in which workers that take over the same lock see who wrote last


def read_boot() -> str:
    """What tells this machine's present run from all others; empty where the system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `boot` tells this machine's present run from all others."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    boot: str = field(default_factory=read_boot)
    token: str = field(default_factory=lambda: secrets.token_hex(16))


class ShotLock:
    """A held lock, from `take` to `release`; a context manager."""

    def __init__(self, path: Path, handle: int, holder: Holder, beat: float) -> None:
        self._path, self._handle, self._holder = path, handle, holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(beat,), daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, path: Path, beat: float = BEAT, lease: float = LEASE, settle: float = SETTLE) -> "ShotLock | None":
        """The lock, or None where a living worker holds it."""
        for _ in range(3):  # a lock may be given back between two looks at it
            handle, made = _open(path)
            if handle is None:
                continue
            holder, gone, kept = Holder(), "", False
            try:
                if made:
                    _flock(handle, wait=True)  # who looks at a new lock lets go at once
                else:
                    gone = _gone(path, handle, lease)
                    if not gone:
                        return None
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(asdict(holder)).encode())
                os.fsync(handle)
                if gone == "silent":
                    time.sleep(settle)
                kept = _read(path) == holder
                if kept:
                    return cls(path, handle, holder, beat)
            except OSError:  # a full disk: a lock that names nobody would be waited for
                if made:
                    path.unlink(missing_ok=True)
                raise
            finally:
                if not kept:
                    os.close(handle)
        return None

    def check(self) -> None:
        """LockLost if another worker has taken over, OSError if the folder cannot be reached."""
        if _read(self._path) != self._holder:
            raise LockLost(f"{self._path}: got another worker's lock, want this one's; it goes on with the shot")

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _read(self._path) == self._holder:
                self._path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._handle)

    def __enter__(self) -> "ShotLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _keep(self, beat: float) -> None:
        while not self._stop.wait(beat):
            with contextlib.suppress(OSError):  # a network that is away comes back, or the next write says so
                if _read(self._path) != self._holder:
                    return
                os.utime(self._path)


def is_held(path: Path) -> bool:
    """Whether a living worker holds the lock; takes nothing."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _gone(path, handle, LEASE)
    finally:
        os.close(handle)


def _open(path: Path) -> tuple[int | None, bool]:
    """A handle of the lock file, and whether this call made it."""
    with contextlib.suppress(FileExistsError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, os.O_RDWR), False
    return None, False


def _gone(path: Path, handle: int, lease: float) -> Literal["", "died", "silent"]:
    """Whether the holder is gone, and how it is known. Leaves this handle with the flock if there is one to be had."""
    locked = _flock(handle, wait=False)
    if locked is False:
        return ""
    holder = _read(path)
    if locked and holder is not None and holder.boot and holder.boot == read_boot():
        return "died"
    return "silent" if _server_time(path) - os.fstat(handle).st_mtime > lease else ""


def _flock(handle: int, wait: bool) -> bool | None:
    """True if this handle has the flock now, False if another has, None where the file system knows none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(path: Path) -> Holder | None:
    """Who holds the lock at `path`; None while nobody is written there. Opened anew, which makes NFS look again."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _server_time(path: Path) -> float:
    """Now, by the clock that sets the modification times in this folder."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(8)}.probe")  # a holder deletes what ends in .part
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
