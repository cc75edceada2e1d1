"""Both stages and the reference between them, on tiny models: streams are exact, segments can run again."""

from dataclasses import replace

import pytest
import torch

from swifti2v.engine.calls import dit_conditions, guided_velocity, window_feed
from swifti2v.engine.profile import Profile
from swifti2v.engine.reference import reference_blocks, reference_first, upsample
from swifti2v.engine.sampler import block_noise, stage_sigmas
from swifti2v.engine.segments import plan_segments
from swifti2v.engine.stage1 import expert_of, image_condition, run_stage1
from swifti2v.engine.stage2 import denoise_segment, run_segment, start_state, window_graphs
from swifti2v.engine.vae import VAE
from swifti2v.runtime.backend_eager import open_eager


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def picture(profile: Profile, stage: int = 2) -> torch.Tensor:
    config = profile.stage1 if stage == 1 else profile.stage2
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, 1, config.height, config.width, generator=generator) * 2 - 1


def motion_of(profile: Profile) -> torch.Tensor:
    stage = profile.stage1
    return block_noise(3, 1, range(profile.blocks), (stage.dit.out_channels, stage.latent_height, stage.latent_width))


def prompt(profile: Profile, seed: int = 0) -> torch.Tensor:
    dit = profile.stage2.dit
    return torch.randn(1, dit.text_len, dit.text_dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def modules(tiny: Profile, make_modules):
    return make_modules(tiny)


@pytest.fixture
def graphs(tiny: Profile, modules):
    return open_eager(tiny, modules, torch.float32)


def test_the_streamed_reference_is_the_whole_clips(tiny: Profile, graphs, modules):
    """Decode, upsample, replace frame 0, encode: block by block it equals doing each step to the whole clip."""
    image, motion = picture(tiny), motion_of(tiny)
    first, motion_cache, reference_cache = reference_first(graphs, image, motion)
    size = (tiny.height, tiny.width)
    rest, _, _ = reference_blocks(graphs, motion, tuple(range(1, 9)), size, motion_cache, reference_cache)
    vae1, vae2 = modules["vae1"], modules["vae2"]
    assert isinstance(vae1, VAE)
    assert isinstance(vae2, VAE)
    with torch.no_grad():
        clip = upsample(vae1.decode(motion), *size)
        clip = torch.cat((image, clip[:, :, 1:]), dim=2)
        whole = vae2.encode(clip)
    assert error(torch.cat((first, rest), dim=2), whole) < 1e-5


def test_upsampling_stays_in_range_and_keeps_flat_fields():
    flat = torch.full((1, 3, 2, 8, 12), 0.25)
    assert torch.allclose(upsample(flat, 32, 48), torch.full((1, 3, 2, 32, 48), 0.25), atol=1e-6)
    edges = torch.sign(torch.randn(1, 3, 1, 8, 12))
    assert upsample(edges, 32, 48).abs().max() <= 1


def run_all(profile: Profile, graphs, keep_states: bool = False):
    image, motion = picture(profile), motion_of(profile)
    sigmas = stage_sigmas(profile.stage2, profile.stage2_start)
    conditions = dit_conditions(graphs, "stage2", sigmas, prompt(profile))
    state, states, pixels = start_state(graphs, image, motion), [], []
    for segment in plan_segments(profile.blocks, profile.noisy, profile.neighbours):
        if keep_states:
            states.append(state.clone())
        made, state = run_segment(graphs, profile, segment, state, conditions, motion, 5, sigmas)
        pixels.append(made)
    return pixels, states, (conditions, motion, sigmas)


@pytest.mark.parametrize("frames", [33, 37, 41])
def test_any_segment_runs_again_to_the_same_bits(tiny: Profile, make_modules, frames: int):
    profile = tiny.override(frames=frames)
    graphs = open_eager(profile, make_modules(profile), torch.float32)
    pixels, states, (conditions, motion, sigmas) = run_all(profile, graphs, keep_states=True)
    assert sum(chunk.shape[2] for chunk in pixels) == frames
    segments = plan_segments(profile.blocks, profile.noisy, profile.neighbours)
    for segment, state, expected in reversed(list(zip(segments, states, pixels, strict=True))):
        again, _ = run_segment(graphs, profile, segment, state, conditions, motion, 5, sigmas)
        assert torch.equal(again, expected)


def test_a_longer_clip_has_the_same_start(tiny: Profile, graphs, make_modules):
    """Segments depend on what is before them alone, given the motion."""
    longer = tiny.override(frames=57)
    more = open_eager(longer, make_modules(longer), torch.float32)
    short, long = run_all(tiny, graphs)[0], run_all(longer, more)[0]
    assert torch.equal(short[0], long[0])
    assert torch.equal(short[1], long[1])


def test_decoded_segments_are_the_whole_clips_decode(tiny: Profile, graphs, modules):
    image, motion = picture(tiny), motion_of(tiny)
    sigmas = stage_sigmas(tiny.stage2)
    conditions = dit_conditions(graphs, "stage2", sigmas, prompt(tiny))
    state = start_state(graphs, image, motion)
    latents, pixels = [state.anchor], []
    for segment in plan_segments(tiny.blocks):
        before = state.latents
        made, state = run_segment(graphs, tiny, segment, state, conditions, motion, 0, sigmas)
        assert before.shape[2] <= tiny.noisy + tiny.neighbours - 1
        latents.append(state.latents[:, :, -len(segment.noisy) :])
        pixels.append(made)
    vae2 = modules["vae2"]
    assert isinstance(vae2, VAE)
    with torch.no_grad():
        whole = vae2.decode(torch.cat(latents, dim=2))
    assert error(torch.cat(pixels, dim=2), whole) < 1e-5


@pytest.mark.parametrize(("noisy", "neighbours"), [(1, 0), (1, 1), (3, 0), (3, 2), (5, 1), (8, 0)])
def test_other_windows(tiny: Profile, make_modules, noisy: int, neighbours: int):
    profile = tiny.override(noisy=noisy, neighbours=neighbours)
    pixels, _, _ = run_all(profile, open_eager(profile, make_modules(profile), torch.float32))
    assert sum(chunk.shape[2] for chunk in pixels) == profile.frames


def step_input(profile: Profile, graphs, seed: int = 0):
    graph = graphs["stage2_next"]
    conditions = dit_conditions(graphs, "stage2", stage_sigmas(profile.stage2), prompt(profile))
    feed = window_feed(graph, (0, 3, 4, 5, 6), 2, profile.stage2.dit.head_dim, torch.device("cpu"))
    latents = torch.randn(graph.spec.inputs[0].shape, generator=torch.Generator().manual_seed(seed))
    return graph, conditions, {**feed, "latents": latents}


def test_context_attends_both_ways_or_one_way(tiny: Profile, modules):
    """What the clean blocks carry depends on the noisy ones, unless the profile says one-way."""
    dit = modules["stage2"]
    for context, depends in (("both", True), ("one-way", False)):
        profile = replace(tiny, context=context)
        _, conditions, feed = step_input(profile, open_eager(profile, modules, torch.float32))
        changed = feed["latents"].clone()
        changed[:, :, 2:] += 1

        def clean_output(latents: torch.Tensor) -> torch.Tensor:
            from swifti2v.engine.dit import TextKV

            tables, text = conditions.tables[0], conditions.text  # noqa: B023
            with torch.no_grad():
                return dit(
                    latents, tables["modulation"], tables["head_modulation"], feed["rows"],  # noqa: B023
                    (feed["cos"], feed["sin"]), TextKV(text["text_k"], text["text_v"]), feed.get("mask"),  # noqa: B023
                )[:, :, :2]  # fmt: skip

        moved = error(clean_output(changed), clean_output(feed["latents"]))
        assert (moved > 1e-3) == depends
        assert moved == 0 or depends
        assert ("mask" in feed) == (not depends)


def test_noisy_blocks_see_the_neighbour_and_the_anchor(tiny: Profile, graphs):
    graph, conditions, feed = step_input(tiny, graphs)
    base = guided_velocity(graph, conditions, 0, feed)[0]
    for block in (0, 1):
        latents = feed["latents"].clone()
        latents[:, :, block] += 1
        assert error(guided_velocity(graph, conditions, 0, {**feed, "latents": latents})[0], base) > 1e-3


def test_positions_are_absolute_or_of_the_window(tiny: Profile, graphs):
    graph = graphs["stage2_next"]
    head_dim, cpu = tiny.stage2.dit.head_dim, torch.device("cpu")
    absolute = window_feed(graph, (0, 6, 7, 8, 9), 2, head_dim, cpu)
    window = window_feed(graph, range(5), 2, head_dim, cpu)
    assert not torch.equal(absolute["cos"], window["cos"])
    assert absolute["rows"].tolist() == [[0, 0, 1, 1, 1]]


def test_the_reference_can_be_switched_off(tiny: Profile, graphs):
    segment = plan_segments(tiny.blocks)[0]
    state = start_state(graphs, picture(tiny), motion_of(tiny))
    conditions = dit_conditions(graphs, "stage2", (1.0, 0.5), prompt(tiny))
    noise = block_noise(0, 2, segment.noisy, state.anchor.shape[1:2] + state.anchor.shape[3:])

    def run(profile: Profile, reference: torch.Tensor) -> torch.Tensor:
        steps = window_graphs(graphs, segment)
        return denoise_segment(steps, profile, segment, state, conditions, reference, noise, (1.0, 0.5))[0]

    some, other = torch.ones_like(noise), -torch.ones_like(noise)
    assert not torch.equal(run(tiny, some), run(tiny, other))
    off = replace(tiny, reference=False)
    assert torch.equal(run(off, some), run(off, other))


def test_starting_from_the_reference(tiny: Profile, make_modules):
    """A plain model without reference channels starts from the noised reference; at a low strength it stays near it."""
    plain = replace(tiny.stage2, dit=replace(tiny.stage2.dit, in_channels=6))
    near, far = (replace(tiny, stage2=plain, stage2_init="reference", strength=s) for s in (0.01, 1.0))
    graphs = open_eager(near, make_modules(near), torch.float32)
    segment = plan_segments(near.blocks)[0]
    state = start_state(graphs, picture(near), motion_of(near))
    shape = (*state.anchor.shape[1:2], *state.anchor.shape[3:])
    reference, noise = block_noise(1, 2, (1, 2, 3), shape), block_noise(2, 2, (1, 2, 3), shape)
    moved = {}
    for profile in (near, far):
        sigmas = stage_sigmas(profile.stage2, profile.strength)
        conditions = dit_conditions(graphs, "stage2", sigmas, prompt(profile))
        steps = window_graphs(graphs, segment)
        made, _ = denoise_segment(steps, profile, segment, state, conditions, reference, noise, sigmas)
        moved[profile.strength] = error(made, reference)
    assert moved[0.01] < 0.05
    assert moved[1.0] > 0.5


def test_guidance_is_the_usual_formula_and_costs_nothing_at_one(tiny: Profile, graphs):
    graph, _, feed = step_input(tiny, graphs)
    arguments = (graphs, "stage2", (1.0,), prompt(tiny, 1), prompt(tiny, 2))
    plain = dit_conditions(*arguments)
    assert plain.negative is None
    guided = dit_conditions(*arguments, guidance=3.0)
    other = dit_conditions(graphs, "stage2", (1.0,), prompt(tiny, 2))
    yes, no, mixed = (guided_velocity(graph, by, 0, feed)[0] for by in (plain, other, guided))
    assert torch.allclose(mixed, no + 3 * (yes - no), atol=1e-6)


def test_two_experts_share_the_steps_at_the_boundary(tiny: Profile):
    profile = replace(tiny, stage1=replace(tiny.stage1, boundary=0.9))
    assert [expert_of(profile, sigma) for sigma in stage_sigmas(profile.stage1)] == [
        "stage1_high", "stage1_high", "stage1_low", "stage1_low",
    ]  # fmt: skip


def test_image_condition_is_mask_and_encoded_clip(tiny: Profile, graphs, modules):
    image = picture(tiny, 1)
    condition = image_condition(graphs, tiny, image)
    grey = torch.zeros(1, 3, tiny.frames - 1, *image.shape[3:])
    vae1 = modules["vae1"]
    assert isinstance(vae1, VAE)
    with torch.no_grad():
        whole = vae1.encode(torch.cat((image, grey), dim=2))
    assert error(condition[:, 4:], whole) < 1e-5
    assert (condition[:, :4, 0] == 1).all()
    assert (condition[:, :4, 1:] == 0).all()


def test_stage_one_on_a_first_block_model_keeps_the_image_block(tiny: Profile, make_modules):
    profile = replace(tiny, stage1=replace(tiny.stage1, dit=replace(tiny.stage1.dit, in_channels=4)))
    graphs = open_eager(profile, make_modules(profile), torch.float32)
    condition = image_condition(graphs, profile, picture(profile, 1))
    sigmas = stage_sigmas(profile.stage1)
    conditions = [dit_conditions(graphs, "stage1", sigmas, prompt(profile))] * len(sigmas)
    motion = run_stage1(graphs, profile, condition, conditions, motion_of(profile), sigmas)
    assert torch.equal(motion[:, :, :1], condition)
    assert motion.shape == motion_of(profile).shape
