"""Graphs and their eager executables: specs are true, wrong feeds are refused, calls have no memory."""

from dataclasses import replace

import pytest
import torch

from swifti2v.engine.errors import SpecError
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile
from swifti2v.engine.spec import Executable, GraphSpec
from swifti2v.runtime.backend_eager import open_eager

BIG = 10_000_000_000


def variants() -> dict[str, Profile]:
    """Tiny profiles that between them have every kind of graph."""
    tiny = get_profile("tiny")
    image = replace(tiny.stage1, dit=replace(tiny.stage1.dit, image_dim=12, image_tokens=5))
    first_block = replace(tiny.stage1, dit=replace(tiny.stage1.dit, in_channels=4))
    return {
        "tiny": tiny,
        "image tokens": replace(tiny, stage1=image),
        "two experts": replace(tiny, stage1=replace(tiny.stage1, boundary=0.9)),
        "first block": replace(tiny, stage1=first_block),
        "one-way": replace(tiny, context="one-way"),
        "context reused": replace(tiny, reuse_context=True),
        "full sequence": tiny.override(noisy=8),
    }


def make_feed(spec: GraphSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feed = {}
    for tensor in spec.inputs:
        if tensor.dtype == torch.int64:
            feed[tensor.name] = torch.randint(0, 2, tensor.shape, generator=generator)
        elif tensor.dtype == torch.bool:
            feed[tensor.name] = torch.ones(tensor.shape, dtype=torch.bool)
        else:
            feed[tensor.name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return feed


def copy(feed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in feed.items()}


@pytest.mark.parametrize("name", variants())
def test_every_graph_is_what_its_spec_says(name: str, make_modules):
    profile = variants()[name]
    graphs = open_eager(profile, make_modules(profile), torch.float32)
    assert graphs.keys() == profile_graphs(profile, torch.float32).keys()
    for graph in graphs.values():
        feed = make_feed(graph.spec)
        outputs = graph(copy(feed))
        assert list(outputs) == [tensor.name for tensor in graph.spec.outputs]
        for tensor in graph.spec.outputs:
            assert tuple(outputs[tensor.name].shape) == tensor.shape, f"{graph.spec.name}.{tensor.name}"
            assert outputs[tensor.name].dtype == tensor.dtype
        again = graph(copy(feed))
        assert all(torch.equal(outputs[key], again[key]) for key in outputs), f"{graph.spec.name} has a memory"


def test_donated_inputs_are_the_caches_and_nothing_else(tiny: Profile):
    for name, graph in profile_graphs(tiny, torch.float32).items():
        donated = [tensor.name for tensor in graph.spec.inputs if tensor.donated]
        assert all(key.startswith("cache_") for key in donated)
        assert bool(donated) == (name in ("image_next", "motion_next", "reference_next", "decode_next"))


def test_a_donated_cache_is_updated_in_place_and_no_other_input_is(tiny: Profile, make_modules):
    graph = open_eager(tiny, make_modules(tiny), torch.float32)["decode_next"]
    feed = make_feed(graph.spec)
    latents = feed["latents"].clone()
    outputs = graph(feed)
    assert torch.equal(feed["latents"], latents)
    assert outputs["cache_00"].data_ptr() == feed["cache_00"].data_ptr()


@pytest.fixture
def step(tiny: Profile, make_modules) -> Executable:
    return open_eager(tiny, make_modules(tiny), torch.float32)["stage2_next"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda feed: feed.pop("rows"), r"missing \['rows'\]"),
        (lambda feed: feed.update(extra=torch.ones(1)), r"extra \['extra'\]"),
        (lambda feed: feed.update(cos=feed["cos"][1:]), r"stage2_next.cos \[L D\]: got \(119"),
        (lambda feed: feed.update(latents=feed["latents"].half()), "got .* torch.float16, want .* torch.float32"),
    ],
)
def test_a_wrong_feed_is_refused(step: Executable, change, message: str):
    feed = make_feed(step.spec)
    change(feed)
    with pytest.raises(SpecError, match=message):
        step(feed)


def test_wan_2k_graphs_have_the_real_sizes():
    graphs = profile_graphs(get_profile("wan-2k"), torch.bfloat16)
    specs = {name: graph.spec for name, graph in graphs.items()}
    assert specs["stage1_step"].inputs[0].shape == (1, 36, 21, 44, 80)
    assert specs["stage2_first"].inputs[0].shape == (1, 96, 4, 88, 160)
    assert specs["stage2_next"].inputs[0].shape == (1, 96, 5, 88, 160)
    assert specs["stage2_next"].outputs[0].shape == (1, 48, 3, 88, 160)
    assert specs["decode_next"].outputs[0].shape == (1, 3, 4, 1408, 2560)
    caches = [tensor for tensor in specs["decode_next"].inputs if tensor.donated]
    assert len(caches) == 32
    assert sum(tensor.bytes for tensor in caches) == pytest.approx(1.2864 * BIG, rel=1e-3)


def test_length_changes_stage_one_only():
    """81 and 241 frames need the same Stage II and VAE graphs, only more calls of them."""
    short, long = (profile_graphs(get_profile(name), torch.bfloat16) for name in ("wan-2k", "wan-2k-241"))
    different = [name for name in short if short[name].spec != long[name].spec]
    assert different == ["stage1_step"]
