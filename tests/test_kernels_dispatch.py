"""Choosing an attention: candidates, tables, what a table is written as; measuring, which means little on a CPU."""

import json
import time
import warnings

import pytest
import torch

from swifti2v.kernels.dispatch import (
    Choice,
    ChoiceTable,
    Shape,
    Timing,
    candidates,
    elapsed_ms,
    installed,
    measure,
    random_inputs,
    refusal,
    run_backend,
    sample_rows,
)
from swifti2v.kernels.kernel_set import shape_of
from swifti2v.kernels.kernel_table import KernelTable, OpTiming
from swifti2v.kernels.window_attention import attend_eager

WINDOW = Shape(1, 24, 17600, 17600, 0, 128, "bf16")
PRUNED = Shape(1, 24, 10560, 17600, 0, 128, "bf16")
EVERYTHING = {"torch": "2.11", "triton": "3.6", "flash-attn-2": "2.8", "flash-attn-3": "3.0"}


def choice(shape: Shape = WINDOW, gpu: str = "H200", **medians: float) -> Choice:
    timings = (Timing(name.replace("_", "-"), (ms, ms + 1, ms - 1), 1e-3) for name, ms in medians.items())
    return Choice(shape, gpu, {"torch": "2.11"}, tuple(timings))


def test_candidates_follow_the_device_and_what_is_installed():
    on_hopper = candidates(WINDOW, 90, EVERYTHING)
    assert {"sdpa", "cudnn", "flash", "efficient", "flash-attn-2", "flash-attn-3"} < set(on_hopper)
    assert sum(name.startswith("triton-") for name in on_hopper) == 3
    assert len(set(on_hopper)) == len(on_hopper)
    assert "flash-attn-3" not in candidates(WINDOW, 89, EVERYTHING)
    assert not any("triton" in name or "attn" in name for name in candidates(WINDOW, 90, {"torch": "2.11"}))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "arch", "want"),
    [
        (128, "fp32", 90, {"sdpa", "efficient"}),
        (128, "bf16", 75, {"sdpa", "efficient"}),
        (640, "bf16", 90, {"sdpa", "efficient"}),  # the VAE's one-head attention
        (96, "bf16", 80, {"sdpa", "efficient", "flash", "flash-attn-2", "cudnn"}),
    ],
)
def test_shapes_that_few_backends_take(head_dim: int, dtype: str, arch: int, want: set[str]):
    assert set(candidates(Shape(1, 1, 64, 64, 0, head_dim, dtype), arch, EVERYTHING)) == want


def test_the_fastest_that_counts_is_chosen():
    wrong = Timing("flash", (1.0,), error=0.3, refused="relative error 3.0e-01, the limit is 2e-02")
    failed = Timing("flash-attn-3", refused="RuntimeError: no kernel image")
    good = choice(cudnn=66.0, triton_128x64=80.0)
    mixed = Choice(WINDOW, "H200", {}, (wrong, failed, *good.timings))
    assert mixed.best.backend == "cudnn"
    assert mixed.teraflops == pytest.approx(4 * 24 * 17600**2 * 128 / 66e-3 / 1e12)
    with pytest.raises(ValueError, match="no kernel image"):
        _ = Choice(WINDOW, "H200", {}, (wrong, failed)).best


def test_a_table_answers_for_its_shape_and_gpu_only():
    table = ChoiceTable().add(choice(cudnn=66.0, sdpa=70.0)).add(choice(PRUNED, triton_128x64=40.0))
    assert table.backend(WINDOW, "H200") == "cudnn"
    assert table.backend(PRUNED, "H200") == "triton-128x64"
    assert table.backend(PRUNED, "RTX 4090") == "sdpa"
    again = table.add(choice(flash=60.0))
    assert again.backend(WINDOW, "H200") == "flash"
    assert len(again.choices) == 2
    assert table.backend(WINDOW, "H200") == "cudnn", "a table does not change"


def test_a_table_survives_json():
    table = ChoiceTable().add(choice(cudnn=66.0)).add(choice(PRUNED, sdpa=40.0))
    assert ChoiceTable.from_plain(json.loads(json.dumps(table.to_plain()))) == table
    with pytest.raises((TypeError, KeyError)):
        ChoiceTable.from_plain([{"shape": {}, "gpu": "H200"}])


@pytest.mark.parametrize("context", [0, 7])
def test_what_is_measured_is_what_is_asked(context: int):
    shape = Shape(2, 3, 5, 9, context, 16, "fp32")
    inputs = random_inputs(shape, torch.device("cpu"))
    assert shape_of(inputs[0], inputs[1], inputs[3]) == shape
    want = attend_eager(*inputs)
    torch.testing.assert_close(sample_rows(inputs, 4).float(), want[:, -4:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run_backend("sdpa", *inputs), want)


def test_unknown_backends_are_refused():
    inputs = random_inputs(Shape(1, 1, 4, 4, 0, 16, "fp32"), torch.device("cpu"))
    for name in ("triton-1x1", "magic"):
        with pytest.raises(ValueError, match=f"got {name}, want"):
            run_backend(name, *inputs)


def test_installed_packages_are_named_with_versions():
    assert installed()["torch"] == torch.__version__
    assert installed()["triton"][0].isdigit()


def test_a_refusal_has_its_reason_and_what_was_warned_of():
    def call() -> None:
        warnings.warn("Flash attention kernel not used because:\n  of the dtype", stacklevel=1)
        raise RuntimeError("No available kernel.")

    assert refusal(call) == (
        "RuntimeError: No available kernel.; Flash attention kernel not used because: of the dtype"
    )
    assert refusal(lambda: None) == ""


def test_memory_that_ran_out_is_measured_again_and_plain_attention_runs_meanwhile():
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    refused = Choice(WINDOW, "H200", {}, (Timing("sdpa", refused=refusal(fail)), Timing("cudnn", refused="no")))
    table = KernelTable(ChoiceTable().add(refused).add(choice(PRUNED, cudnn=1.0)))
    table = table.add(OpTiming("norm", "a", "H200", {}, refused=refusal(fail)), OpTiming("norm", "b", "H200", {}))
    assert table.attention.backend(WINDOW, "H200") == "sdpa"
    kept = table.lasting()
    assert [c.shape for c in kept.attention.choices] == [PRUNED]
    assert [timing.call for timing in kept.ops] == ["b"]


def test_a_cpu_is_measured_by_the_clock():
    assert elapsed_ms(lambda: time.sleep(0.02), torch.device("cpu")) >= 20
    choice = measure(Shape(1, 2, 5, 9, 3, 16, "fp32"), torch.device("cpu"), repeats=2)
    by_name = {timing.backend: timing for timing in choice.timings}
    assert by_name.keys() == {"sdpa", "efficient"}
    assert choice.gpu == "cpu"
    assert len(by_name["sdpa"].samples) == 2
    assert by_name["efficient"].samples or "Error" in by_name["efficient"].refused
