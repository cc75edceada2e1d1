"""Pixels to frames on the host: today's bytes exactly, refusals, and the next segment made while one is looked at."""

import threading

import numpy as np
import pytest
import torch
from conftest import to_frames

from swifti2v import Progress, Request
from swifti2v.engine.errors import Cancelled, NumericsError
from swifti2v.engine.profile import Profile
from swifti2v.kernels.pixels import to_bytes
from swifti2v.runtime.frame_copy import FrameCopier

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_those_of_to_frames(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    pixels = (1.5 * torch.randn(1, 3, 5, 24, 40, generator=generator)).to(dtype)
    edges = torch.tensor([-2.0, -1.0, -0.0, 1.0, 1.0 + 1e-6, 2.0, *(torch.arange(256) / 127.5 - 1)])
    pixels.view(-1)[: len(edges)] = edges.to(dtype)
    latents = torch.zeros(1, 2, 3)
    for function in (None, to_bytes):
        copier = FrameCopier(CPU) if function is None else FrameCopier(CPU, function)
        frames, deep = copier.start(pixels, latents, 0, deep=True).wait()
        assert np.array_equal(frames, to_frames(pixels))
        assert frames.flags.writeable
        assert deep is not None
        assert (deep.dtype, deep.shape, deep.min(), deep.max()) == (np.float32, frames.shape, 0, 1)
        assert np.array_equal(np.rint(deep * 255), frames) or dtype != torch.float32
    assert FrameCopier(CPU).start(pixels, latents, 0, deep=False).wait()[1] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(value: float):
    good, bad = torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 2, 4, 4)
    bad[0, 1, 1, 2, 3] = value
    for pixels, latents, what in ((bad, good, "pixels"), (good, bad, "latents"), (bad, bad, "latents")):
        copying = FrameCopier(CPU).start(pixels, latents, 7, deep=False)
        with pytest.raises(NumericsError, match=f"segment 7: got {what} that are not finite"):
            copying.wait()


@pytest.fixture
def tiny(tiny: Profile) -> Profile:
    return tiny.override(size=(64, 64), stage1_steps=1, stage2_steps=2)


@pytest.fixture
def request_(tiny: Profile) -> Request:
    image = np.random.default_rng(0).integers(0, 256, (tiny.height, tiny.width, 3), np.uint8)
    return Request(image, "slow zoom in", seed=3, deep=True)


def test_ahead_gives_the_same_chunks(tiny: Profile, make_session, request_: Request):
    with make_session(tiny) as session:
        plain, ahead = (list(session.generate(request_, ahead=ahead)) for ahead in (False, True))
    for one, other in zip(plain, ahead, strict=True):
        assert (one.index, one.segment) == (other.index, other.segment)
        assert np.array_equal(one.frames, other.frames)
        assert one.deep is not None
        assert other.deep is not None
        assert np.array_equal(one.deep, other.deep)


def test_ahead_makes_the_next_segment_while_a_chunk_is_looked_at(tiny: Profile, make_session, request_: Request):
    second = threading.Event()

    def note(progress: Progress) -> None:
        if progress.segment == 1 and progress.what == "decoded":
            second.set()

    with make_session(tiny) as session:
        run = session.generate(request_, note, ahead=True)
        assert next(run).segment == 0
        assert second.wait(300), "segment 1 is made before its chunk is asked for"
        assert [chunk.segment for chunk in run] == [1, 2]


def test_who_leaves_early_waits_for_a_step_and_not_for_a_segment(tiny: Profile, make_session, request_: Request):
    started, go_on, seen = threading.Event(), threading.Event(), []

    def note(progress: Progress) -> None:
        if progress.segment == 1:
            seen.append(progress.what)
            started.set()
            go_on.wait(300)

    with make_session(tiny) as session:
        run = session.generate(request_, note, ahead=True)
        next(run)
        assert started.wait(300)
        threading.Timer(1, go_on.set).start()  # after close() has begun
        run.close()
        assert seen == ["reference ready"]
        assert not any("ahead" in thread.name for thread in threading.enumerate())
        assert len(list(session.generate(request_))) == 3, "and the session still works"


def test_what_fails_ahead_is_raised_here(tiny: Profile, make_session, request_: Request):
    with make_session(tiny) as session:
        run = session.generate(request_, lambda p: p.segment < 1 or p.what != "step 2", ahead=True)
        assert next(run).segment == 0
        with pytest.raises(Cancelled, match="stopped on request"):
            next(run)
    with make_session(tiny, spoil="stage2") as session, pytest.raises(NumericsError, match="segment 0: got latents"):
        list(session.generate(request_, ahead=True))
