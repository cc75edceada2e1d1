"""TensorRT-RTX engines, built here without a GPU: what is in them, for which GPUs, and always the same bytes."""

import json
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from bundles import command, refused
from test_graphs import variants

from swifti2v.engine.errors import EnvironmentMismatch, ProfileError
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.manifest import PRECISIONS, Precision, read_bundle
from swifti2v.engine.presets import get_profile
from swifti2v.engine.spec import GraphSpec
from swifti2v.export.build import build_bundle
from swifti2v.export.failure import CompileError
from swifti2v.export.job import Job
from swifti2v.export.onnx_file import write_onnx
from swifti2v.export.plan import plan_build
from swifti2v.export.target import make_target, pick_precision
from swifti2v.export.tensorrt import TensorRTBuilder, rtx_archs, run_process
from swifti2v.export.tensorrt_layers import Layer, Wanted, find_faults, kind_of, read_layers, summarise
from swifti2v.export.tensorrt_network import EngineJob, build_engine
from swifti2v.runtime.backend_names import output_names
from swifti2v.runtime.backend_registry import find_backend
from swifti2v.runtime.backend_weights import Source, open_source
from swifti2v.runtime.bundle import load_bundle

tensorrt = pytest.importorskip("tensorrt_rtx")
CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
TINY = list(profile_graphs(get_profile("tiny"), torch.bfloat16))
FAST = {"stage2_time", "stage2_text", "stage2_next", "decode_next"}  # one of each kind
NANO = ("stage1_step", "stage2_next", "image_next", "decode_next")


@pytest.fixture(scope="module")
def sources() -> dict[tuple[str, str], Source]:
    return {}


def engine_job(job: Job, folder: Path, precision: Precision = "bf16", archs: tuple[str, ...] = ("sm89",)) -> EngineJob:
    onnx, name = write_onnx(job, folder), job.graph.spec.name
    return EngineJob(
        "tensorrt_rtx", name, str(onnx), str(folder / "e.engine"), str(folder / "e.json"), archs, precision, ""
    )


def check_names(onnx: Path, spec: GraphSpec) -> None:
    """Names, shapes and dtypes of a network are the spec's. An engine cannot be asked without a GPU."""
    log = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(log)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert tensorrt.OnnxParser(network, log).parse_from_file(str(onnx))
    made = [network.get_input(index) for index in range(network.num_inputs)]
    made += [network.get_output(index) for index in range(network.num_outputs)]
    names = [*(tensor.name for tensor in spec.inputs), *output_names(spec)]
    kinds = {torch.bfloat16: tensorrt.bfloat16, torch.float32: tensorrt.float32, torch.int64: tensorrt.int64}
    wanted = [(name, t.shape, kinds[t.dtype]) for name, t in zip(names, (*spec.inputs, *spec.outputs), strict=True)]
    assert [(t.name, tuple(t.shape), t.dtype) for t in made] == wanted


def summary(sources: dict, profile: str, name: str, precision: Precision, folder: Path) -> dict[str, int]:
    """Build a graph in this process, which is quicker than one of its own; what its kernels are."""
    source = sources.setdefault((profile, precision), open_source(get_profile(profile), precision=precision))
    graph = profile_graphs(source.profile, PRECISIONS[precision])[name]
    job = Job(graph, source.modules[graph.weights], "", precision, CPU)
    build_engine(engine_job(job, folder, "fp32" if name.endswith("time") else precision))
    assert (folder / "e.engine").stat().st_size > 10_000
    return json.loads((folder / "e.json").read_text())["summary"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in TINY])
def test_every_tiny_graph_builds_in_bf16(sources: dict, name: str, tmp_path: Path):
    kernels = summary(sources, "tiny", name, "bf16", tmp_path)
    check_names(tmp_path / "model.onnx", profile_graphs(get_profile("tiny"), torch.bfloat16)[name].spec)
    if name.endswith("time"):
        assert kernels["matmul fp32"] == 3, "tables are computed in fp32"
        return
    assert not any(kind.endswith(("fp32", "fp16")) for kind in kernels)
    if name.endswith(("step", "first", "next")) and name.startswith("stage"):
        assert kernels["attention bf16"] == 4, "two layers with two attentions, each one kernel"
        assert kernels["convolution bf16"] == 1
    elif not name.endswith("text"):
        assert kernels["convolution bf16"] >= 30


@pytest.mark.slow
@pytest.mark.parametrize("name", NANO)
def test_nano_graphs_build(sources: dict, name: str, tmp_path: Path):
    kernels = summary(sources, "nano", name, "bf16", tmp_path)
    assert kernels.get("attention bf16", 0) == (10 if name.startswith("stage") else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "fused"), [("fp16", 4), ("fp32", 0)])
@pytest.mark.parametrize("name", ["stage2_next", "decode_next"])
def test_other_precisions(sources: dict, name: str, precision: Precision, fused: int, tmp_path: Path):
    """fp32 attention has no fused kernel: it is two products around a softmax."""
    kernels = summary(sources, "tiny", name, precision, tmp_path)
    assert kernels.get(f"attention {precision}", 0) == (fused if name == "stage2_next" else 0)
    assert all(kind == "other" or kind.endswith(precision) for kind in kernels)


@pytest.mark.parametrize(
    ("variant", "name", "attentions"),
    [
        ("image tokens", "stage1_step", 6),
        pytest.param("one-way", "stage2_next", 4, marks=pytest.mark.slow),
        pytest.param("context reused", "stage2_next", 4, marks=pytest.mark.slow),
        pytest.param("context reused", "stage2_next_later", 4, marks=pytest.mark.slow),
    ],
)
def test_other_kinds_of_graphs(make_modules, tmp_path: Path, variant: str, name: str, attentions: int):
    """Attention to image tokens beside the text, with the same query; and a mask, at a width that has kernels."""
    profile = variants()[variant]
    if name.startswith("stage2"):
        dit = replace(profile.stage2.dit, dim=32, ffn_dim=128)
        profile = replace(profile, stage2=replace(profile.stage2, dit=dit))
    graph = profile_graphs(profile, torch.bfloat16)[name]
    module = make_modules(profile)[graph.weights].to(torch.bfloat16)
    build_engine(engine_job(Job(graph, module, "", "bf16", CPU), tmp_path))
    assert json.loads((tmp_path / "e.json").read_text())["summary"]["attention bf16"] == attentions


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory):
    """Two small graphs for two GPUs, each built by a process of its own, two at once."""
    source = open_source(get_profile("tiny"), precision="bf16")
    out = tmp_path_factory.mktemp("rtx") / "bundle"
    return build_bundle(source, "tensorrt-rtx", out, ["stage2_time", "stage2_text"], archs=["sm120", "sm89"], jobs=2)


def test_a_bundle_says_what_it_is_for_and_that_it_was_not_run(bundle, tmp_path: Path):
    manifest = bundle.manifest
    assert manifest.arch == "sm89,sm120"
    if not torch.cuda.is_available():
        assert [record.parity for record in manifest.graphs.values()] == [None, None]
    for name in manifest.graphs:
        assert [file.name for file in bundle.files(name)] == ["model-00.engine", "model-00.json"]
        assert {file.name for file in (bundle.folder / name).iterdir()} == {"model-00.engine", "model-00.json"}
    assert manifest.versions["tensorrt_rtx"] == tensorrt.__version__
    assert manifest.recipe.command().endswith("--backend tensorrt-rtx --precision bf16 --arch sm89,sm120")
    if not torch.cuda.is_available():
        assert "not run here" in command("swifti2v", "inspect", bundle.folder, cache=tmp_path).stdout


def test_two_builds_give_the_same_bytes(bundle, tmp_path: Path):
    source = open_source(get_profile("tiny"), precision="bf16")
    again = build_bundle(source, "tensorrt-rtx", tmp_path / "b", ["stage2_text"], archs=["sm89", "sm120"])
    assert again.manifest.graphs["stage2_text"] == bundle.manifest.graphs["stage2_text"], "hashes of every file too"


@no_gpu
def test_without_a_gpu_it_is_not_run(bundle, tmp_path: Path):
    words = ["want an NVIDIA GPU", "tensorrt-rtx"]
    refused(lambda: load_bundle(bundle.folder), *words, kind=EnvironmentMismatch)
    backend = find_backend("tensorrt-rtx")
    assert backend.precisions(torch.device("cuda")) == backend.precisions(CPU) == ()
    graph = profile_graphs(bundle.manifest.profile, torch.bfloat16)["stage2_text"]
    files = bundle.files("stage2_text")
    refused(lambda: backend.open_graph(graph, None, files, torch.device("cuda")), *words, kind=EnvironmentMismatch)
    ran = command("swifti2v-export", "verify", bundle.folder, cache=tmp_path)
    assert (ran.returncode, len(ran.stderr.strip().splitlines())) == (3, 1)


@pytest.mark.parametrize(
    ("archs", "precision", "words", "kind"),
    [
        (["sm89", "sm90"], "bf16", ["got sm90", "Hopper", "--backend tensorrt"], EnvironmentMismatch),
        (["sm75"], "bf16", ["got sm75 for bf16", "want sm80"], EnvironmentMismatch),
        (["sm80"], "fp8", ["got sm80 for fp8", "want sm89"], EnvironmentMismatch),
        (["sm86", "sm89"], "fp8", ["got sm86 for fp8"], EnvironmentMismatch),
        (["ada"], "bf16", ["got 'ada'", "sm120"], ProfileError),
    ],
)
def test_gpus_that_cannot_are_refused(archs: list[str], precision: str, words: list[str], kind: type):
    refused(lambda: rtx_archs(archs, precision), *words, kind=kind)


def test_gpus_come_in_order_each_once():
    assert rtx_archs(["sm120", "sm89", "sm120"], "bf16") == ("sm89", "sm120")
    assert rtx_archs(["sm75"], "fp16") == ("sm75",)


@no_gpu
def test_what_to_build_for_has_to_be_said(tmp_path: Path):
    source = open_source(get_profile("tiny"), precision="bf16")
    refused(lambda: make_target(source, "tensorrt-rtx"), "pass --arch", kind=ProfileError)
    refused(lambda: make_target(source, "eager", ["sm89"]), "got sm89, want cpu", kind=EnvironmentMismatch)
    assert pick_precision("tensorrt-rtx", None, CPU) == "bf16"
    refused(lambda: pick_precision("tensorrt", None, CPU), "want an NVIDIA GPU", kind=EnvironmentMismatch)
    arguments = ["--profile", "tiny", "--backend", "tensorrt-rtx", "-o", tmp_path / "b"]
    ran = command("swifti2v-export", *arguments, "--arch", "sm90", cache=tmp_path / "cache")
    assert (ran.returncode, "Hopper" in ran.stderr) == (3, True)
    ran = command("swifti2v-export", "--backend", "eager", "--jobs", "2", cache=tmp_path / "cache")
    assert (ran.returncode, "want 1 for eager" in ran.stderr) == (2, True)


@pytest.mark.skipif(find_spec("torch_tensorrt") is not None, reason="says what happens without the package")
def test_torch_tensorrt_says_what_it_lacks(tmp_path: Path):
    source = open_source(get_profile("tiny"))
    text = refused(lambda: build_bundle(source, "torch-tensorrt", tmp_path / "b"), kind=EnvironmentMismatch)
    assert "pip install 'swifti2v[torch-tensorrt]'" in text
    assert not (tmp_path / "b.part").exists()


def test_a_plan_says_what_memory_the_builders_need():
    plan = plan_build(get_profile("wan-2k"), "tensorrt-rtx", "bf16", ["stage2_next", "stage2_time"])
    pieces = {graph.spec.name: graph.pieces for graph in plan.graphs}
    assert pieces == {"stage2_next": 5, "stage2_time": 1}
    assert 5e9 < plan.process_memory < 8e9
    assert plan_build(get_profile("tiny"), "eager", "bf16").process_memory == 0


def test_a_process_that_ends_says_why(tmp_path: Path):
    job = EngineJob("tensorrt_rtx", "graph", str(tmp_path / "none.onnx"), "e", "l", ("sm89",), "bf16", "")

    def wait(job: EngineJob, kill: bool = False) -> None:
        for process in run_process(job, tmp_path):
            if kill:
                process.kill()
            process.wait()

    refused(lambda: wait(job), "graph: got '", "from tensorrt_rtx", kind=CompileError)
    refused(lambda: wait(job, kill=True), "was killed", "--jobs", kind=CompileError)
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    bad = EngineJob("tensorrt_rtx", "graph", str(tmp_path / "bad.onnx"), "e", "l", ("sm89",), "bf16", "")
    refused(lambda: build_engine(bad), "want an engine", kind=CompileError)


def test_a_build_that_stops_ends_its_processes(tmp_path: Path):
    job = EngineJob("tensorrt_rtx", "graph", str(tmp_path / "none.onnx"), "e", "l", ("sm89",), "bf16", "")
    steps = run_process(job, tmp_path)
    process: subprocess.Popen[str] = next(steps)
    assert process.poll() is None
    steps.close()
    assert process.poll() is not None


LINES = """Layers:
Name: _gemm_mha_v2_myl0_8, LayerType: kgen, Inputs: [ { Name: a, Dimensions: [2,120,16], Strides: [16,32,1], \
StrideOrder: [1,2,0], Datatype: BFloat16, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { \
Name: b, Dimensions: [2,120,16], Strides: [16,32,1], StrideOrder: [1,2,0], Datatype: BFloat16, Format: (Linear) x }], \
TacticName: _gemm_mha, StreamId: 0, Metadata: [ONNX Layer: node_attention]
Name: __myl_FcAdd_myl0_10, LayerType: runtime_fusion, Inputs: [ { Name: c, Dimensions: [1,24], Strides: [24,1], \
StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: d, \
Dimensions: [1,24], Strides: [24,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) x }], TacticName: , \
StreamId: 0, Metadata: [ONNX Layer: node_MatMul_1][ONNX Layer: node_linear]
Name: of no layer, but of a tensor
"""


def test_layers_are_read_from_the_log():
    layers = read_layers(["something else", LINES])
    assert layers == [
        Layer("_gemm_mha_v2_myl0_8", "kgen", ("bf16",), ("bf16",), ("node_attention",)),
        Layer("__myl_FcAdd_myl0_10", "runtime_fusion", ("fp32",), ("fp32",), ("node_MatMul_1", "node_linear")),
    ]
    assert summarise(layers) == {"attention bf16": 1, "matmul fp32": 1}
    assert kind_of(Layer("__myl_CorrCastMul_myl0_4", "runtime_fusion", (), (), ())) == "convolution"
    assert kind_of(Layer("__myl_MaxrSubExp_myl0_2", "kgen", (), (), ())) is None


def test_what_is_not_as_wanted_is_a_fault():
    layers = read_layers([LINES])
    right = [Wanted("node_attention", "attention", "bf16"), Wanted("node_MatMul_1", "matmul", "fp32")]
    assert find_faults(layers, right) == []
    assert find_faults(layers, [Wanted("node_MatMul_1", "matmul", "bf16")]) == [
        "node_MatMul_1: got matmul of fp32, want bf16"
    ]
    assert find_faults(layers, [Wanted("node_MatMul_1", "convolution", "fp32")]) == [
        "node_MatMul_1: got runtime_fusion, want one convolution kernel"
    ]
    assert find_faults(layers, [Wanted("node_conv3d", "convolution", "bf16")]) == [
        "node_conv3d: got nothing, want one convolution kernel"
    ]


def test_the_precision_asked_for_is_checked(sources: dict, tmp_path: Path):
    """A network with products in another precision than was asked for is refused before it is built."""
    source = open_source(get_profile("tiny"), precision="bf16")
    graph = profile_graphs(source.profile, torch.bfloat16)["stage2_text"]
    job = engine_job(Job(graph, source.modules["stage2"], "", "bf16", CPU), tmp_path, "fp16")
    refused(lambda: build_engine(job), "in bf16", "want fp16", kind=CompileError)
    assert not Path(job.engine).exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_whole_bundle_runs_on_a_gpu(backend: str, tmp_path: Path):
    """Parity is measured by the build; outputs stay the caller's; opening again uses what was compiled before."""
    if backend == "tensorrt":
        pytest.importorskip("tensorrt")
    source = open_source(get_profile("tiny"), precision="bf16")
    arch = find_backend(backend).arch(torch.device("cuda"))
    if backend == "tensorrt-rtx" and arch == "sm90":
        pytest.skip("TensorRT-RTX has no Hopper")
    made = build_bundle(source, backend, tmp_path / "b")
    assert all(record.parity is not None for record in read_bundle(made.folder).manifest.graphs.values())
    graph = profile_graphs(source.profile, torch.bfloat16)["decode_next"]
    from swifti2v.export.parity import sample_feed

    run = find_backend(backend).open_graph(graph, None, made.files("decode_next"), torch.device("cuda"))
    one, other = sample_feed(graph.spec, "cuda"), sample_feed(graph.spec, "cuda", seed=1)
    first = run(one)
    before = {name: tensor.clone() for name, tensor in first.items()}
    run(other)
    assert all(torch.equal(first[name], before[name]) for name in before)
    run.close()
    with pytest.raises(RuntimeError, match="after close"):
        run(one)


def test_the_builder_leaves_engines_alone(tmp_path: Path):
    """No ONNX file, log or part is left among the artifacts."""
    source = open_source(get_profile("tiny"), precision="fp16")
    graph = profile_graphs(source.profile, torch.float16)["stage2_text"]
    (tmp_path / "w").mkdir()
    job = Job(graph, source.modules["stage2"], "", "fp16", CPU, ("sm89",))
    for process in TensorRTBuilder("tensorrt_rtx").build(job, tmp_path / "w"):
        process.wait()
    assert sorted(file.name for file in (tmp_path / "w").iterdir()) == ["model-00.engine", "model-00.json"]
