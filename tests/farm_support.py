"""What the tests of farm jobs share: workers that are real processes, forked from one that has the models open.

Run as a script it is that process: it takes jobs as JSON lines on stdin and tells what happens on stdout.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from swifti2v import Loaded, Session, get_profile, load_models
from swifti2v.runtime.farm import Farm, Result
from swifti2v.runtime.farm_folder import Output
from swifti2v.runtime.farm_shots import Shot

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "photo.jpg"
SIZE = (64, 64)
OUTPUTS = {name: Output(name, "acescg" if name == "exr" else "srgb", 1001) for name in ("mp4", "png", "exr")}


def shot(name: str = "a", seed: int = 3, prompt: str = "zoom", image: Path = PHOTO) -> Shot:
    return Shot(name, str(image), prompt, None, seed, "crop")


def open_models() -> Loaded:
    torch.set_num_threads(1)
    return load_models(get_profile("tiny").override(size=SIZE), dtype=torch.float32)


def make_farm(folder: Path, loaded: Loaded, session: Session, suffix: str = "png", **changes) -> Farm:
    return Farm(folder, session, loaded, {"all": "untrained-0"}, OUTPUTS[suffix], **changes)


def frames(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and modification time of every frame file that is there, by its path below the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".exr", ".npy", ".mp4")]
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }


def contents(folder: Path) -> dict[str, str]:
    return {name: digest for name, (digest, _) in frames(folder).items()}


class Workers:
    """Starts workers on job folders. A context manager."""

    def __enter__(self) -> "Workers":
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
        assert self._line() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(60) == 0

    def run(
        self,
        folder: Path,
        shots: Sequence[Shot] = (shot(),),
        suffix: str = "png",
        until: Callable[[str], bool] = lambda line: False,
        after: float | None = None,
    ) -> tuple[int, list[str]]:
        """Run one worker to its end, or kill it (-9) when it tells what `until` waits for, or so many seconds after.

        Returns its exit code, -9 for a killed one, and what it told.
        """
        assert self._process.stdin is not None
        job = {"folder": str(folder), "shots": [vars(one) for one in shots], "suffix": suffix}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        pid, told = int(self._line()), []
        timer = None if after is None else threading.Timer(after, _kill, [pid])
        if timer is not None:
            timer.start()
        while not (line := self._line()).startswith("exit "):
            told.append(line)
            if until(line):
                _kill(pid)
        if timer is not None:
            timer.cancel()
            timer.join()
        return os.waitstatus_to_exitcode(int(line.split()[1])), told

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the workers' process has died"
        return line.strip()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended just now
        os.kill(pid, signal.SIGKILL)


def _tell(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # one write: no half line when a kill comes


def _work(job: dict, loaded: Loaded, session: Session) -> list[Result]:
    farm = make_farm(Path(job["folder"]), loaded, session, job["suffix"])
    return farm.render(
        [Shot(**one) for one in job["shots"]], lambda news: _tell(f"{news.shot} {news.event} {news.text}")
    )


def _serve() -> None:
    loaded = open_models()
    session = Session.open(loaded)
    _tell("ready")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _tell(str(os.getpid()))
            results = _work(json.loads(line), loaded, session)
            os._exit(0 if all(result.status in ("done", "skipped") for result in results) else 75)
        _tell(f"exit {os.waitpid(pid, 0)[1]}")


if __name__ == "__main__":
    _serve()
