"""The speed cases as a user meets them, on the tiny profile: records, tables, refusals, regressions."""

import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import bundles
import numpy as np
import pytest
import torch

from swifti2v.benchmarks import cli
from swifti2v.benchmarks.cli_check import run_checks
from swifti2v.benchmarks.cli_kernels import words
from swifti2v.benchmarks.clips import open_session, sample_request
from swifti2v.benchmarks.clock import Timing, Work, time_in_turns, time_once
from swifti2v.benchmarks.flops import graph_flops
from swifti2v.benchmarks.models import open_models
from swifti2v.benchmarks.peak import KNOWN, measured_peak
from swifti2v.benchmarks.report import HEADER, table
from swifti2v.benchmarks.variants import Witness, check_backends, eager_variant
from swifti2v.engine.errors import BundleError
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import TextConfig
from swifti2v.kernels.dispatch import Choice, ChoiceTable, Shape
from swifti2v.kernels.dispatch import Timing as Timed
from swifti2v.kernels.kernel_table import KernelTable, OpTiming
from swifti2v.runtime.backend_eager import EagerExecutable
from swifti2v.runtime.cuda_graphs import CapturedExecutable

TINY = ("--profile", "tiny", "--dtype", "fp32", "-q")
Bench = Callable[..., bundles.Ran]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Runs `swifti2v-bench` to its exit, in this process: starting one takes longer than most cases on tiny."""

    def run(*arguments: object) -> bundles.Ran:
        out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
        with (
            mock.patch.dict(os.environ, {"SWIFTI2V_CACHE": str(tmp_path / "cache")}),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main([str(argument) for argument in arguments])
        signal.signal(signal.SIGTERM, handler)
        code = ended.value.code
        return bundles.Ran(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())

    return run


def record_of(bench: Bench, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    done = bench(*arguments, "--json", tmp_path / "record.json")
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "record.json").read_text())


def test_a_record_says_everything(bench: Bench, tmp_path: Path):
    record = record_of(bench, tmp_path, "dit-stage2", *TINY, "--runs", 7, "--warmup", 1)
    assert (record["format"], record["case"]) == (1, "dit-stage2")
    identity = record["identity"]
    assert identity["device"]["name"]
    assert identity["device"]["threads"] == torch.get_num_threads()
    assert identity["weights"] == {"all": "random, seed 0"}
    assert identity["versions"].keys() >= {"python", "torch", "code"}
    assert (record["timer"]["clock"], record["timer"]["runs"]) == ("wall", 7)
    assert "measured in this run" in record["peak"]["float32"]["source"]
    assert record["variants"]["eager_fp32"]["ran_on"]["stage2_next"] == "eager"
    first, following = record["rows"]
    assert (first["name"], following["name"]) == ("stage2_first", "stage2_next")
    for row in (first, following):
        low, high = row["seconds"]["interval"]
        assert low <= row["seconds"]["value"] <= high
        assert len(row["samples"]) == 7
        assert row["cold_seconds"] > 0
        assert row["peak_bytes"] > 0
        assert row["tflop"] * 1e12 == graph_flops(get_profile("tiny"), row["name"])
        assert row["tflops"] == pytest.approx(row["tflop"] / row["seconds"]["value"])
        rate = record["peak"]["float32"]["tflops"]
        assert row["bound_percent"] == pytest.approx(100 * row["tflops"] / rate, rel=1e-2)
        assert "p90" not in row["seconds"], "seven samples have no tail"


def test_variants_and_peers_in_turns_with_ratios_named(bench: Bench, tmp_path: Path):
    arguments = ("vae-encode", *TINY, "--dtype", "bf16", "--frames", 13, "--peers", "--runs", 2, "--warmup", 0)
    record = record_of(bench, tmp_path, *arguments)
    rows = {(row["name"], row["variant"]): row for row in record["rows"]}
    peer, ours = rows["reference clip", "diffusers_eager_fp32"], rows["reference clip", "eager_fp32"]
    assert ours["parity"] < 1e-5
    assert rows["reference clip", "eager_bf16"]["parity"] > 1e-4
    speedups = [a / b for a, b in zip(peer["samples"], ours["samples"], strict=True)]
    assert ours["speedup_vs_diffusers_eager_fp32"]["value"] == pytest.approx(sum(speedups) / 2)
    assert "speedup_vs_eager_fp32" in rows["reference clip", "eager_bf16"]
    assert ours["peak_bytes"] is None, "beside others it would count their weights"


@pytest.mark.parametrize("case", ["dit-stage1", "dit-stage2"])
def test_peers_of_the_dits_compute_the_same(bench: Bench, tmp_path: Path, case: str):
    record = record_of(bench, tmp_path, case, *TINY, "--peers", "--runs", 1, "--warmup", 0)
    ours = [row for row in record["rows"] if row["variant"] == "eager_fp32"]
    assert ours
    assert all(0 < row["parity"] < 1e-5 for row in ours)


@pytest.mark.parametrize("clock", ["wall", "process"])
def test_stages_of_a_clip_sum_up(bench: Bench, tmp_path: Path, clock: str):
    record = record_of(bench, tmp_path, "clip", *TINY, "--frames", 13, "--runs", 3, "--warmup", 1, "--clock", clock)
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["prompt", "stage1", "reference", "denoise", "decode", "frames", "unaccounted", "clip"]
    total = rows.pop("clip")
    for run in range(3):
        assert sum(row["samples"][run] for row in rows.values()) == pytest.approx(total["samples"][run], abs=1e-6)
    assert all(
        -0.001 <= left < 0.2 * whole
        for left, whole in zip(rows["unaccounted"]["samples"], total["samples"], strict=True)
    )
    assert total["tflop"] == pytest.approx(sum(row["tflop"] for row in rows.values()))


def test_first_frames_come_before_the_clip_is_done(bench: Bench):
    done = bench("first-frames", *TINY, "--frames", 17, "--runs", 1, "--warmup", 0)
    assert done.returncode == 0, done.stderr
    assert "frames 0 to 12 of 17" in done.stdout


def test_lengths_and_their_plot(bench: Bench, tmp_path: Path):
    plot = tmp_path / "plot.png"
    arguments = ("full-sequence", *TINY, "--lengths", "13,17", "--runs", 1, "--warmup", 0, "--plot", plot)
    record = record_of(bench, tmp_path, *arguments)
    assert record["complete"]
    points = {(point["way"], point["frames"]): point for point in record["lengths"]["points"]}
    assert {(p["segments"], p["window"]) for (way, _), p in points.items() if way == "segments"} == {(1, 4), (2, 5)}
    assert [p["window"] for (way, _), p in points.items() if way == "full-sequence"] == [4, 5]
    assert points["full-sequence", 17]["denoise_flops"] != points["segments", 17]["denoise_flops"]
    assert points["full-sequence", 13]["denoise_flops"] == points["segments", 13]["denoise_flops"]
    assert record["lengths"]["growth"].keys() == {"segments", "full-sequence"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_is_stopped_keeps_what_it_measured(bench: Bench, tmp_path: Path):
    path = tmp_path / "record.json"

    def stop_after_the_first_length() -> None:
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.2)  # the line about it comes after the file
        os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does

    watch = threading.Thread(target=stop_after_the_first_length, daemon=True)
    watch.start()
    arguments = ("full-sequence", "--profile", "tiny", "--dtype", "fp32", "--lengths", "13,2401", "--denoising")
    done = bench(*arguments, "--runs", 1, "--warmup", 0, "--json", path)
    watch.join()
    assert done.returncode == 143, done.stderr
    record = json.loads(path.read_text())
    assert not record["complete"]
    assert {(point["way"], point["frames"]) for point in record["lengths"]["points"]} == {
        ("segments", 13),
        ("full-sequence", 13),
    }
    assert re.search(r"full-sequence: 13 frames in \d.* \(segments\), 13 frames in .*: done", done.stderr)
    assert "marked as not complete" in done.stderr
    assert not list(tmp_path.glob("*.part"))


def test_attention_by_every_kernel(bench: Bench, tmp_path: Path):
    record = record_of(bench, tmp_path, "attention", *TINY, "--runs", 1, "--warmup", 0)
    assert {row["variant"] for row in record["rows"]} >= {"sdpa fp32", "math fp32"}
    profile = get_profile("tiny")
    tokens, dim = 5 * profile.stage2.block_tokens, profile.stage2.dit.dim
    tflop = {row["name"]: row["tflop"] for row in record["rows"]}["attention stage2_next"]
    assert tflop * 1e12 == pytest.approx(4 * tokens**2 * dim)


def test_the_ladder_has_a_rung_for_what_there_is(bench: Bench, tmp_path: Path):
    done = bench(
        "ladder", "--profile", "tiny", "--dtype", "bf16", "-q", "--runs", 1, "--warmup", 0, "--json", tmp_path / "r"
    )
    assert done.returncode == 0, done.stderr
    rungs: dict[str, list[str]] = {}
    rows = json.loads((tmp_path / "r").read_text())["rows"]
    for row in rows:
        rungs.setdefault(row["name"], []).append(row["variant"])
    assert rungs["stage2_next"] == ["eager_fp32", "narrow", "cached", "pruned"]
    assert rungs["decode_next"] == rungs["reference_next"] == ["eager_fp32", "narrow", "channels_last"]
    assert "speedup_vs_cached" in rows[3]
    assert "since eager_fp32" in rows[3]["note"]


def test_a_regression_exits_with_3(bench: Bench, tmp_path: Path):
    arguments = ("dit-stage1", *TINY, "--runs", 7, "--warmup", 1)
    record = record_of(bench, tmp_path, *arguments)
    baseline = tmp_path / "baseline.json"
    for factor, code in ((1e-3, 3), (1e3, 0)):  # as if it had been that much faster then
        old = json.loads(json.dumps(record))
        for row in old["rows"]:
            row["samples"] = [factor * sample for sample in row["samples"]]
        baseline.write_text(json.dumps(old))
        done = bench(*arguments, "--baseline", baseline, "--json", tmp_path / "new.json")
        assert done.returncode == code, done.stderr
        (change,) = json.loads((tmp_path / "new.json").read_text())["changes"]
        low, high = change["time_vs_baseline"]["interval"]
        assert low <= change["time_vs_baseline"]["value"] <= high
        assert change["regressed"] is (code == 3)
        assert ("SLOWER" in done.stdout) is (code == 3)


def test_baselines_that_cannot_be_compared(bench: Bench, tmp_path: Path):
    record = record_of(bench, tmp_path, "dit-stage1", *TINY, "--runs", 2, "--warmup", 0)
    path = tmp_path / "record.json"
    few = bench("dit-stage1", *TINY, "--runs", 2, "--warmup", 0, "--baseline", path)
    assert (few.returncode, "want 7 or more" in few.stderr) == (2, True)
    other = bench("dit-stage2", *TINY, "--runs", 1, "--warmup", 0, "--baseline", path)
    assert (other.returncode, "baseline case" in other.stderr) == (2, True)
    other = bench("dit-stage1", *TINY, "--runs", 1, "--warmup", 0, "--clock", "process", "--baseline", path)
    assert (other.returncode, "baseline clock" in other.stderr) == (2, True)
    path.write_text(json.dumps({"rows": record["rows"]}))
    foreign = bench("dit-stage1", *TINY, "--baseline", path)
    assert (foreign.returncode, "another JSON file" in foreign.stderr) == (1, True)


def test_a_bundle_runs_on_its_backend_or_not_at_all(bench: Bench, tmp_path: Path):
    bundles.build(tmp_path / "bundle")
    arguments = ("dit-stage2", "--profile", "tiny", "-q", "--runs", 1, "--warmup", 0, "--bundle", tmp_path / "bundle")
    record = record_of(bench, tmp_path, *arguments)
    assert record["variants"]["eager_fp32"]["bundle"]
    assert record["variants"]["eager_fp32"]["ran_on"]["stage2_first"] == "eager"
    done = bench(*arguments, "--backend", "inductor")
    assert done.returncode == 1
    assert re.search(r"got a bundle of eager, want inductor; .*--backend inductor", done.stderr)


def test_captured_steps_are_witnessed_inside():
    """On a CPU nothing can be captured, but the first two calls of a captured graph are plain ones."""
    models = open_models(get_profile("tiny"), None, torch.device("cpu"))
    variant = eager_variant(models, torch.float32, around=lambda graph: CapturedExecutable(graph, None))
    graph = variant.graphs["stage2_time"]
    feed = {"timesteps": torch.tensor([0.0, 500.0])}
    graph(feed)
    assert variant.check() == {"stage2_time": "eager"}
    variant.close()
    with pytest.raises(RuntimeError, match="called after close"):
        graph(feed)


def test_cuda_graphs_are_refused_on_a_cpu(bench: Bench):
    done = bench("clip", *TINY, "--device", "cpu", "--cuda-graphs")
    assert (done.returncode, "CUDA graphs: got device cpu" in done.stderr) == (3, True)


def test_measured_kernels_as_tables(tmp_path: Path):
    shape, versions = Shape(1, 24, 10560, 17600, 0, 128, "bf16"), {"torch": "2.13"}
    timings = (Timed("sdpa", (12.0, 12.0), 1e-3), Timed("cudnn", (6.0, 6.0), 1e-3), Timed("flash", refused="no"))
    attention = ChoiceTable((Choice(shape, "A GPU", versions, timings),))
    wins = OpTiming("norm", "bf16 1x4", "A GPU", versions, (0.2, 0.2), (0.1, 0.1), 1e-3)
    loses = OpTiming("modulate", "bf16 1x4", "A GPU", versions, (0.1, 0.1), (0.2, 0.2), 1e-3)
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(KernelTable(attention, (wins, loses)).to_plain()))
    text = words(KernelTable.from_plain(json.loads(path.read_text())))
    assert re.search(r"10560 x 17600 +24 +bf16 +cudnn +6 +380.* sdpa 12, flash refused", text), text
    assert re.search(r"norm +bf16 1x4 +0.2 +0.1 +1e-03 +fused", text), text
    assert re.search(r"modulate +bf16 1x4 +0.1 +0.2 +1e-03 +eager", text), text


def test_a_graph_on_another_backend_is_an_error():
    profile, device = get_profile("tiny"), torch.device("cpu")
    graph = profile_graphs(profile, torch.float32)["stage2_time"]
    module = open_models(profile, None, device).module("stage2", torch.float32)
    witness = Witness(EagerExecutable(graph, module), device)
    assert (witness.backend, witness.calls) == ("eager", 0)
    check_backends({"stage2_time": witness}, "eager")
    bundles.refused(
        lambda: check_backends({"stage2_time": witness}, "tensorrt"), "ran on eager", "want tensorrt", kind=BundleError
    )
    elsewhere = Witness(EagerExecutable(graph, module), torch.device("cuda"))
    feed = {"timesteps": torch.tensor([0.0, 500.0])}
    bundles.refused(lambda: elsewhere(feed), "result on cpu", "want cuda", kind=BundleError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("clip", "--peers"), "--peers: got it for clip"),
        (("length", "--dtype", "bf16"), "want one"),
        (("dit-stage1", "--dtype", "fp32"), "fp32 twice"),
        (("cpu-nano", "--profile", "wan-2k"), "want nano on cpu"),
        (("length", "--lengths", "33;65"), "separated by commas"),
        (("dit-stage1", "--runs", "0"), "0 is not in the range"),
    ],
)
def test_refusals_are_one_line(bench: Bench, arguments: tuple[str, ...], words: str):
    case, *rest = arguments
    done = bench(case, *TINY, *rest)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_record_on_stdout_is_one_envelope(bench: Bench):
    done = bench("dit-stage1", *TINY, "--runs", 1, "--warmup", 0, "--json", "-")
    envelope = json.loads(done.stdout)
    assert (envelope["ok"], envelope["exit_code"], envelope["result"]["case"]) == (True, 0, "dit-stage1")


def test_random_weights_of_a_large_model_are_made_in_place_and_named_so():
    """As for `wan-2k`: no files, embeddings in place of encoders. In both dtypes the same weights."""
    profile = replace(get_profile("tiny").override(frames=13), text=TextConfig("umt5"))
    models = open_models(profile, None, torch.device("cpu"))
    assert models.weights == {"all": "random, seed 0"}
    assert models.prompts.fingerprint == "random"
    wide, narrow = (models.module("stage2", dtype) for dtype in (torch.float32, torch.bfloat16))
    for (name, a), b in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert torch.equal(b, a if b.dtype == torch.float32 else a.to(torch.bfloat16)), name
    session = open_session(models, eager_variant(models, torch.float32))
    frames = np.concatenate([chunk.frames for chunk in session.generate(sample_request(profile))])
    assert frames.shape == (13, 128, 192, 3)
    assert frames[1:].std() > 1, "random weights give no picture at all"


def test_the_process_clock_does_not_count_waiting():
    waiting = Work(lambda: time.sleep(0.2))
    wall, _ = time_once(waiting, torch.device("cpu"), "wall")
    process, _ = time_once(waiting, torch.device("cpu"), "process")
    assert wall >= 0.2
    assert process < 0.1


def test_turns_go_there_and_back_and_memory_comes_last():
    seen: list[str] = []
    works = {name: Work(lambda name=name: seen.append(name), after=lambda: seen.append("|")) for name in "ab"}
    samples = time_in_turns(works, torch.device("cpu"), Timing(runs=3, warmup=1))
    assert "".join(seen).replace("|", "") == "abababbaabab"
    assert seen.count("|") == 12
    assert all(len(sample.warm) == 3 and sample.peak_bytes for sample in samples.values())


def test_peaks():
    cpu = measured_peak(torch.device("cpu"), torch.float32, "process")
    assert 1e9 < cpu.rate < 1e14
    assert "measured in this run" in cpu.source
    assert all(source and rates[torch.bfloat16] > rates[torch.float32] for rates, source in KNOWN.values())


def test_tables_leave_empty_columns_out():
    text = table(HEADER, [("a", "b", "1 s", "2 s", "", "", "", "", ""), ("aa", "b", "1 s", "2 s", "", "3", "", "", "")])
    assert text.splitlines() == [
        "what  variant  cold  median  TFLOP/s",
        "a     b        1 s   2 s",
        "aa    b        1 s   2 s     3",
    ]


@pytest.mark.slow
def test_the_checks_hold_here():
    assert [(name, holds) for name, holds, _ in run_checks(torch.device("cpu"))] == [
        ("same_as_cpu", True),
        ("bf16_near_fp32", True),
        ("memory_is_flat", True),
    ]
