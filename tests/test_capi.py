"""Flat calls: frames as a session makes them, one status for each misuse, threads, backpressure, cancelling."""

import gc
import json
import logging
import re
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import build
from capi_support import PICTURE, opened, pixels
from PIL import Image

from swifti2v import Request, Session, get_profile, load_models
from swifti2v.engine import errors
from swifti2v.runtime import capi, capi_status
from swifti2v.runtime.capi import Pixels, Status
from swifti2v.runtime.capi_status import Stage, State, status_of

ROOT = Path(__file__).resolve().parent.parent


def fetch(handle: int) -> tuple[list[capi.SegmentInfo], np.ndarray]:
    """What is left of a request: descriptions, and all frames."""
    described, frames = [], []
    while True:
        status, answer = capi.borrow_segment(handle)
        if status == Status.END:
            return described, np.concatenate(frames)
        assert status == Status.OK and answer is not None, capi.last_error(handle)  # noqa: PT018
        described.append(answer[0])
        frames.append(answer[2].copy())
        assert capi.release_segment(handle, answer[1])[0] == Status.OK


def test_frames_are_those_of_a_session(handle: int):
    profile = get_profile("tiny").override(size=(128, 64), frames=37, stage1_steps=1, stage2_steps=1)
    with Session.open(load_models(profile, dtype=torch.float32)) as session:
        expected = np.concatenate([chunk.frames for chunk in session.generate(Request(PICTURE, "pan left", seed=5))])
    assert capi.info(handle) == (Status.OK, (128, 64, 37, 3, 13, 13 * 128 * 64 * 3, 8.0))
    assert capi.submit(handle, '{"prompt": "pan left", "seed": 5}', pixels()) == (Status.OK, None)
    described, frames = fetch(handle)
    assert [(d.segment, d.first_frame, d.frames) for d in described] == [(0, 0, 13), (1, 13, 12), (2, 25, 12)]
    assert np.array_equal(frames, expected)
    assert capi.poll(handle) == (Status.OK, (State.FINISHED, Stage.STAGE2, 1.0, 3, 0))
    assert capi.borrow_segment(handle, 0)[0] == Status.END, "again and again"


@pytest.mark.parametrize(
    ("config", "status", "words"),
    [
        ({"kernels": "fused"}, Status.ENVIRONMENT, "fused kernels: got device cpu, want cuda"),
        ({"cuda_graphs": True}, Status.ENVIRONMENT, "CUDA graphs: got device cpu, want cuda"),
        ({"kernels": "fast"}, Status.INVALID_JSON, "config.kernels: got 'fast', want one of 'auto', 'eager', 'fused'"),
        ({"cuda_graphs": 1}, Status.INVALID_JSON, "config.cuda_graphs: got 1, want bool"),
    ],
)
def test_what_a_gpu_is_needed_for_is_refused_on_a_cpu(config: dict, status: Status, words: str):
    assert capi.create(json.dumps({"profile": "tiny", "device": "cpu", **config}))[0] == status
    assert words in str(capi.last_error(0)[1])


def test_progress_rises_to_one_and_generation_waits_for_the_caller():
    handle = opened(queue=1)
    seen = []
    capi.submit(handle, "{}", pixels())
    while not seen or seen[-1].segments_waiting < 1:
        place = capi.poll(handle)[1]
        assert place is not None
        seen.append(place)
        time.sleep(0.002)
    time.sleep(0.5)  # time enough for many segments of this size
    waiting = capi.poll(handle)[1]
    assert waiting is not None
    assert (waiting.state, waiting.segments_made) == (State.RUNNING, 1)
    assert waiting.progress < 1
    assert capi.submit(handle, "{}", pixels())[0] == Status.INVALID_STATE
    fetch(handle)
    numbers = [place.progress for place in (*seen, waiting)]
    assert numbers == sorted(numbers)
    assert {place.stage for place in seen} <= set(Stage)
    capi.destroy(handle)


def test_segments_are_copied_into_any_writable_memory(handle: int):
    capi.submit(handle, "{}", pixels())
    memory = np.zeros(13 * 64 * 128 * 3 + 5, np.uint8)
    for wrong in (b"bytes", "text", None, np.zeros((4, 4))[:, ::2]):
        assert capi.next_segment(handle, wrong)[0] == Status.INVALID_ARGUMENT
    assert capi.next_segment(handle, bytearray(100))[0] == Status.BUFFER_TOO_SMALL
    assert "want 319488" in str(capi.last_error(handle)[1])
    status, described = capi.next_segment(handle, memory)
    assert status == Status.OK
    assert described is not None
    assert described.segment == 0, "the one that had no room"
    assert np.array_equal(memory[: PICTURE.size], PICTURE.reshape(-1))
    assert memory[-5:].max() == 0, "and not a byte more"
    status, answer = capi.borrow_segment(handle)
    assert answer is not None
    with pytest.raises(ValueError, match="read-only"):
        answer[2][0] = 0
    for timeout in ("soon", float("nan"), None):
        assert capi.next_segment(handle, memory, timeout)[0] == Status.INVALID_ARGUMENT  # type: ignore[arg-type]
    assert capi.borrow_segment(handle, 1e300)[0] == Status.OK


def test_images_come_as_rows_or_as_files(handle: int, tmp_path: Path):
    padded = np.zeros((64, 400), np.uint8)
    padded[:, :384] = PICTURE.reshape(64, 384)  # [H, W, 3] -> [H, 3W]
    path = tmp_path / "bild-ä.png"
    Image.fromarray(PICTURE).save(path)
    ways = [
        ("{}", pixels()),
        ("{}", Pixels(padded, 128, 64, 400)),
        ("{}", Pixels(padded.reshape(-1)[:-16], 128, 64, 400)),  # the last row without its padding
        (json.dumps({"image": str(path), "fit": "exact"}), None),
    ]
    for request, rows in ways:
        assert capi.submit(handle, request, rows) == (Status.OK, None), capi.last_error()
        answer = capi.borrow_segment(handle)[1]
        assert answer is not None
        assert np.array_equal(answer[2][0], PICTURE)
        capi.cancel(handle)


def test_unknown_and_destroyed_handles_are_refused():
    handle = opened()
    assert capi.poll(handle) == (Status.OK, (State.IDLE, Stage.NONE, 0.0, 0, 0))
    assert capi.next_segment(handle, bytearray(5))[0] == Status.INVALID_STATE, "nothing was submitted"
    assert capi.cancel(handle)[0] == Status.OK, "nothing to do"
    assert capi.release_segment(handle, 1)[0] == Status.INVALID_ARGUMENT
    assert capi.destroy(handle) == (Status.OK, None)
    wrongs: list[Any] = [handle, 0, -1, 2**70, None, "1", [], 1.0, True]
    for wrong in wrongs:
        calls = [
            capi.destroy(wrong), capi.info(wrong), capi.submit(wrong, "{}", pixels()), capi.poll(wrong),
            capi.next_segment(wrong, bytearray(5)), capi.borrow_segment(wrong), capi.release_segment(wrong, 1),
            capi.cancel(wrong),
        ]  # fmt: skip
        assert calls == [(Status.INVALID_HANDLE, None)] * len(calls)
    assert capi.last_error(handle)[0] == Status.INVALID_HANDLE
    assert capi.submit()[0] == Status.FAILED  # type: ignore[call-arg]


def test_cancelling_stops_a_run_and_the_next_may_start_at_once(handle: int):
    capi.submit(handle, '{"seed": 1}', pixels())
    assert capi.cancel(handle) == (Status.OK, None)
    assert capi.poll(handle)[1][0] == State.CANCELLED  # type: ignore[index]
    assert capi.borrow_segment(handle) == (Status.CANCELLED, None)
    capi.submit(handle, '{"seed": 2}', pixels())
    _, after = fetch(handle)
    capi.submit(handle, '{"seed": 2}', pixels())
    assert np.array_equal(after, fetch(handle)[1]), "nothing of the cancelled run is left"


def test_destroy_ends_a_run_a_full_queue_and_those_who_wait():
    running, full = opened(), opened(queue=1)
    results: list[Status] = []

    def wait() -> None:
        status = Status.OK
        while status == Status.OK:
            status, _ = capi.borrow_segment(running)
        results.append(status)

    for handle in (running, full):
        capi.submit(handle, "{}", pixels())
    waiters = [threading.Thread(target=wait) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    while capi.poll(full)[1][4] < 1:  # type: ignore[index]
        time.sleep(0.01)
    assert capi.destroy(full) == (Status.OK, None)
    assert capi.destroy(running) == (Status.OK, None)
    for waiter in waiters:
        waiter.join(20)
    assert len(results) == 3
    assert set(results) <= {Status.INVALID_HANDLE, Status.END}
    names = {f"swifti2v session {handle}" for handle in (running, full)}
    assert not names & {thread.name for thread in threading.enumerate()}


def test_destroy_frees_frames_that_were_never_released():
    handle = opened()
    capi.submit(handle, "{}", pixels())
    answer = capi.borrow_segment(handle)[1]
    assert answer is not None
    frames = weakref.ref(answer[2])
    del answer
    assert frames() is not None
    capi.destroy(handle)
    gc.collect()
    assert frames() is None


def test_four_threads_with_a_session_each_do_not_meet():
    def work(seed: int) -> None:
        mine = opened(frames=13)
        capi.submit(mine, json.dumps({"seed": seed}), pixels())
        made[seed].append(fetch(mine)[1])
        assert capi.create(json.dumps({f"wrong{seed}": 1}))[0] == Status.INVALID_JSON
        barrier.wait(60)
        errors_of[seed] = str(capi.last_error()[1])
        capi.destroy(mine)

    made: dict[int, list[np.ndarray]] = {1: [], 2: []}
    errors_of: dict[int, str] = {}
    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=work, args=(1 + n % 2,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert np.array_equal(made[1][0], made[1][1])
    assert np.array_equal(made[2][0], made[2][1])
    assert not np.array_equal(made[1][0], made[2][0])
    assert all(f"'wrong{seed}'" in text for seed, text in errors_of.items()), "a thread reads its own errors"


def test_a_run_that_fails_says_so_and_the_session_goes_on(handle: int):
    graph = capi._TABLE.find(handle).worker._session.graphs["stage2_first"]
    weight = next(graph._module.parameters()).view(-1)  # type: ignore[attr-defined]
    kept = weight[0].item()
    weight[0] = float("nan")
    capi.submit(handle, "{}", pixels())
    for _ in range(2):
        assert capi.borrow_segment(handle) == (Status.NUMERICS, None)
        assert "segment 0: got latents that are not finite" in str(capi.last_error(handle)[1])
    assert capi.poll(handle)[1][0] == State.FAILED  # type: ignore[index]
    weight[0] = kept
    assert capi.submit(handle, "{}", pixels())[0] == Status.OK
    assert capi.borrow_segment(handle)[0] == Status.OK


def test_the_log_goes_to_one_callback():
    lines: list[tuple[int, str]] = []

    def note(level: int, text: str) -> None:
        lines.append((level, text))
        if handle == 0 or f"session {handle}: " not in text:
            return
        if "started" in text:
            raise RuntimeError("a callback that fails loses its line only")
        if "finished" in text:
            logging.getLogger("swifti2v").info("a line within a line")
            statuses.extend(capi.destroy(number)[0] for number in (handle, second))
            statuses.extend((capi.borrow_segment(handle)[0], capi.create("{}")[0]))
            statuses.append(capi.borrow_segment(second, 0)[0])

    statuses: list[Status] = []
    handle, second = 0, opened(frames=13)
    assert capi.set_log(note) == (Status.OK, None)
    handle = opened(frames=13)
    capi.submit(handle, "{}", pixels())
    fetch(handle)
    while len(statuses) < 5:
        time.sleep(0.01)
    assert statuses[:4] == [Status.INVALID_STATE] * 4, "what could wait for who has a line to say"
    assert statuses[4:] == [Status.INVALID_STATE]
    assert "no request yet" in str(capi.last_error(second)[1])
    capi.set_log(None)
    assert capi.destroy(handle) == capi.destroy(second) == (Status.OK, None)
    said = [(level, text.partition(": ")[2]) for level, text in lines if text.startswith(f"session {handle}: ")]
    assert said == [(20, "opened, tiny, 13 frames of 128x64 on cpu"), (20, "request started"), (20, "request finished")]
    assert not logging.getLogger("swifti2v").handlers
    assert capi.set_log("no function")[0] == Status.INVALID_ARGUMENT  # type: ignore[arg-type]


def test_a_log_handler_of_the_host_that_raises_ends_nothing():
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError(record.getMessage())

    broken = Broken()
    logger = logging.getLogger("swifti2v")
    level = logger.level
    logger.addHandler(broken)
    logger.setLevel(logging.INFO)
    try:
        handle = opened(frames=13)
        assert capi.submit(handle, "{}", pixels())[0] == Status.OK
        fetch(handle)
        assert capi.destroy(handle) == (Status.OK, None)
    finally:
        logger.removeHandler(broken)
        logger.setLevel(level)


def test_a_session_opens_a_bundle(tmp_path: Path):
    build(tmp_path / "bündel")
    status, handle = capi.create(json.dumps({"bundle": str(tmp_path / "bündel"), "stage2_steps": 1}))
    assert status == Status.OK, capi.last_error()
    assert handle is not None
    assert capi.info(handle)[1][:3] == (192, 128, 33)  # type: ignore[index]
    capi.destroy(handle)
    wrong = {"bundle": str(tmp_path / "bündel"), "size": [128, 64]}
    assert capi.create(json.dumps(wrong)) == (Status.MODEL, None)
    assert capi.create(json.dumps({"bundle": wrong["bundle"], "dtype": "bf16"})) == (Status.INVALID_JSON, None)
    assert capi.create(json.dumps({"bundle": str(tmp_path)}))[0] == Status.MODEL


def test_the_header_has_the_same_numbers():
    header = (ROOT / "native" / "include" / "swifti2v.h").read_text()
    assert f"#define SWIFTI2V_ABI_VERSION {capi.API_VERSION}\n" in header

    def numbers(enum: str) -> dict[str, int]:
        body = re.search(rf"typedef enum {enum} \{{(.*?)\}}", header, re.DOTALL)
        assert body is not None
        return {name: int(value) for name, value in re.findall(r"SWIFTI2V_(\w+) = (-?\d+)", body[1])}

    assert numbers("swifti2v_status") == {status.name: status.value for status in Status}
    assert numbers("swifti2v_state") == {f"STATE_{state.name}": state.value for state in State}
    stages = {stage.name.replace("STAGE1", "1").replace("STAGE2", "2"): stage.value for stage in Stage}
    assert numbers("swifti2v_stage") == {f"STAGE_{name}": value for name, value in stages.items()}


def test_every_error_of_the_package_has_its_status():
    expected = {
        "Cancelled": Status.CANCELLED, "EnvironmentMismatch": Status.ENVIRONMENT, "BundleError": Status.MODEL,
        "WeightsError": Status.MODEL, "ProfileError": Status.INVALID_JSON, "MediaError": Status.INVALID_IMAGE,
        "NumericsError": Status.NUMERICS,
    }  # fmt: skip
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.SwiftError):
            assert status_of(kind("x")) == expected.get(name, Status.FAILED), name
    assert status_of(MemoryError()) == Status.NO_MEMORY
    assert capi_status.text_of(ValueError("a\nb")) == "ValueError: a b"
