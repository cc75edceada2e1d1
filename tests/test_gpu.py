"""What needs a CUDA device: the same clip as on the CPU, and memory that does not grow. `make test-gpu` runs these."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import to_frames

from swifti2v import Profile, Request, Session, get_profile, load_models
from swifti2v.runtime.cuda_graphs import CapturedExecutable, capture_steps
from swifti2v.runtime.frame_copy import FrameCopier
from swifti2v.runtime.fused import TABLE, accelerate
from swifti2v.runtime.inspection import describe_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


def frames(profile: Profile, device: str, dtype: torch.dtype) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (profile.height, profile.width, 3), np.uint8)
    with Session.open(load_models(profile, device=device, dtype=dtype)) as session:
        return np.concatenate([chunk.frames for chunk in session.generate(Request(image, "slow zoom in"))])


@pytest.fixture(autouse=True)
def exact_fp32():
    """fp32 means fp32: no TF32 in products or convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_cuda_gives_the_cpus_frames_in_fp32(name: str):
    one, other = (frames(get_profile(name), device, torch.float32) for device in ("cpu", "cuda"))
    difference = np.abs(one.astype(int) - other.astype(int))
    assert difference.mean() < 0.05
    assert np.percentile(difference, 99.9) <= 2


def test_bf16_stays_near_fp32():
    wide, narrow = (frames(get_profile("nano"), "cuda", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert np.abs(wide.astype(int) - narrow.astype(int)).mean() < 8


def test_device_memory_does_not_grow_with_the_clip():
    peaks = []
    for length in (33, 97):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        frames(get_profile("nano").override(frames=length), "cuda", torch.bfloat16)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.05 * peaks[0]


def test_captured_graphs_give_the_same_frames_and_only_device_work():
    profile = get_profile("nano")
    image = np.random.default_rng(0).integers(0, 256, (profile.height, profile.width, 3), np.uint8)
    made = []
    for captured in (False, True):
        with Session.open(load_models(profile, device="cuda", dtype=torch.bfloat16)) as session:
            if captured:
                session.graphs = capture_steps(session.graphs, session.device)
            request = Request(image, "slow zoom in")
            clips = [np.concatenate([chunk.frames for chunk in session.generate(request)]) for _ in range(2)]
            made.append(clips[1])
            if captured:
                step = session.graphs["stage2_next"]
                assert isinstance(step, CapturedExecutable)
                assert step.kernels()
                assert not any("Host" in name for name in step.kernels())
    assert np.array_equal(*made)


def test_outputs_of_a_captured_graph_survive_the_next_call():
    models = load_models(get_profile("tiny"), device="cuda", dtype=torch.float32)
    with Session.open(models) as session:
        graph = capture_steps(session.graphs, session.device)["stage2_next"]
        feeds = [{t.name: torch.randn(t.shape, device="cuda").to(t.dtype) for t in graph.spec.inputs} for _ in range(5)]
        for feed in feeds:
            feed["rows"].zero_()
        outputs = [graph(feed)["velocity"] for feed in feeds]
        plain = session.graphs["stage2_next"]
        for feed, output in zip(feeds, outputs, strict=True):
            assert torch.allclose(output, plain(feed)["velocity"], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_kernels_and_captured_steps_give_nearly_the_same_frames(dtype: torch.dtype, tmp_path: Path):
    profile, limit = get_profile("nano"), {torch.float32: 0.1, torch.bfloat16: 8.0}[dtype]
    plain = frames(profile, "cuda", dtype)
    said: list[str] = []
    models = load_models(profile, device="cuda", dtype=dtype)
    loaded = accelerate(models, "fused", cuda_graphs=True, cache=tmp_path, say=said.append)
    assert len(said) == 1
    assert "measured kernels" in loaded.backend
    image = np.random.default_rng(0).integers(0, 256, (profile.height, profile.width, 3), np.uint8)
    with Session.open(loaded) as session:
        chunks = list(session.generate(Request(image, "slow zoom in"), ahead=True))
        assert isinstance(session.graphs["stage2_next"], CapturedExecutable)
    made = np.concatenate([chunk.frames for chunk in chunks])
    assert np.abs(made.astype(int) - plain.astype(int)).mean() < limit
    rows = describe_kernels(tmp_path / TABLE)
    assert all(row["ms"] <= row["plain_ms"] for row in rows if row["runs"] != "eager")
    assert not [row["refused"] for row in rows if "fused" in row["refused"]], "every op runs on this GPU"
    again = accelerate(load_models(profile, device="cuda", dtype=dtype), "auto", cache=tmp_path, say=said.append)
    assert again.acceleration.attention == loaded.acceleration.attention
    assert len(said) == 1, "nothing is measured twice"


def test_frames_leave_in_page_locked_memory_beside_other_work():
    copier = FrameCopier(torch.device("cuda"))
    pixels = torch.randn(1, 3, 12, 256, 384, device="cuda", dtype=torch.bfloat16)
    want = to_frames(pixels.cpu())
    copying = copier.start(pixels, pixels, 1, deep=True)
    del pixels
    busy = [torch.randn(4096, 4096, device="cuda") @ torch.randn(4096, 4096, device="cuda") for _ in range(8)]
    assert copying.frames.is_pinned()
    assert copying.deep is not None
    assert copying.deep.is_pinned()
    got, deep = copying.wait()
    assert np.array_equal(got, want)
    assert deep is not None
    assert np.abs(deep * 255 - got).max() <= 0.51
    assert len(busy) == 8
