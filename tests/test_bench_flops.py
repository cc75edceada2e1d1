"""Operations are counted right: against formulas by hand, against published figures, against what a clip calls."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from swifti2v.benchmarks.clips import first_flops, open_session, sample_request
from swifti2v.benchmarks.flops import clip_calls, clip_flops, count_flops, graph_flops
from swifti2v.benchmarks.models import open_models
from swifti2v.benchmarks.variants import eager_variant
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile
from swifti2v.kernels.attention import attention


def dit_flops(profile: Profile, tokens: int, queries: int) -> int:
    """Of a Stage II forward whose last layer has `queries` tokens, by hand: 2 for each multiplication and addition."""
    dit = profile.stage2.dit
    d, f, text = dit.dim, dit.ffn_dim, dit.text_len
    total = 2 * tokens * 4 * dit.in_channels * d  # patches
    for layer in range(dit.layers):
        own = queries if layer == dit.layers - 1 else tokens
        total += 2 * (2 * own + 2 * tokens) * d * d  # q and o, k and v
        total += 4 * own * tokens * d  # scores, and values
        total += 2 * 2 * own * d * d + 4 * own * text * d  # cross-attention: q and o, scores and values
        total += 2 * 2 * own * d * f
    return total + 2 * queries * d * 4 * dit.out_channels


@pytest.mark.parametrize("name", ["tiny", "nano", "wan-2k"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_stage2_window_by_hand(name: str, index: int):
    profile = get_profile(name)
    tokens, queries = (blocks * profile.stage2.block_tokens for blocks in (profile.windows[index], profile.noisy))
    assert graph_flops(profile, ("stage2_first", "stage2_next")[index]) == dit_flops(profile, tokens, queries)


def test_figures_that_others_have_published():
    """In TFLOP: of a window without the pruned part of the last layer, and of VAE chunks at 2K."""
    profile = get_profile("wan-2k")
    assert dit_flops(profile, 17600, 17600) / 1e12 == pytest.approx(270.3, rel=1e-3)
    assert graph_flops(profile, "decode_next") / 1e12 == pytest.approx(266.0, rel=2e-3)
    assert graph_flops(profile, "decode_first") / 1e12 == pytest.approx(82.9, rel=2e-3)
    assert graph_flops(profile, "reference_next") / 1e12 == pytest.approx(50.8, rel=2e-3)
    assert clip_flops(profile)["decode"] / 1e12 == pytest.approx(5403, rel=2e-3)


def test_attention_and_convolutions():
    q, k = torch.empty(1, 2, 5, 8, device="meta"), torch.empty(1, 2, 7, 8, device="meta")
    assert count_flops(attention, q, k, k) == 2 * 4 * 5 * 7 * 8
    conv = torch.nn.Conv3d(3, 4, 3, padding=1, device="meta")
    assert count_flops(conv, torch.empty(1, 3, 2, 6, 5, device="meta")) == 2 * 27 * 3 * 4 * 2 * 6 * 5


@pytest.mark.parametrize("change", [{}, {"frames": 17}, {"stage2_guidance": 3.0, "stage1_steps": 2}])
def test_calls_are_those_of_a_clip(change: dict):
    profile = get_profile("tiny").override(**change)
    models = open_models(profile, None, torch.device("cpu"))
    variant = eager_variant(models, torch.float32)
    for _ in open_session(models, variant).generate(sample_request(profile)):
        pass
    made = {name: graph.calls for name, graph in variant.graphs.opened().items()}
    planned: Counter[str] = sum(clip_calls(profile).values(), Counter())
    assert made == dict(planned)


def test_calls_of_one_window_with_all_blocks():
    profile = get_profile("tiny")
    whole = replace(profile, noisy=profile.blocks - 1, neighbours=0)
    assert clip_calls(whole)["denoise"] == Counter(stage2_first=whole.stage2.steps)
    assert clip_flops(whole)["decode"] == clip_flops(profile)["decode"]


def test_first_frames_are_a_part_of_the_clip():
    profile = get_profile("tiny")
    assert first_flops(profile) < sum(clip_flops(profile).values())
    shortest = profile.override(frames=13)
    assert first_flops(shortest) == sum(clip_flops(shortest).values())
