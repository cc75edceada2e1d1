"""Farm jobs: workers that are killed, disks that fill, two workers on one folder. The frames are the same each time."""

import contextlib
import errno
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from farm_support import Workers, contents, frames, make_farm, open_models, shot
from PIL import Image

from swifti2v import Session, load_models
from swifti2v.engine.errors import EnvironmentMismatch
from swifti2v.runtime.farm import Farm, News
from swifti2v.runtime.farm_errors import FarmError, is_transient
from swifti2v.runtime.farm_folder import LOCK, RECORD, STATE
from swifti2v.runtime.farm_state import Saved, load_state, save_state

Render = Callable[..., list[str]]


@pytest.fixture(scope="module")
def farm_at() -> Iterator[Callable[..., Farm]]:
    """Makes farms of this process: `farm_at(folder, suffix)`."""
    loaded = open_models()
    with Session.open(loaded) as session:
        yield lambda folder, suffix="png", **changes: make_farm(folder, loaded, session, suffix, **changes)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as started:
        yield started


@pytest.fixture(scope="module")
def whole(farm_at, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """The files of a job that nothing interrupted: `whole("png")`."""
    made: dict[str, dict[str, str]] = {}

    def make(suffix: str) -> dict[str, str]:
        if suffix not in made:
            folder = tmp_path_factory.mktemp("whole") / "job"
            assert render(farm_at(folder, suffix)) == ["done"]
            made[suffix] = contents(folder)
        return made[suffix]

    return make


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def render(farm: Farm, *shots, news: Callable[[News], object] = lambda _: None) -> list[str]:
    return [result.status for result in farm.render(shots or (shot(),), news)]


def test_finished_shots_are_skipped_and_a_bad_one_does_not_stop_the_others(farm_at, tmp_path: Path):
    shots = (shot("a"), shot("bad", image=Path("none.jpg")), shot("b", seed=4))
    news: list[News] = []
    assert render(farm_at(tmp_path / "job"), *shots, news=news.append) == ["done", "failed", "done"]
    assert [item.fraction for item in news] == sorted(item.fraction for item in news)
    assert news[-1].fraction == 1
    before = frames(tmp_path / "job")
    assert len(before) == 66
    assert render(farm_at(tmp_path / "job"), *shots) == ["skipped", "failed", "skipped"]
    assert frames(tmp_path / "job") == before
    one, other = ([read(path) for path in sorted((tmp_path / "job" / name).glob("*.png"))] for name in "ab")
    assert np.array_equal(one[0], other[0]), "both begin with the photo"
    assert not np.array_equal(one[1], other[1]), "and go on with another seed"
    record = json.loads((tmp_path / "job" / "a" / RECORD).read_text())
    assert (record["output"], record["request"]["seed"], len(record["files"])) == ("a.####.png", 3, 33)
    assert sorted(path.name for path in (tmp_path / "job" / "a").iterdir() if path.suffix != ".png") == [
        RECORD, "shot.json",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "exr", "mp4"])
def test_a_killed_shot_goes_on_after_its_last_segment(workers: Workers, whole, tmp_path: Path, suffix: str):
    job = tmp_path / "job"
    if suffix == "exr":
        pytest.importorskip("OpenEXR")
    code, _ = workers.run(job, suffix=suffix, until=lambda line: line.startswith("a segment segment 1/"))
    assert code == -9
    assert (job / "a" / STATE).is_file()
    before = frames(job)
    assert before, "frames of the first segment are there"
    code, told = workers.run(job, suffix=suffix)
    assert code == 0
    assert told[0] in ("a started 1 of 3 segments are there", "a started 2 of 3 segments are there")
    assert not any("Stage I," in line or "segment 1/3" in line for line in told), "nothing is made twice"
    assert contents(job) == whole(suffix)
    if suffix != "mp4":  # whose segments go when the clip is there
        assert {name: frames(job)[name] for name in before} == before, "and no file is written twice"


def kill_and_resume(workers: Workers, job: Path, moment: float) -> dict[str, str]:
    """Kill a worker at a moment, let another one finish; files that were there keep their modification times."""
    workers.run(job, after=moment)
    before = frames(job) if job.is_dir() else {}
    assert workers.run(job)[0] == 0
    after = frames(job)
    assert {name: after[name] for name in before} == before
    return {name: digest for name, (digest, _) in after.items()}


def seconds_of_a_run(workers: Workers, folder: Path) -> float:
    start = time.perf_counter()
    assert workers.run(folder)[0] == 0
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("count", "seed"), [(2, 1), pytest.param(20, 2, marks=pytest.mark.slow)], ids=["a few", "many"]
)
def test_kills_at_random_moments_change_nothing(workers: Workers, whole, tmp_path: Path, count: int, seed: int):
    length = seconds_of_a_run(workers, tmp_path / "timed")
    moments = random.Random(seed)
    for number in range(count):
        assert kill_and_resume(workers, tmp_path / str(number), moments.uniform(0, length)) == whole("png")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], object]]:
    """A file system of that size at `folder`, and a function that gives it another one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(("suffix", "sizes"), [("png", ("120k", "700k", "1300k")), ("mp4", ("120k", "700k", "1300k"))])
def test_a_full_disk_stops_the_job_and_more_space_finishes_it(farm_at, whole, tmp_path: Path, suffix: str, sizes):
    with small_disk(tmp_path / "disk", sizes[0]) as resize:
        job = tmp_path / "disk" / "job"
        before: dict[str, tuple[str, int]] = {}
        for size in sizes:
            resize(size)
            result = farm_at(job, suffix).render([shot()], lambda _: None)[0]
            assert result.status == "stopped"
            assert "No space left" in result.text or "os error 28" in result.text
            assert not list(job.rglob("*.part"))
            assert not list(job.rglob("lock"))
            after = frames(job)
            assert {name: after[name] for name in before} == before
            before = after
        assert before, "some of it was there before the last run"
        resize("64m")
        assert render(farm_at(job, suffix)) == ["done"]
        assert contents(job) == whole(suffix)


def test_a_lost_mount_stops_the_job(farm_at, whole, tmp_path: Path):
    """The folder goes away after the second segment, and comes back."""
    job, away = tmp_path / "job", tmp_path / "away"

    def lose(news: News) -> None:
        if news.text == "segment 2/3":
            job.rename(away)

    assert render(farm_at(job), shot(), shot("b"), news=lose) == ["stopped"]
    assert not job.exists(), "nothing is written where the mount was"
    away.rename(job)
    assert render(farm_at(job)) == ["done"]
    assert contents(job) == whole("png")


def test_two_workers_share_a_folder(farm_at, workers: Workers, whole, tmp_path: Path):
    job = tmp_path / "job"
    shots = (shot("a"), shot("b", seed=4), shot("c", seed=5))
    ours: list[str] = []
    thread = threading.Thread(target=lambda: ours.extend(render(farm_at(job), *shots)))
    thread.start()
    _, told = workers.run(job, shots[::-1])
    thread.join()
    theirs = [next(line.split()[1] for line in reversed(told) if line.startswith(f"{one.name} ")) for one in shots]
    for pair in zip(ours, theirs, strict=True):
        assert sorted(pair) in (["busy", "done"], ["done", "skipped"]), "one of the two makes a shot"
    assert len(contents(job)) == 99
    alone = tmp_path / "alone"
    assert render(farm_at(alone), *shots) == ["done"] * 3
    assert contents(job) == contents(alone)
    assert {name: digest for name, digest in contents(job).items() if name.startswith("a/")} == whole("png")


def begin(farm: Farm, segments: int) -> None:
    """Stop a shot, as a signal would, after so many segments."""

    def stop(news: News) -> None:
        if news.event == "segment" and news.text.startswith(f"segment {segments}/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render(farm, news=stop)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x81  # no ASCII any more
    path.write_bytes(data)


def test_damage_is_found_and_mended(farm_at, whole, tmp_path: Path):
    for name, segments in ((STATE, 1), ("a.1005.png", 2), ("segments/0000.json", 2)):
        job = tmp_path / Path(name).stem
        begin(farm_at(job), segments)
        before = frames(job)
        flip(job / "a" / name)
        told: list[News] = []
        assert render(farm_at(job), news=told.append) == ["done"]
        assert any("starts over" in news.text for news in told)
        assert contents(job) == whole("png")
        after = frames(job)
        assert {n for n in before if after[n] != before[n]} <= {f"a/{name}"}, "what was whole is left alone"


def test_fewer_states_give_the_same_frames(farm_at, whole, tmp_path: Path):
    begin(farm_at(tmp_path / "job", state_every=2), 1)
    before = frames(tmp_path / "job")
    assert not (tmp_path / "job" / "a" / STATE).exists()
    assert render(farm_at(tmp_path / "job", state_every=2)) == ["done"]
    assert contents(tmp_path / "job") == whole("png")
    assert {name: frames(tmp_path / "job")[name] for name in before} == before


def test_a_different_worker_is_refused_unless_told(farm_at, tmp_path: Path):
    job = tmp_path / "job"
    begin(farm_at(job), 1)
    other = replace(farm_at(job), weights={"all": "others"})
    with pytest.raises(EnvironmentMismatch, match=r"weights.all 'others' in place of 'untrained-0'.*--allow-different"):
        render(other)
    narrow = replace(farm_at(job), loaded=replace(farm_at(job).loaded, dtype=torch.bfloat16))
    with pytest.raises(EnvironmentMismatch, match="dtype 'bfloat16' in place of 'float32'"):
        render(narrow)
    assert render(replace(other, allow_different=True)) == ["done"]


def test_a_shot_goes_on_in_another_dtype_if_told(farm_at, tmp_path: Path):
    job = tmp_path / "job"
    begin(farm_at(job), 1)
    before = contents(job)
    loaded = load_models(farm_at(job).loaded.profile, dtype=torch.bfloat16)
    told: list[News] = []
    with Session.open(loaded) as session:
        assert render(make_farm(job, loaded, session, allow_different=True), news=told.append) == ["done"]
    assert not any("starts over" in news.text for news in told)
    assert {name: contents(job)[name] for name in before} == before


def test_memory_that_ran_out_is_tried_again():
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(1 << 56)
    with pytest.raises(MemoryError) as numpy_error:
        np.empty(1 << 56)
    assert is_transient(torch_error.value)
    assert is_transient(numpy_error.value)
    assert is_transient(OSError(errno.ENOMEM, "no memory"))
    assert not is_transient(RuntimeError("shapes differ"))


def test_a_disk_without_links_holds_a_job(farm_at, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert render(farm_at(tmp_path / "job")) == ["done"]
    assert not list((tmp_path / "job").glob("*.part"))


def test_another_profile_or_format_is_another_job(farm_at, tmp_path: Path):
    job = tmp_path / "job"
    begin(farm_at(job), 1)
    farm = farm_at(job)
    longer = replace(farm, loaded=replace(farm.loaded, profile=farm.loaded.profile.override(frames=37)))
    for other, words in ((longer, "profile: got frames 37 in place of 33"), (farm_at(job, "mp4"), "format 'mp4'")):
        with pytest.raises(FarmError, match=words):
            render(replace(other, allow_different=True))


@pytest.mark.parametrize("finished", [False, True])
def test_a_shot_that_was_changed_is_refused(farm_at, tmp_path: Path, finished: bool):
    farm = farm_at(tmp_path / "job")
    if finished:
        assert render(farm) == ["done"]
    else:
        begin(farm, 1)
    result = farm.render([shot(prompt="pan left")], lambda _: None)[0]
    assert result.status == "failed"
    assert "prompt 'pan left' in place of 'zoom'" in result.text


def tensors(saved: Saved) -> list[torch.Tensor]:
    state = saved.state
    caches = (*state.motion_cache, *state.reference_cache, *state.decoder_cache)
    return [saved.motion, state.anchor, state.latents, state.reference, *caches]


def test_a_state_comes_back_as_it_was(farm_at, tmp_path: Path):
    begin(farm_at(tmp_path / "job"), 2)
    path = tmp_path / "job" / "a" / STATE
    saved = load_state(path, torch.device("cpu"), torch.float32)
    assert saved.state.segment == 2
    assert saved.motion.shape[2] == 9
    save_state(tmp_path / "again", saved)
    again = load_state(tmp_path / "again", torch.device("cpu"), torch.float32)
    assert again.state.segment == 2
    for one, other in zip(tensors(saved), tensors(again), strict=True):
        assert torch.equal(one, other)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FarmError, match="the shot starts over"):
        load_state(path, torch.device("cpu"), torch.float32)


def test_a_worker_that_wakes_up_too_late_writes_nothing_more(farm_at, whole, tmp_path: Path):
    """While it sleeps after its first segment, another one takes the shot over and finishes it."""
    job = tmp_path / "job"

    def sleep(news: News) -> None:
        if news.event == "segment" and news.text.startswith("segment 1/"):
            (job / "a" / LOCK).unlink()
            assert render(farm_at(job)) == ["done"]

    assert render(farm_at(job), news=sleep) == ["busy"]
    assert contents(job) == whole("png")
    assert (job / "a" / RECORD).is_file()
    assert not list(job.rglob("*.part"))
