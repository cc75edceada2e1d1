"""The lock on a shot: one living worker holds it, a dead one does not, and none writes after it has lost it."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from swifti2v.runtime.farm_errors import LockLost
from swifti2v.runtime.farm_folder import Asked, ShotFolder
from swifti2v.runtime.farm_lock import ShotLock, is_held

HOLD = """
import sys, time
from pathlib import Path
from swifti2v.runtime.farm_lock import ShotLock
lock = ShotLock.take(Path(sys.argv[1]))
print("held" if lock else "busy", flush=True)
time.sleep(600)
"""


def elsewhere(path: Path, age: float) -> None:
    """A lock of another machine whose last heartbeat is so many seconds ago."""
    path.write_text(json.dumps({"host": "other", "pid": 1, "boot": "another boot", "token": "t"}))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_holder_that_clears_up_does_not_disturb_a_visitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a file system knows no flock, a visitor of a held lock writes a probe beside it."""
    (tmp_path / "job.json").write_text("{}")
    folder, asked, touch = ShotFolder(tmp_path, "a"), Asked("", "", None, 0, "crop"), Path.touch
    folder.make()
    elsewhere(folder.lock, 1)

    def clear_up(path: Path, **options: bool) -> None:
        touch(path, **options)
        folder.begin(asked)

    monkeypatch.setattr(Path, "touch", clear_up)
    assert is_held(folder.lock)
    assert not list(folder.path.glob("lock.*"))


def test_one_holder_at_a_time(tmp_path: Path):
    path = tmp_path / "lock"
    first = ShotLock.take(path)
    assert first is not None
    assert is_held(path)
    assert ShotLock.take(path) is None
    first.check()
    first.release()
    assert not path.exists()
    assert not is_held(path)
    with ShotLock.take(path) or pytest.fail("it was given back"):
        assert is_held(path)
    assert not list(tmp_path.iterdir())


def test_a_killed_holder_is_known_at_once(tmp_path: Path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert ShotLock.take(path) is None
        process.kill()
    started = time.monotonic()
    lock = ShotLock.take(path)
    assert lock is not None
    assert time.monotonic() - started < 1, "without waiting for its heartbeat to grow old"
    lock.release()


def test_a_holder_elsewhere_is_judged_by_its_heartbeat(tmp_path: Path):
    path = tmp_path / "lock"
    elsewhere(path, age=100)
    assert is_held(path)
    assert ShotLock.take(path) is None
    elsewhere(path, age=200)
    assert not is_held(path)
    lock = ShotLock.take(path, settle=0.01)
    assert lock is not None
    lock.check()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_an_empty_lock_is_waited_for(tmp_path: Path):
    """Its maker is about to write its name, or the machine failed just then."""
    path = tmp_path / "lock"
    path.touch()
    assert ShotLock.take(path) is None
    os.utime(path, (0, 0))
    lock = ShotLock.take(path, settle=0.01)
    assert lock is not None
    lock.release()


def test_the_heart_beats_until_the_lock_is_lost(tmp_path: Path):
    path = tmp_path / "lock"
    lock = ShotLock.take(path, beat=0.02)
    assert lock is not None
    os.utime(path, (0, 0))
    until = time.monotonic() + 10
    while path.stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert time.time() - path.stat().st_mtime < 60
    elsewhere(path, age=100)
    with pytest.raises(LockLost, match="another worker"):
        lock.check()
    time.sleep(0.2)
    assert time.time() - path.stat().st_mtime > 50, "a lost lock gets no heartbeat from who lost it"
    lock.release()
    assert path.exists(), "and is not removed by it"


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_come_at_once_one_wins(tmp_path: Path, stale: bool):
    path = tmp_path / "lock"
    if stale:
        elsewhere(path, age=1000)
    start, locks = threading.Barrier(8), []

    def come() -> None:
        start.wait()
        locks.append(ShotLock.take(path, settle=0.05))

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [lock for lock in locks if lock is not None]
    assert len(held) == 1
    held[0].check()
    held[0].release()


def test_a_lock_that_cannot_be_written_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        ShotLock.take(tmp_path / "lock")
    assert not list(tmp_path.iterdir())
