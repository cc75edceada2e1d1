"""The attention case: a kernel that refuses is in the result, with its reason."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from swifti2v import get_profile
from swifti2v.benchmarks import attention_items
from swifti2v.benchmarks.models import open_models

CPU = torch.device("cpu")


def test_a_kernel_that_refuses_is_in_the_result_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(attention_items.CPU, "cudnn", SDPBackend.CUDNN_ATTENTION)  # which no CPU has
    models, said = open_models(get_profile("tiny").override(frames=13), None, CPU), []
    items = attention_items.attention_items(models, [torch.float32], said.append)
    assert [item.name for item in items] == ["attention stage1_step", "attention stage2_first"]
    for item, line in zip(items, said, strict=True):
        assert "sdpa fp32" in item.works
        assert "cudnn fp32" not in item.works
        assert "cudnn fp32 refuses and is not timed (RuntimeError: " in item.notes["sdpa fp32"]
        assert line.startswith(item.name.removeprefix("attention "))
