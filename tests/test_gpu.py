"""What needs a CUDA device: the same clip as on the CPU, and memory that does not grow. `make test-gpu` runs these."""

import numpy as np
import pytest
import torch

from swifti2v import Profile, Request, Session, get_profile, load_models
from swifti2v.runtime.cuda_graphs import CapturedExecutable, capture_steps

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
