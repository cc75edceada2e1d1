"""What needs a CUDA device: the same clip as on the CPU, and memory that does not grow. `make test-gpu` runs these."""

import numpy as np
import pytest
import torch

from swifti2v import Profile, Request, Session, get_profile, load_models

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
