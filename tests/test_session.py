"""Sessions: frames in order, frame 0 is the image, progress, cancelling, resuming from a chunk's state."""

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.torch import save_file

from swifti2v import Progress, Request, get_profile
from swifti2v.engine.errors import Cancelled, NumericsError, SpecError
from swifti2v.engine.profile import Profile
from swifti2v.engine.state import SegmentState
from swifti2v.runtime.conditioning import Embeddings
from swifti2v.runtime.prompts import GivenPrompts
from swifti2v.runtime.session import Session, check_request


def picture(profile: Profile, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (profile.height, profile.width, 3), np.uint8)


@pytest.fixture
def request_(tiny: Profile) -> Request:
    return Request(picture(tiny), "slow zoom in", seed=3)


def test_chunks_are_in_order_and_frame_zero_is_the_image(tiny: Profile, make_session, request_: Request):
    with make_session(tiny) as session:
        chunks = list(session.generate(request_))
    assert [(chunk.index, len(chunk.frames)) for chunk in chunks] == [(0, 13), (13, 12), (25, 8)]
    assert [chunk.segment for chunk in chunks] == [0, 1, 2]
    assert all(chunk.frames.dtype == np.uint8 for chunk in chunks)
    assert np.array_equal(chunks[0].frames[0], request_.image)
    assert not np.array_equal(chunks[0].frames[1], request_.image)


def test_equal_requests_give_equal_frames(tiny: Profile, make_session, request_: Request):
    def frames(session: Session, request: Request) -> np.ndarray:
        return np.concatenate([chunk.frames for chunk in session.generate(request)])

    with make_session(tiny) as session:
        first = frames(session, request_)
        assert np.array_equal(first, frames(session, request_)), "a session has no memory of earlier requests"
        assert not np.array_equal(first, frames(session, replace(request_, seed=4)))
        assert not np.array_equal(first, frames(session, replace(request_, prompt="pan left")))
        assert not np.array_equal(first[1:], frames(session, replace(request_, image=picture(tiny, 1)))[1:])
    with make_session(tiny) as another:
        assert np.array_equal(first, frames(another, request_))


def test_frames_leave_before_the_next_segment_starts(tiny: Profile, make_session, request_: Request):
    seen: list[Progress] = []

    def note(progress: Progress) -> bool:
        seen.append(progress)
        return True

    with make_session(tiny) as session:
        run = session.generate(request_, note)
        next(run)
        assert {progress.segment for progress in seen if progress.phase == "stage2"} == {0}
        list(run)
    stage1 = [(p.done, p.total, p.what) for p in seen if p.phase == "stage1"]
    assert stage1 == [(1, 5, "image encoded"), *((n + 1, 5, f"step {n}") for n in range(1, 5))]
    stage2 = [(p.segment, p.done) for p in seen if p.phase == "stage2"]
    assert stage2 == [(segment, part) for segment in range(3) for part in range(1, 7)]
    assert [p.what for p in seen if p.segment == 2] == [
        "reference ready", "step 1", "step 2", "step 3", "step 4", "decoded",
    ]  # fmt: skip
    assert all((p.total, p.segments) == (6, 3) for p in seen if p.phase == "stage2")


@pytest.mark.parametrize(("phase", "what"), [("stage1", "step 2"), ("stage2", "step 1"), ("stage2", "decoded")])
def test_a_run_stops_between_steps(tiny: Profile, make_session, request_: Request, phase: str, what: str):
    with make_session(tiny) as session:
        with pytest.raises(Cancelled, match=f"{phase}: stopped on request after {what}"):
            list(session.generate(request_, lambda p: not (p.phase == phase and p.what == what)))
        assert len(list(session.generate(request_))) == 3, "and the session still works"


def save(state: SegmentState, path: Path) -> None:
    tensors = {name: getattr(state, name).contiguous() for name in ("anchor", "latents", "reference")}
    for name in ("motion_cache", "reference_cache", "decoder_cache"):
        tensors |= {f"{name}.{i}": cache.contiguous() for i, cache in enumerate(getattr(state, name))}
    save_file(tensors, path, {"segment": str(state.segment)})


def load(path: Path) -> SegmentState:
    with safe_open(path, "pt") as file:
        tensors, segment = {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["segment"])  # noqa: SIM118
    caches = {
        name: tuple(tensors[f"{name}.{i}"] for i in range(sum(key.startswith(name) for key in tensors)))
        for name in ("motion_cache", "reference_cache", "decoder_cache")
    }
    return SegmentState(segment, tensors["anchor"], tensors["latents"], tensors["reference"], **caches)


def test_a_run_resumes_from_any_saved_state_to_the_same_bits(
    tiny: Profile, make_session, request_: Request, tmp_path: Path
):
    with make_session(tiny) as session:
        clip, state = session.prepare(request_)
        save(state, tmp_path / "0")
        chunks = list(session.resume(request_, clip, state, on_state=lambda s: save(s, tmp_path / str(s.segment))))
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["0", "1", "2", "3"]
        for start in range(4):
            again = list(session.resume(request_, clip, load(tmp_path / str(start))))
            assert [chunk.index for chunk in again] == [chunk.index for chunk in chunks[start:]]
            for one, other in zip(again, chunks[start:], strict=True):
                assert np.array_equal(one.frames, other.frames)


def test_image_tokens_come_from_the_image_encoder(tiny: Profile, make_session, request_: Request):
    profile = replace(tiny, stage1=replace(tiny.stage1, dit=replace(tiny.stage1.dit, image_dim=12, image_tokens=5)))
    with pytest.raises(SpecError, match="pass --image-encoder"):
        make_session(profile)
    plain = make_session(tiny)
    tokens = torch.randn(1, 5, 12)
    with make_session(profile, image_encoder=lambda frame: tokens) as session:
        first = next(session.generate(request_)).frames
    with make_session(profile, image_encoder=lambda frame: -tokens) as session:
        assert not np.array_equal(first, next(session.generate(request_)).frames)
    plain.close()


def test_ready_embeddings_take_the_encoders_place(tiny: Profile, make_session, request_: Request):
    session = make_session(tiny)
    rows = session._encoder.encode_all([request_.prompt])[0]
    given = Session(tiny, session.graphs, GivenPrompts(Embeddings(rows), "given"))
    expected = next(session.generate(request_)).frames
    assert np.array_equal(next(given.generate(replace(request_, prompt=""))).frames, expected)


def test_wrong_images_are_refused(tiny: Profile, make_session):
    with make_session(tiny) as session:
        for image in (np.zeros((128, 190, 3), np.uint8), np.zeros((128, 192, 3), np.float32)):
            with pytest.raises(SpecError, match=r"want uint8 \(128, 192, 3\)"):
                next(session.generate(Request(image)))


def encodable(text: object) -> bool:
    with contextlib.suppress(UnicodeEncodeError):
        return isinstance(text, str) and bool(text.encode() or True)
    return False


@settings(max_examples=200)
@given(
    change=st.fixed_dictionaries(
        {},
        optional={
            "image": st.sampled_from([None, "photo.jpg", b"", 0])
            | hnp.arrays(np.uint8, hnp.array_shapes(max_dims=4, max_side=5))
            | hnp.arrays(np.float32, (2, 2, 3)),
            "seed": st.integers() | st.floats() | st.none() | st.text(max_size=3),
            "prompt": st.text(st.characters(codec=None), max_size=5)
            | st.none()
            | st.binary(max_size=3)
            | st.integers(),
            "negative": st.text(st.characters(codec=None), max_size=5) | st.binary(min_size=1, max_size=3),
        },
    )
)
def test_malformed_requests_are_refused(change: dict):
    """Before anything runs, in one line."""
    tiny = get_profile("tiny")
    good = "image" not in change and all(encodable(change[name]) for name in ("prompt", "negative") if name in change)
    good = good and type(change.get("seed", 0)) is int and 0 <= change.get("seed", 0) < 2**63
    request = replace(Request(picture(tiny)), **change)
    if good:
        check_request(request, tiny)
        return
    with pytest.raises(SpecError) as caught:
        check_request(request, tiny)
    assert re.fullmatch(r"\w+: got .*, want .*; .*", str(caught.value))


def test_weights_that_give_nan_stop_the_run(tiny: Profile, make_session, request_: Request):
    with make_session(tiny, spoil="stage2") as session, pytest.raises(NumericsError, match="segment 0"):
        list(session.generate(request_))


def test_closed_sessions_do_not_run(tiny: Profile, make_session, request_: Request):
    session = make_session(tiny)
    session.close()
    with pytest.raises(RuntimeError, match="after close"):
        list(session.generate(request_))


PEAK = """
import json, resource, sys
import numpy as np
from swifti2v import Request, Session, get_profile, load_models
profile = get_profile("tiny").override(frames=int(sys.argv[1]), size=(384, 256))
image = np.zeros((profile.height, profile.width, 3), np.uint8)
import torch
with Session.open(load_models(profile, dtype=torch.float32)) as session:
    count = sum(len(chunk.frames) for chunk in session.generate(Request(image)))
print(json.dumps([count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.serial
def test_peak_memory_does_not_grow_with_the_clip():
    """Peak resident memory of whole processes, 33 and 97 frames, at 384x256: less than 5 % apart."""
    peaks = {}
    for frames in (33, 97):
        command = [sys.executable, "-c", PEAK, str(frames)]
        # What the process holds, without what the C library keeps for later.
        plain = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        count, peaks[frames] = json.loads(ran.stdout)
        assert count == frames
    assert peaks[97] < 1.05 * peaks[33], f"{peaks} kB"
