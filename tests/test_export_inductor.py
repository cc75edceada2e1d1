"""AOTInductor packages: a few tiny graphs quickly, all of them and a whole clip slowly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import refused

from swifti2v import Request, Session, get_profile, load_models
from swifti2v.engine.errors import BundleError, SpecError
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.manifest import Bundle, Precision
from swifti2v.export.build import build_bundle
from swifti2v.export.inductor import decompositions, plain_attention
from swifti2v.export.parity import sample_feed
from swifti2v.kernels.attention import attention
from swifti2v.runtime.backend_inductor import InductorExecutable, arch, memory_format, precisions
from swifti2v.runtime.backend_weights import open_source

CPU = torch.device("cpu")
GRAPHS = profile_graphs(get_profile("tiny"), torch.bfloat16)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The smallest graph that has weights to round: compiling takes longer than everything else here."""
    return compiled(tmp_path_factory.mktemp("inductor"), "stage2_text")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A graph with attention, convolutions and caches, zero ones among them."""
    return compiled(tmp_path_factory.mktemp("stream"), "motion_first")


def compiled(folder: Path, name: str) -> Bundle:
    return build_bundle(open_source(get_profile("tiny"), precision="bf16"), "inductor", folder / "bundle", [name])


def executable(bundle: Bundle) -> InductorExecutable:
    (name,) = bundle.manifest.graphs
    return InductorExecutable(GRAPHS[name].spec, *bundle.files(name))


def check_rounding(bundle: Bundle) -> None:
    """The package is about as near to fp32 as eager in bf16 is, on another feed than the one that the build checked."""
    run = executable(bundle)
    graph, feed = GRAPHS[run.spec.name], sample_feed(run.spec, seed=7)
    sources = [open_source(get_profile("tiny"), precision=precision) for precision in ("fp32", "bf16")]
    wide, narrow = (graph.build(source.modules[graph.weights], False) for source in sources)
    with torch.inference_mode():
        want = wide(*(tensor.float() for tensor in feed.values()))[0]
        eager, got = narrow(*feed.values())[0], run(feed)[run.spec.outputs[0].name]
    errors = [float((one.float() - want).norm() / want.norm()) for one in (got, eager)]
    assert 0 < errors[0] < 1.25 * errors[1] < 0.1


def check_ownership(run: InductorExecutable) -> None:
    """Outputs outlive later calls, and what is done to them changes none."""
    feed = sample_feed(run.spec)
    first = run(feed)
    before = {name: tensor.clone() for name, tensor in first.items()}
    run(sample_feed(run.spec, seed=1))
    assert all(torch.equal(first[name], before[name]) for name in before)
    with torch.inference_mode():
        for tensor in first.values():
            tensor.add_(1)
    again = run(feed)
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_graph_is_as_near_to_fp32_as_eager_is(bundle: Bundle):
    check_rounding(bundle)


def test_outputs_are_the_callers(bundle: Bundle):
    check_ownership(executable(bundle))


@pytest.mark.slow
def test_a_stream_is_right_and_its_zero_caches_are_the_callers(stream: Bundle):
    """Caches that are zero at the start of a stream could be constants of the package."""
    check_rounding(stream)
    run = executable(stream)
    assert any(not tensor.any() for tensor in run(sample_feed(run.spec)).values())
    check_ownership(run)


@pytest.mark.slow
def test_any_layout_of_a_streams_feed_is_right(stream: Bundle):
    check_layouts(executable(stream))


def test_any_layout_of_the_feed_is_right(bundle: Bundle):
    check_layouts(executable(bundle))


def check_layouts(run: InductorExecutable) -> None:
    feed = sample_feed(run.spec)
    turned = {name: tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for name, tensor in feed.items()}
    one, other = run(feed), run(turned)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_wrong_feeds_closed_graphs_and_damaged_packages_are_refused(bundle: Bundle, tmp_path: Path):
    run = executable(bundle)
    with pytest.raises(SpecError, match=r"stage2_text\.text"):
        run({"text": torch.zeros(1, 8, 16)})
    run.close()
    with pytest.raises(RuntimeError, match="after close"):
        run(sample_feed(run.spec))
    (tmp_path / "model.pt2").write_bytes(bundle.files("stage2_text")[0].read_bytes()[:50_000])
    refused(lambda: InductorExecutable(run.spec, tmp_path / "model.pt2"), "does not load", kind=BundleError)


def test_the_bundle_says_which_cpu_it_is_for(bundle: Bundle):
    assert bundle.manifest.arch == arch(CPU)
    assert bundle.manifest.arch.startswith("cpu-")
    assert bundle.manifest.precision == "bf16" == precisions(CPU)[0]


def test_layouts_follow_the_spec():
    for name, graph in GRAPHS.items():
        streams = name.endswith(("_first", "_next")) and not name.startswith("stage2")
        for tensor in (*graph.spec.inputs, *graph.spec.outputs):
            wanted = torch.channels_last_3d if streams else torch.contiguous_format
            assert memory_format(graph.spec, tensor) == wanted, f"{name}.{tensor.name}"


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_is_attention(masked: bool):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(1, 2, length, 12, generator=generator) for length in (5, 7, 7))
    mask = torch.ones(5, 7, dtype=torch.bool).tril() if masked else None
    torch.testing.assert_close(plain_attention(q, k, v, mask), attention(q, k, v, mask), rtol=1e-5, atol=1e-6)
    wide = plain_attention(100 * q, 100 * k, v, mask)
    assert torch.isfinite(wide).all()


@pytest.mark.parametrize("amx", [False, True])
def test_attention_is_torchs_own_where_that_is_fast(amx: bool):
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return attention(q, q, q)

    program = torch.export.export(Attention(), (torch.randn(1, 2, 5, 12),)).run_decompositions(decompositions(amx))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("flash_attention_for_cpu" in name for name in names) == amx
    assert any("exp" in name for name in names) != amx


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "least"), [("fp32", 40.0), ("bf16", 20.0)])
def test_every_graph_and_a_whole_clip(tmp_path: Path, precision: Precision, least: float):
    profile = get_profile("tiny")
    build_bundle(open_source(profile, precision=precision), "inductor", tmp_path / "b")  # checks every graph
    image = np.random.default_rng(0).integers(0, 256, (profile.height, profile.width, 3), np.uint8)
    clips = []
    for opened in (load_models(profile, dtype=torch.float32), tmp_path / "b"):
        with Session.open(opened) as session:
            chunks = session.generate(Request(image, "zoom", seed=3))
            clips.append(np.concatenate([chunk.frames for chunk in chunks]).astype(float))
    assert 10 * np.log10(255**2 / max(((clips[0] - clips[1]) ** 2).mean(), 1e-10)) > least
