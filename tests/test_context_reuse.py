"""Later steps that read the first step's keys and values of clean blocks: where it is exact, and what it costs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from swifti2v.benchmarks.flops import clip_calls, graph_flops
from swifti2v.engine.calls import dit_conditions
from swifti2v.engine.dit import DiT, KeysValues
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile
from swifti2v.engine.rope import rope_tables
from swifti2v.engine.sampler import block_noise
from swifti2v.engine.segments import plan_segments
from swifti2v.engine.stage2 import denoise_segment, window_graphs
from swifti2v.engine.state import SegmentState
from swifti2v.runtime.backend_eager import open_eager

SIGMAS = (1.0, 0.8, 0.5)
Modules = Callable[[Profile], dict[str, nn.Module]]


@pytest.fixture
def uneven(tiny: Profile) -> Profile:
    """11 blocks: the last segment has one block left, so clean ones fill its window."""
    return tiny.override(frames=41)


def denoise(profile: Profile, make_modules: Modules, guidance: float = 1.0) -> Tensor:
    """The latents of every segment, one after another, with the reference of another clip."""
    graphs = open_eager(profile, make_modules(profile), torch.float32)
    stage = profile.stage2
    cells = (stage.vae.latent_channels, stage.latent_height, stage.latent_width)
    text = torch.randn(2, 1, stage.dit.text_len, stage.dit.text_dim, generator=torch.Generator().manual_seed(3))
    conditions = dit_conditions(graphs, "stage2", SIGMAS, text[0], text[1], guidance=guidance)
    reference = block_noise(5, 2, range(profile.blocks), cells)
    anchor, empty = reference[:, :, :1], reference[:, :, :0]
    state, made = SegmentState(0, anchor, empty, empty, (), (), ()), []
    with torch.inference_mode():
        for segment in plan_segments(profile.blocks, profile.noisy, profile.neighbours):
            blocks, noise = reference[:, :, list(segment.noisy)], block_noise(0, 2, segment.noisy, cells)
            steps = window_graphs(graphs, segment)
            latents, state = denoise_segment(steps, profile, segment, state, conditions, blocks, noise, SIGMAS)
            made.append(latents)
    return torch.cat(made, dim=2)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_it_is_exact_where_clean_blocks_do_not_see_noisy_ones(uneven: Profile, make_modules: Modules, guidance: float):
    """Each prompt has keys and values of its own, and a short last segment clean blocks among those computed anew."""
    profile = replace(uneven, context="one-way")
    want = denoise(profile, make_modules, guidance)
    assert error(denoise(replace(profile, reuse_context=True), make_modules, guidance), want) < 1e-5


def test_with_context_both_ways_it_is_an_approximation(uneven: Profile, make_modules: Modules):
    want = denoise(uneven, make_modules)
    assert 1e-5 < error(denoise(replace(uneven, reuse_context=True), make_modules), want) < 0.2


def test_one_step_is_as_it_was(uneven: Profile, make_modules: Modules, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"{__name__}.SIGMAS", (1.0,))
    want = denoise(uneven, make_modules)
    assert torch.equal(denoise(replace(uneven, reuse_context=True), make_modules), want)


def test_later_steps_compute_noisy_blocks_alone(tiny: Profile):
    graphs = profile_graphs(replace(tiny, reuse_context=True), torch.float32)
    assert {name for name in graphs if name.endswith("_later")} == {"stage2_first_later", "stage2_next_later"}
    first, later = (graphs[name].spec for name in ("stage2_next", "stage2_next_later"))
    kept = {tensor.name: tensor.shape for tensor in first.outputs[1:]}
    assert {name: shape for name, shape in ((t.name, t.shape) for t in later.inputs) if name in kept} == kept
    dit, tokens = tiny.stage2.dit, tiny.stage2.block_tokens
    assert kept["context_k"] == (dit.layers, 1, dit.heads, (1 + tiny.neighbours) * tokens, dit.head_dim)
    assert later.inputs[0].shape[2] == tiny.noisy
    assert "stage2_next_later" not in profile_graphs(tiny, torch.float32)


def test_it_saves_over_a_quarter_of_denoising():
    """Counted for `wan-2k` with 4 steps: the first is whole, three run on 3 blocks of 5."""
    whole = get_profile("wan-2k")
    reused = replace(whole, reuse_context=True)
    calls = clip_calls(reused)["denoise"]
    assert calls == {"stage2_first": 1, "stage2_first_later": 3, "stage2_next": 6, "stage2_next_later": 18}
    step, later = graph_flops(whole, "stage2_next"), graph_flops(reused, "stage2_next_later")
    assert 0.70 < (step + 3 * later) / (4 * step) < 0.74


def test_a_step_holds_no_more_than_it_gives(tiny: Profile, make_modules: Modules):
    """Keys and values of the whole window live no longer than their layer."""
    profile = replace(tiny, reuse_context=True)
    dit = make_modules(profile)["stage2"]
    assert isinstance(dit, DiT)
    blocks, stage = 5, profile.stage2
    latents = torch.randn(1, stage.dit.in_channels, blocks, stage.latent_height, stage.latent_width)
    made: list[KeysValues] = []
    tables = dit.time_tables(torch.tensor([0.0, 500.0]))
    rope = rope_tables(stage.dit.head_dim, range(blocks), stage.latent_height // 2, stage.latent_width // 2)
    text = dit.text_kv(torch.randn(1, stage.dit.text_len, stage.dit.text_dim))
    with torch.inference_mode():
        dit(latents, *tables, torch.tensor([[0, 0, 1, 1, 1]]), rope, text, keep=3, made=made)
    assert len(made) == stage.dit.layers
    for tensor in (tensor for pair in made for tensor in pair):
        assert tensor.shape[2] == 2 * stage.block_tokens
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
