"""FP8 steps: scales from clips, what quantising costs, ONNX that computes the same, engines with FP8 kernels."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from bundles import command, refused
from torch import Tensor, nn

from swifti2v.engine.dit import DiT
from swifti2v.engine.errors import EnvironmentMismatch, NumericsError, ProfileError, SpecError, WeightsError
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.manifest import read_bundle
from swifti2v.engine.presets import get_profile
from swifti2v.engine.spec import Executable, Feed
from swifti2v.export import calibration
from swifti2v.export.calibration import (
    calibrate,
    calibration_profile,
    draw_image,
    open_conditioning,
    quantise_as,
    quantise_source,
    run_clip,
)
from swifti2v.export.fp8 import E4M3, LARGEST, PARTS, Fp8Linear, block_linears, input_scales, quantise
from swifti2v.export.job import Job
from swifti2v.export.onnx_file import write_onnx
from swifti2v.export.onnx_pieces import split_onnx
from swifti2v.export.target import make_target, pick_precision
from swifti2v.export.tensorrt import TensorRTBuilder
from swifti2v.export.tensorrt_network import EngineJob, build_engine
from swifti2v.runtime.backend_eager import open_eager
from swifti2v.runtime.backend_weights import Source, find_models, open_source

pytest.importorskip("onnxscript")
CPU = torch.device("cpu")
BF16 = torch.bfloat16


class Kept:
    """An executable that keeps the last feed it was given, and what it made of it."""

    def __init__(self, executable: Executable) -> None:
        self.spec, self._executable = executable.spec, executable
        self.feed: Feed = {}
        self.made: dict[str, Tensor] = {}

    def __call__(self, feed: Feed) -> dict[str, Tensor]:
        self.feed, self.made = feed, self._executable(feed)
        return self.made

    def close(self) -> None:
        self._executable.close()


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def steps_in_fp8(source: Source) -> dict[str, float]:
    """Quantise a source; how far the velocity of each step graph is then from what bf16 gave, on a clip's last call."""
    given = open_conditioning(source, find_models(source.profile))
    profile = source.profile
    graphs = {name: Kept(graph) for name, graph in open_eager(profile, source.modules, BF16).items()}
    run_clip(graphs, profile, draw_image(profile, 9), given.texts[0], None, 9)  # none of those that calibrate
    quantise_source(source)
    steps = {name: kept for name, kept in graphs.items() if "velocity" in kept.made}
    before = {name: kept.made["velocity"] for name, kept in steps.items()}
    return {name: distance(kept(kept.feed)["velocity"], before[name]) for name, kept in steps.items()}


@pytest.fixture(scope="module")
def quantised() -> tuple[Source, dict[str, float]]:
    """The tiny profile in FP8, and what that costs."""
    source = open_source(get_profile("tiny"), precision="fp8")
    return source, steps_in_fp8(source)


def test_quantising_costs_little(quantised):
    source, errors = quantised
    assert errors.keys() == {"stage1_step", "stage2_first", "stage2_next"}
    assert all(0 < error < 0.1 for error in errors.values()), errors
    for name in ("stage1", "stage2"):
        module = cast(DiT, source.modules[name])
        scales = input_scales(module)
        assert scales.keys() == block_linears(module).keys()
        assert len(scales) == len(PARTS) * len(module.blocks)
        assert module.head.head.weight.dtype == module.patch_embedding.weight.dtype == BF16


@pytest.mark.slow
def test_quantising_trained_weights_costs_little():
    profile = get_profile("nano").override(frames=25, size=(256, 192))
    errors = steps_in_fp8(open_source(profile, precision="fp8"))
    assert all(0 < error < 0.1 for error in errors.values()), errors


def test_a_layer_keeps_its_numbers_to_three_bits():
    """Weights and inputs are off by a sixteenth at most; what is beyond the range is cut, and nothing is NaN."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).requires_grad_(False)
    linear.weight[3] *= 1000  # its own scale: the other rows do not lose by it
    layer, x = Fp8Linear(linear, 4 / LARGEST), torch.randn(5, 64).clamp(-4, 4)
    wide = layer.weight.float() * layer.weight_scale.unsqueeze(1)
    assert layer.weight.dtype == E4M3
    assert bool(
        ((wide - linear.weight).abs() <= linear.weight.abs() / 16 + layer.weight_scale.unsqueeze(1) / 512).all()
    )
    assert 0 < distance(layer(x), linear(x)) < 0.08
    assert torch.equal(layer(torch.full((1, 64), 1e9)), layer(torch.full((1, 64), 4.0)))


def test_onnx_computes_what_eager_does(quantised, tmp_path: Path):
    """In fp32, which onnxruntime has on a CPU: the same quantised weights and inputs, other rounding."""
    onnxruntime = pytest.importorskip("onnxruntime")
    graph = profile_graphs(quantised[0].profile, torch.float32)["stage2_next"]
    module = open_source(quantised[0].profile).modules["stage2"]
    quantise(cast(DiT, module), input_scales(quantised[0].modules["stage2"]))
    job = Job(graph, module, "", "fp32", CPU)
    file = write_onnx(job, tmp_path)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feed = {tensor.name: value.numpy() for tensor, value in zip(graph.spec.inputs, job.inputs(), strict=True)}
    got = torch.from_numpy(session.run(None, feed)[0])
    with torch.inference_mode():
        want = job.module()(*job.inputs())[0]
    assert distance(got, want) < 0.01, "a rounding may fall to the other side here and there"


def kernels_of(folder: Path, onnx: Path, name: str) -> dict[str, int]:
    engine, layers = folder / f"{name}.engine", folder / f"{name}.json"
    build_engine(EngineJob("tensorrt_rtx", name, str(onnx), str(engine), str(layers), ("sm89", "sm120"), "fp8", ""))
    return json.loads(layers.read_text())["summary"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1_step", "stage2_first"])
def test_block_products_run_in_fp8_and_attention_in_bf16(quantised, name: str, tmp_path: Path):
    """The build itself refuses a quantised product that is no FP8 kernel; here, that none was left out."""
    pytest.importorskip("tensorrt_rtx")
    graph = profile_graphs(quantised[0].profile, BF16)[name]
    onnx = write_onnx(Job(graph, quantised[0].modules[graph.weights], "", "fp8", CPU), tmp_path)
    kernels = kernels_of(tmp_path, onnx, "whole")
    assert kernels["matmul fp8"] == len(PARTS) * 2
    assert kernels["attention bf16"] == 4
    assert kernels["matmul bf16"] == 1, "the head"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wide_layers_take_half_the_room(tmp_path: Path):
    """nano: the engine in FP8 beside that in bf16, and both pieces of the former cut in two."""
    pytest.importorskip("tensorrt_rtx")
    source = open_source(get_profile("nano"), precision="fp8")
    graph, module = profile_graphs(source.profile, BF16)["stage2_next"], cast(DiT, source.modules["stage2"])
    (tmp_path / "bf16").mkdir()
    (tmp_path / "fp8").mkdir()
    weights = {}
    for precision in ("bf16", "fp8"):
        if precision == "fp8":
            quantise(module, dict.fromkeys(block_linears(module), 0.02))
        onnx = write_onnx(Job(graph, module, "", precision, CPU), tmp_path / precision)
        kernels = kernels_of(tmp_path / precision, onnx, "whole")
        weights[precision] = onnx.with_suffix(".onnx.data").stat().st_size
        assert kernels["attention bf16"] == 10
        assert kernels.get("matmul fp8", 0) == (len(PARTS) * 5 if precision == "fp8" else 0)
    sizes = {name: (tmp_path / name / "whole.engine").stat().st_size for name in weights}
    assert weights["fp8"] < 0.6 * weights["bf16"]
    assert sizes["bf16"] - sizes["fp8"] > 0.35 * weights["bf16"], "weights are kept in eight bits"
    pieces = split_onnx(tmp_path / "fp8" / "model.onnx", 2)
    made = [kernels_of(tmp_path / "fp8", piece, f"piece{index}") for index, piece in enumerate(pieces)]
    assert sum(kernels["matmul fp8"] for kernels in made) == len(PARTS) * 5


def test_the_command_builds_a_bundle_with_its_scales(tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    out, cache = tmp_path / "b", tmp_path / "cache"
    arguments = ["--profile", "tiny", "--backend", "tensorrt-rtx", "--arch", "sm89,sm120", "--precision", "fp8"]
    ran = command("swifti2v-export", *arguments, "--graphs", "stage2_next,stage2_time", "-o", out, cache=cache)
    assert ran.returncode == 0, ran.stderr
    assert "untrained weights" in ran.stderr
    bundle = read_bundle(out)
    assert bundle.manifest.precision == "fp8"
    assert bundle.manifest.recipe.command().endswith("--precision fp8 --arch sm89,sm120")
    files = {name: {path.name for path in bundle.files(name)} for name in bundle.manifest.graphs}
    engine = {"model-00.engine", "model-00.json"}
    assert files == {"stage2_next": engine | {"scales.json"}, "stage2_time": engine}
    summary = json.loads((out / "stage2_next" / "model-00.json").read_text())["summary"]
    assert (summary["matmul fp8"], summary["attention bf16"]) == (len(PARTS) * 2, 4)
    # What is in the bundle is what the weights calibrate to, and makes the same layers again.
    [kept] = (cache / "calibration").glob("*.json")
    scales = json.loads((out / "stage2_next" / "scales.json").read_text())
    assert scales == pytest.approx(json.loads(kept.read_text())["stage2"], rel=2**-8), "rounded to bf16"
    source = open_source(get_profile("tiny"), precision="fp8")
    quantise_as(source, bundle)
    assert input_scales(source.modules["stage2"]) == scales
    assert input_scales(source.modules["stage1"]) == {}, "no graph of it is in the bundle"


def test_scales_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are calibrated once for the same weights; kept ones that are damaged are refused."""
    scales = {}
    source = open_source(get_profile("tiny"), precision="fp8")
    for name in ("stage1", "stage2"):
        scales[name] = dict.fromkeys(block_linears(cast(DiT, source.modules[name])), 0.5)
    monkeypatch.setattr(calibration, "calibrate", lambda *_: scales)
    quantise_source(source, cache=tmp_path)
    monkeypatch.setattr(calibration, "calibrate", lambda *_: pytest.fail("calibrated again"))
    again = open_source(get_profile("tiny"), precision="fp8")
    quantise_source(again, cache=tmp_path)
    assert input_scales(again.modules["stage1"]) == scales["stage1"]
    [kept] = tmp_path.rglob("*.json")
    kept.write_text('{"stage1": {"blocks.0.ffn.0": -1.0}}')
    third = open_source(get_profile("tiny"), precision="fp8")
    refused(lambda: quantise_source(third, cache=tmp_path), str(kept), "want scales above 0")


def test_a_dry_run_counts_eight_bits(tmp_path: Path):
    """Against what quantising makes: the weights of FP8 layers, their scales, and all else as in bf16."""
    sizes = {}
    for precision in ("bf16", "fp8"):
        line = ("--profile", "tiny", "--backend", "tensorrt-rtx", "--precision", precision, "--dry-run", "--json")
        ran = command("swifti2v-export", *line, cache=tmp_path)
        assert ran.returncode == 0, ran.stderr
        sizes[precision] = {name: graph["bytes"] for name, graph in json.loads(ran.stdout)["result"]["graphs"].items()}
    dit = cast(DiT, open_source(get_profile("tiny"), precision="fp8").modules["stage2"])
    wide = sum(linear.weight.nbytes for linear in block_linears(dit).values())
    quantise(dit, dict.fromkeys(block_linears(dit), 1.0))
    layers = [layer for layer in dit.modules() if isinstance(layer, Fp8Linear)]
    narrow = sum(tensor.nbytes for layer in layers for tensor in layer.buffers())
    saved = {name: sizes["bf16"][name] - sizes["fp8"][name] for name in sizes["bf16"]}
    assert saved["stage2_first"] == saved["stage2_next"] == wide - narrow > 0.4 * wide
    assert {name for name in saved if saved[name]} == {"stage1_step", "stage2_first", "stage2_next"}


def test_what_cannot_be_quantised_is_refused(tmp_path: Path):
    source = open_source(get_profile("tiny"), precision="fp8")
    graph, dit = profile_graphs(source.profile, BF16)["stage2_next"], cast(DiT, source.modules["stage2"])
    job = Job(graph, dit, "", "fp8", CPU, ("sm89",))
    refused(lambda: list(TensorRTBuilder("tensorrt_rtx").build(job, tmp_path)), "quantise_source", kind=SpecError)
    refused(lambda: quantise(dit, {"blocks.0.ffn.0": 1.0}), "want one for each of 16 layers", kind=SpecError)
    refused(lambda: make_target(source, "eager"), "got fp8 for eager", kind=ProfileError)
    refused(lambda: pick_precision("eager", "fp8", CPU), "got fp8", kind=ProfileError)
    refused(lambda: make_target(source, "tensorrt-rtx", ["sm86"]), "want sm89", kind=EnvironmentMismatch)
    assert pick_precision("tensorrt-rtx", "fp8", CPU) == "fp8"
    given = open_conditioning(source, find_models(source.profile))
    next(dit.blocks[0].parameters()).fill_(float("nan"))
    refused(lambda: calibrate(source, given), "an input of stage2 blocks.", kind=NumericsError)
    wan, paths = get_profile("wan-2k"), find_models(get_profile("nano"))
    big = Source(wan, {}, source.record, "fp8", CPU)
    refused(lambda: open_conditioning(big, paths), "prompt and image", "pass --embeddings", kind=WeightsError)


def test_large_profiles_calibrate_on_small_clips():
    small = calibration_profile(get_profile("wan-2k"))
    assert (small.width, small.height, small.blocks, small.windows) == (1344, 768, 7, (4, 5))
    tiny = get_profile("tiny")
    assert (calibration_profile(tiny).stage2, calibration_profile(tiny).frames) == (tiny.stage2, 25)
