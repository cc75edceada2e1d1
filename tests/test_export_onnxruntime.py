"""ONNX files and their runtime: every tiny graph equals eager, graph by graph and over a whole clip."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles import refused
from test_graphs import variants

from swifti2v import Request, Session, get_profile, load_models
from swifti2v.engine.errors import BundleError, SpecError
from swifti2v.engine.graphs import Graph, profile_graphs
from swifti2v.engine.manifest import Bundle
from swifti2v.engine.spec import Executable
from swifti2v.export.build import build_bundle
from swifti2v.export.job import Job
from swifti2v.export.onnx_file import OPSET
from swifti2v.export.onnxruntime import build
from swifti2v.export.parity import parity_error, sample_feed
from swifti2v.runtime.backend_names import output_names
from swifti2v.runtime.backend_onnxruntime import OnnxExecutable
from swifti2v.runtime.backend_weights import Source, open_source
from swifti2v.runtime.bundle import load_bundle

GRAPHS = profile_graphs(get_profile("tiny"), torch.float32)
FORBIDDEN = {"ScatterND", "ScatterElements", "GatherND", "GatherElements", "Loop", "If", "Softmax", "NonZero", "Where"}


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(get_profile("tiny"))


@pytest.fixture(scope="module")
def bundle(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Every graph; the most expensive thing here by far."""
    return build_bundle(source, "onnxruntime", tmp_path_factory.mktemp("onnx") / "bundle")


def model_file(bundle: Bundle, name: str) -> Path:
    return bundle.folder / name / "model.onnx"


def executable(bundle: Bundle, name: str) -> OnnxExecutable:
    return OnnxExecutable(GRAPHS[name].spec, model_file(bundle, name))


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_equals_eager(bundle: Bundle, name: str):
    """On another feed than the one that the build checked."""
    graph = GRAPHS[name]
    feed = sample_feed(graph.spec, seed=7)
    modules = load_models(get_profile("tiny"), dtype=torch.float32).modules
    with torch.inference_mode():
        wanted = graph.build(modules[graph.weights], False)(*feed.values())
    got = executable(bundle, name)(feed)
    assert list(got) == [tensor.name for tensor in graph.spec.outputs]
    for tensor, want in zip(graph.spec.outputs, wanted, strict=True):
        error = (got[tensor.name] - want).norm() / want.norm().clamp_min(1e-6)
        assert error < 1e-5, f"{tensor.name}: {error}"
    parity = bundle.manifest.graphs[name].parity
    assert parity is not None
    assert parity < 1e-5


def test_a_whole_clip_equals_eager(bundle: Bundle):
    profile = get_profile("tiny")
    image = np.random.default_rng(0).integers(0, 256, (profile.height, profile.width, 3), np.uint8)
    clips = []
    for opened in (load_models(profile, dtype=torch.float32), load_bundle(bundle.folder)):
        with Session.open(opened) as session:
            chunks = session.generate(Request(image, "zoom", seed=3))
            clips.append(np.concatenate([chunk.frames for chunk in chunks]).astype(float))
    assert not load_bundle(bundle.folder).modules, "weights of compiled graphs are not loaded"
    assert clips[0].shape == (33, 128, 192, 3)
    noise = ((clips[0] - clips[1]) ** 2).mean()
    assert 10 * np.log10(255**2 / max(noise, 1e-10)) > 40


@pytest.mark.parametrize("name", GRAPHS)
def test_the_file_has_the_specs_names_and_no_forbidden_operation(bundle: Bundle, name: str):
    model, spec = onnx.load(model_file(bundle, name), load_external_data=False), GRAPHS[name].spec
    assert [tensor.name for tensor in model.graph.input] == [tensor.name for tensor in spec.inputs]
    assert [tensor.name for tensor in model.graph.output] == output_names(spec)
    assert [(entry.domain, entry.version) for entry in model.opset_import if not entry.domain] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    used = Counter(node.op_type for node in model.graph.node)
    assert not FORBIDDEN & used.keys()
    assert b"/" not in b"".join(node.doc_string.encode() for node in model.graph.node), "no paths of this machine"


@pytest.mark.parametrize(
    ("name", "fused", "most"),
    [
        ("stage1_step", {"Attention": 4, "RMSNormalization": 6, "LayerNormalization": 7, "Gelu": 2}, 230),
        ("stage2_next", {"Attention": 4, "RMSNormalization": 6, "LayerNormalization": 7, "Gelu": 2}, 230),
        ("stage2_text", {"RMSNormalization": 2, "Gelu": 1}, 35),
        ("stage2_time", {"Gemm": 3}, 30),
        ("decode_next", {"Attention": 1}, 520),
        ("image_first", {"Attention": 1, "Conv": 30}, 360),
    ],
)
def test_operations_are_whole(bundle: Bundle, name: str, fused: dict[str, int], most: int):
    """Two layers with two attentions, three RMS norms and three layer norms each, and the head's norm."""
    nodes = onnx.load(model_file(bundle, name), load_external_data=False).graph.node
    used = Counter(node.op_type for node in nodes)
    assert {key: used[key] for key in fused} == fused
    assert len(nodes) <= most


def test_weights_lie_beside_the_graph(bundle: Bundle):
    model = onnx.load(model_file(bundle, "stage2_next"), load_external_data=False)
    large = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 256]
    assert large
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in large)
    data = bundle.folder / "stage2_next" / "model.onnx.data"
    assert data.stat().st_size > sum(np.prod(tensor.dims) * 4 for tensor in large)


def test_outputs_are_the_callers_and_inputs_stay(bundle: Bundle):
    run = executable(bundle, "decode_next")
    feed, other = sample_feed(run.spec), sample_feed(run.spec, seed=1)
    given = {name: tensor.clone() for name, tensor in feed.items()}
    first = run(feed)
    before = {name: tensor.clone() for name, tensor in first.items()}
    run(other)
    assert all(torch.equal(first[name], before[name]) for name in before), "a later call wrote over them"
    assert all(torch.equal(feed[name], given[name]) for name in given)
    for tensor in first.values():
        tensor.zero_()
    again = run(feed)
    assert all(torch.equal(again[name], before[name]) for name in before), "equal inputs, equal outputs"


def test_strided_feeds_are_read_right(bundle: Bundle):
    run = executable(bundle, "stage2_text")
    feed = sample_feed(run.spec)
    turned = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in feed.items()}
    assert not turned["text"].is_contiguous()
    assert torch.equal(run(feed)["text_k"], run(turned)["text_k"])


def test_wrong_feeds_and_closed_graphs_are_refused(bundle: Bundle):
    run = executable(bundle, "stage2_text")
    with pytest.raises(SpecError, match=r"stage2_text\.text"):
        run({"text": torch.zeros(1, 8, 16, dtype=torch.float16)})
    run.close()
    with pytest.raises(RuntimeError, match="after close"):
        run(sample_feed(run.spec))


def test_another_graphs_file_is_refused(bundle: Bundle, tmp_path: Path):
    refused(lambda: OnnxExecutable(GRAPHS["stage1_step"].spec, model_file(bundle, "stage2_next")), "want stage1_step")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    refused(lambda: OnnxExecutable(GRAPHS["stage1_step"].spec, tmp_path / "model.onnx"), "refuses", kind=BundleError)


def test_the_same_graph_gives_the_same_bytes(bundle: Bundle, source: Source, tmp_path: Path):
    graph = GRAPHS["stage2_text"]
    build(Job(graph, source.modules["stage2"], "", "fp32", source.device), tmp_path)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / name).read_bytes() == (bundle.folder / "stage2_text" / name).read_bytes()


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("image tokens", "stage1_step"),
        ("one-way", "stage2_next"),
        ("context reused", "stage2_next"),
        ("context reused", "stage2_next_later"),
    ],
)
def test_other_kinds_of_graphs(make_modules, tmp_path: Path, variant: str, name: str):
    """What the tiny profile does not have: image tokens, a mask, and a context that one step hands to the next."""
    profile = variants()[variant]
    graph: Graph = profile_graphs(profile, torch.float32)[name]
    weights = make_modules(profile)[graph.weights]
    build(Job(graph, weights, "", "fp32", torch.device("cpu")), tmp_path)
    run: Executable = OnnxExecutable(graph.spec, tmp_path / "model.onnx")
    assert parity_error(run, graph, weights, "fp32") < 1e-5
    used = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node)
    assert used["Attention"] == (6 if variant == "image tokens" else 4)
