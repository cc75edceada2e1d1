"""What `doctor` asks the driver itself."""

import pytest
import torch

from swifti2v.runtime.cuda_probe import mismatch, probe_driver

GPU = [{"name": "some GPU", "sm": "89", "GB": 24.0}]


def test_the_probe_answers_without_a_gpu():
    facts = probe_driver()
    assert facts["driver"]
    assert isinstance(facts["devices"], list)
    assert bool(facts["devices"]) == torch.cuda.is_available() or "note" in facts


def test_no_gpu_is_no_mismatch():
    assert mismatch(13000, []) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees its GPU here")
def test_a_gpu_that_pytorch_does_not_see_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in str(mismatch(13000, GPU))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver is older than CUDA 13.0" in str(mismatch(12080, GPU))
    assert "CUDA_VISIBLE_DEVICES" in str(mismatch(13010, GPU))
