"""Kernels for a profile's models: what is measured, what is chosen, what is refused, and that frames stay the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from swifti2v.engine.errors import EnvironmentMismatch
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.profile import Profile
from swifti2v.kernels.dispatch import Choice, ChoiceTable, Shape, Timing
from swifti2v.kernels.kernel_set import EAGER, chosen, fused, fused_on
from swifti2v.kernels.kernel_table import KernelTable, OpTiming, choose
from swifti2v.kernels.launch import check_rows
from swifti2v.kernels.measure_ops import Call, measure_op
from swifti2v.runtime.cli_kernels import show_kernels
from swifti2v.runtime.fused import (
    TABLE,
    accelerate,
    frame_calls,
    give_kernels,
    graph_calls,
    measure_kernels,
    read_table,
    twin,
)
from swifti2v.runtime.inspection import describe_kernels
from swifti2v.runtime.models import load_models
from swifti2v.runtime.session import Request, Session

CPU = torch.device("cpu")
STEP_OPS = {"attend", "gated_residual", "modulated_norm", "norm_rope", "residual_norm"}
VAE_OPS = {"norm_silu_conv", "upsample_conv"}


def timing(op: str, eager: float, fused: float, call: str = "", refused: str = "") -> OpTiming:
    return OpTiming(op, call, "some GPU", {"torch": "2"}, (eager,) * 3, (fused, fused, 99.0), 1e-3, refused)


def test_an_op_is_chosen_on_the_calls_where_it_is_no_slower():
    times = (
        timing("norm_rope", 2.0, 1.0), timing("norm_rope", 2.0, 2.0, "short"),
        timing("modulated_norm", 2.0, 1.0), timing("modulated_norm", 2.0, 2.1, "short"),
        timing("to_bytes", 2.0, 1.0, refused="RuntimeError: no kernel image"),
        OpTiming("residual_norm", "", "some GPU", {}),
    )  # fmt: skip
    assert choose(times) == (("modulated_norm", ""), ("norm_rope", ""), ("norm_rope", "short"))
    kernels, every = chosen(ChoiceTable(), "some GPU", times), fused(ChoiceTable(), "some GPU")
    assert kernels.norm_rope is every.norm_rope
    same = {"modulated_norm": EAGER.modulated_norm, "norm_rope": EAGER.norm_rope, "attend": EAGER.attend}
    assert replace(kernels, **same) == EAGER


def test_an_op_that_wins_on_some_calls_runs_fused_on_those_alone():
    x = torch.randn(1, 8, 5)
    ran: list[str] = []

    def form(name: str) -> Callable[..., torch.Tensor]:
        return lambda *given: ran.append(name) or given[0]

    run = partial(fused_on, frozenset({"fp32 1x8x5, None, 1e-06"}), form("fused"), form("plain"))
    assert run(x, None, 1e-6) is x
    run(x[:, 1:], None, 1e-6)
    run(x.bfloat16(), None, 1e-6)
    assert ran == ["fused", "plain", "plain"]


def test_a_table_comes_back_and_forgets_other_versions(tmp_path: Path):
    attention = Choice(Shape(1, 2, 10, 12, 0, 64, "bf16"), "some GPU", {"torch": "2"}, (Timing("sdpa", (1.0, 2.0)),))
    table = KernelTable(ChoiceTable((attention,))).add(timing("norm_rope", 2.0, 1.0), timing("attend", 2.0, 1.0))
    table = table.add(timing("norm_rope", 3.0, 1.0))
    assert [t.eager[0] for t in table.ops] == [2.0, 3.0], "the newer one takes the older one's place"
    (tmp_path / TABLE).write_text(json.dumps(table.to_plain()))
    assert read_table(tmp_path / TABLE) == table
    assert table.without_stale("some GPU", {"torch": "2"}) == table.without_stale("other", {"torch": "3"}) == table
    assert table.without_stale("some GPU", {"torch": "3"}) == KernelTable()
    for damaged in ("{}", "[]", '{"attention": [], "ops": [1]}', "\ud800".encode("utf-8", "surrogatepass")):
        (tmp_path / TABLE).write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        assert read_table(tmp_path / TABLE) == read_table(tmp_path / "none") == KernelTable()


def test_a_table_is_shown_with_what_runs_and_why_the_rest_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    timings = (Timing("sdpa", (2.0,)), Timing("cudnn", (1.0,)), Timing("flash", refused="RuntimeError: No kernel"))
    attention = Choice(Shape(1, 2, 10, 12, 3, 64, "bf16"), "some GPU", {"torch": "2"}, timings)
    slow = timing("modulated_norm", 2.0, 2.5, "bf16 1x4x48")
    table = KernelTable(ChoiceTable((attention,)), (timing("norm_rope", 2.0, 1.0), slow))
    (tmp_path / TABLE).write_text(json.dumps(table.to_plain()))
    rows = describe_kernels(tmp_path / TABLE)
    assert [(row["kernel"], row["runs"], row["ms"], row["plain_ms"]) for row in rows] == [
        ("attend", "cudnn", 1.0, 2.0), ("norm_rope", "fused", 1.0, 2.0), ("modulated_norm", "eager", 2.0, 2.0),
    ]  # fmt: skip
    assert rows[0]["call"] == "bf16 1x2 heads of 64, 10 queries, 15 keys"
    show_kernels(tmp_path / TABLE)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("cudnn", "flash: RuntimeError: No kernel", "bf16 1x4x48", "some GPU"))
    show_kernels(tmp_path / TABLE, as_json=True)
    assert json.loads(capsys.readouterr().out)["result"][TABLE] == {"kind": "kernels", "rows": rows}
    show_kernels(tmp_path / "none")
    assert capsys.readouterr().out == ""


def test_calls_are_those_that_graphs_make(tiny: Profile, make_modules):
    tiny = replace(tiny, stage1=replace(tiny.stage1, dit=replace(tiny.stage1.dit, image_dim=12, image_tokens=5)))
    modules = make_modules(tiny)
    calls = graph_calls(tiny, modules, torch.float32)
    assert {call.op for call in calls} == STEP_OPS | VAE_OPS
    assert len({(call.op, call.text) for call in calls}) == len(calls)
    keys = {call.arguments[1].shape[2] for call in calls if call.op == "attend"}
    tokens = {blocks * tiny.stage2.block_tokens for blocks in tiny.windows}
    assert keys == tokens | {tiny.blocks * tiny.stage1.block_tokens, tiny.stage1.dit.text_len, 5}
    assert all(layer.kernels is EAGER for layer in modules["stage2"].modules() if hasattr(layer, "kernels"))
    (first, later) = frame_calls(tiny, torch.bfloat16)
    assert first.text == "bf16 1x3x13x128x192, 1"
    assert later.inputs(CPU)[0].shape == (1, 3, 12, 128, 192)


def test_what_reaches_a_fused_op_lies_as_its_kernel_reads_it(tiny: Profile, make_modules):
    """Kernels refuse other layouts, and measuring then leaves the op out."""
    modules = make_modules(tiny)
    for call in graph_calls(tiny, modules, torch.float32):
        tensors = {str(index): given for index, given in enumerate(call.arguments) if isinstance(given, torch.Tensor)}
        if call.op in STEP_OPS - {"attend"}:
            check_rows(**tensors)
        if call.op == "norm_silu_conv":
            x = tensors["0"]
            assert x.stride(3) == x.shape[4] * x.stride(4), x.stride()


def test_a_twin_shares_its_weights(tiny: Profile, make_modules):
    dit = make_modules(tiny)["stage2"]
    same, bare = twin(dit), twin(dit, lambda tensor: tensor.to("meta"))
    pairs = zip(dit.parameters(), same.parameters(), bare.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() and c.is_meta and c.shape == a.shape for a, b, c in pairs)
    give_kernels({"stage2": same}, replace(EAGER))
    assert same.get_submodule("head").kernels is not dit.get_submodule("head").kernels


@pytest.mark.parametrize("op", sorted(VAE_OPS))
def test_each_form_is_measured_on_what_its_own_chain_gives_it(tiny: Profile, make_modules, op: str):
    calls = graph_calls(tiny, make_modules(tiny), torch.float32)
    call = [call for call in calls if call.op == op][-1]
    given: dict[str, tuple[torch.Tensor, ...]] = {}

    def form(name: str) -> Callable[..., torch.Tensor]:
        plain = getattr(EAGER, op)
        return lambda *arguments: given.update({name: arguments}) or plain(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swifti2v.kernels.measure_ops.EAGER", replace(EAGER, **{op: form("eager")}))
        assert measure_op(call, replace(EAGER, **{op: form("fused")}), CPU, repeats=1).refused == ""
    layout = torch.channels_last if op == "upsample_conv" else torch.channels_last_3d
    for at in (0, 4)[: 1 if op == "upsample_conv" else 2]:
        eager, other = given["eager"][at], given["fused"][at]
        assert torch.equal(eager, other)
        assert other.is_contiguous(memory_format=layout)
        assert eager.stride() == call.arguments[at].stride() != other.stride()


def test_measuring_runs_both_forms_and_says_why_one_is_refused():
    x, table = torch.empty(1, 3, 5, 8, device="meta"), torch.empty(1, 3, 6, 8, device="meta")
    call = Call("modulated_norm", (x, table[:, :, 1], table[:, :, 0], 1e-6))
    good = measure_op(call, fused(ChoiceTable(), "cpu"), CPU, repeats=3)
    assert (good.gpu, good.call, len(good.eager), len(good.fused)) == ("cpu", call.text, 3, 3)
    assert call.text == "fp32 1x3x5x8, fp32 1x3x8, fp32 1x3x8, 1e-06"
    assert min(*good.eager, *good.fused) > 0
    assert good.error == 0, "on a CPU the op is its eager form"
    wrong = measure_op(call, replace(EAGER, modulated_norm=lambda x, *_: 1.1 * x), CPU, repeats=3)
    assert "relative error" in wrong.refused
    assert not wrong.wins

    def failing(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    refused = measure_op(call, replace(EAGER, modulated_norm=failing), CPU, repeats=3)
    assert refused.refused == "RuntimeError: no kernel image"


def test_kernels_are_measured_once_kept_and_give_the_same_frames(tiny: Profile, tmp_path: Path):
    """The whole way on a CPU, where every fused op computes its eager form."""
    tiny = tiny.override(frames=17, size=(64, 64), stage1_steps=1, stage2_steps=1)
    request = Request(np.random.default_rng(0).integers(0, 256, (tiny.height, tiny.width, 3), np.uint8), "zoom in")
    loaded = load_models(tiny, dtype=torch.float32)
    said: list[str] = []
    made = measure_kernels(tiny, loaded.modules, torch.float32, CPU, tmp_path / "new", said.append)
    assert len(said) == 1
    assert "on cpu, once" in said[0]
    assert made.words.startswith("measured kernels ")
    again = measure_kernels(tiny, loaded.modules, torch.float32, CPU, tmp_path / "new", said.append)
    assert (again.fused, again.attention, len(said)) == (made.fused, made.attention, 1), "nothing is measured twice"
    rows = describe_kernels(tmp_path / "new" / TABLE)
    assert {row["kernel"] for row in rows} == STEP_OPS | VAE_OPS | {"to_bytes"}
    assert all(row["ms"] <= row["plain_ms"] or row["kernel"] == "attend" for row in rows)

    every = fused(ChoiceTable(), "cpu")
    with Session.open(loaded) as session:
        want = [chunk.frames for chunk in session.generate(request)]
    give_kernels(loaded.modules, every)
    faster = replace(loaded, acceleration=replace(made, kernels=every))
    assert faster.backend == f"eager, {made.words}"
    with Session.open(faster) as session:
        got = [chunk.frames for chunk in session.generate(request)]
    for a, b in zip(want, got, strict=True):
        difference = np.abs(a.astype(int) - b.astype(int))  # folded weights round elsewhere
        assert difference.max() <= 1
        assert difference.mean() < 1e-3


def test_what_cannot_be_kept_is_said(tiny: Profile, tmp_path: Path):
    (tmp_path / "file").write_text("")
    said: list[str] = []
    measure_kernels(tiny, {}, torch.float32, CPU, tmp_path / "file", said.append)
    assert said[0].startswith("measuring 0 attentions and 2 other kernels")
    assert "not kept" in said[1]


def test_without_a_gpu_auto_is_eager_and_the_rest_is_refused(tiny: Profile):
    loaded = load_models(tiny, dtype=torch.float32)
    for kernels in ("auto", "eager"):
        found = accelerate(loaded, kernels)
        assert (found.backend, found.acceleration.kernels) == ("eager", EAGER)
    with pytest.raises(EnvironmentMismatch, match="fused kernels: got device cpu, want cuda; run with"):
        accelerate(loaded, "fused")
    with pytest.raises(EnvironmentMismatch, match="CUDA graphs: got device cpu, want cuda; run without"):
        accelerate(loaded, "eager", cuda_graphs=True)


def test_steps_are_what_is_captured(tiny: Profile):
    from swifti2v.runtime.cuda_graphs import is_step

    steps = {name for name, graph in profile_graphs(tiny, torch.float32).items() if is_step(graph.spec)}
    assert steps == {"stage1_step", "stage2_first", "stage2_next"}
