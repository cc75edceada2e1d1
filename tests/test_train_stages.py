"""Training of both stages on tiny models: what is noised, what is clean, what the loss sees, what transition runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from swifti2v.engine.calls import Executables
from swifti2v.engine.dit import DiT
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile
from swifti2v.engine.reference import reference_blocks, reference_first
from swifti2v.engine.sampler import euler_sample, flow_sigmas
from swifti2v.engine.segments import plan_segments
from swifti2v.engine.stage1 import image_condition
from swifti2v.engine.text import WordEncoder
from swifti2v.engine.vae import VAE
from swifti2v.runtime.backend_eager import open_eager
from swifti2v.training.flow import ClipBatch, NoiseLevels, dit_velocity, encode_clip, few_steps
from swifti2v.training.stage1 import Stage1Config, Stage1Task, first_frame_condition, stage1_batch
from swifti2v.training.stage2 import Stage2Config, Stage2Task, draw_plan, stage2_batch
from swifti2v.training.transition import StageOne, TransitionConfig, hybrid_reference, transit

FRAMES = 21


def clips(step: int, seed: int, count: int = 2) -> ClipBatch:
    """Drifting sine waves, high 64x128 and low 16x32, a function of (step, seed)."""
    generator = torch.Generator().manual_seed(1000 * step + seed)
    phase = torch.rand(count, 3, 1, 1, 1, generator=generator) * 6
    t = torch.arange(FRAMES).view(1, 1, -1, 1, 1) * 0.3
    y, x = torch.arange(64).view(1, 1, 1, -1, 1) * 0.2, torch.arange(128).view(1, 1, 1, 1, -1) * 0.1
    high = torch.sin(phase + t + y + x) * 0.8
    low = high.unflatten(4, (32, 4)).unflatten(3, (16, 4)).mean(dim=(4, 6))  # [B, 3, T, 16, 4, 32, 4] -> [.., 16, 32]
    return ClipBatch(high, low, ["camera pans left", "zoom in"][:count])


@pytest.fixture
def tiny() -> Profile:
    return get_profile("tiny").override(size=(128, 64), frames=FRAMES)


@pytest.fixture
def parts(tiny: Profile, make_modules):
    torch.manual_seed(0)
    modules = make_modules(tiny)
    dit = tiny.stage1.dit
    words = WordEncoder(tiny.text.vocabulary, dit.text_dim, dit.text_len)
    for name in ("stage1", "stage2"):
        modules[name].requires_grad_(True)
    return {**modules, "words": words}


def stage_one(parts: dict[str, nn.Module]) -> StageOne:
    dit, words, vae = parts["stage1"], parts["words"], parts["vae1"]
    assert isinstance(dit, DiT)
    assert isinstance(words, WordEncoder)
    assert isinstance(vae, VAE)
    return StageOne(dit, words, vae)


def stage1_task(one: StageOne, **config) -> Stage1Task:
    assert one.dit is not None
    return Stage1Task(
        one.dit, one.words, lambda step, seed: stage1_batch(one.vae, clips(step, seed)), Stage1Config(**config)
    )


def stage2_task(parts: dict[str, nn.Module], **config) -> Stage2Task:
    dit, vae = parts["stage2"], parts["vae2"]
    assert isinstance(dit, DiT)
    assert isinstance(vae, VAE)
    one, settings = stage_one(parts), Stage2Config(**config)
    return Stage2Task(
        dit,
        one.words,
        lambda step, seed: stage2_batch(one, vae, clips(step, seed), settings.transition, seed),
        settings,
    )


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def calls_of(module: nn.Module) -> list[Tensor]:
    """Outputs of a module from now on, their gradients kept."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
        outputs.append(output)

    module.register_forward_hook(keep)
    return outputs


@pytest.mark.parametrize("own_context", [0.0, 1.0])
def test_the_loss_sees_the_noisy_blocks_alone(parts, own_context: float):
    outputs = calls_of(parts["stage2"])
    for step in range(4):
        outputs.clear()
        task = stage2_task(parts, own_context=own_context, noisy=(2,), neighbours=(1,))
        loss, notes = task.loss(step, step)
        loss.backward()
        gradient = outputs[-1].grad
        assert gradient is not None
        clean = plan_segments(6, 2, 1)[int(notes["segment"])].clean
        assert (gradient[:, :, :clean] == 0).all()
        assert (gradient[:, :, clean:] != 0).any(dim=(1, 3, 4)).all()
        own = own_context == 1 and notes["segment"] > 0
        assert len(outputs) == (5 if own else 1), "own context costs four steps without gradient"


def test_conditioning_blocks_are_clean_and_at_timestep_zero(parts):
    task = stage2_task(parts, own_context=0.0, noisy=(2,), neighbours=(1,), transition=TransitionConfig(probability=0))
    seen: list[tuple] = []
    parts["stage2"].register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    for step in range(3):
        _, notes = task.loss(step, 7)
        latents, rows, modulation = seen[-1][0], seen[-1][3], seen[-1][1]
        truth = encode_clip(parts["vae2"], clips(step, 7).high)
        segment = plan_segments(6, 2, 1)[int(notes["segment"])]
        clean = segment.clean
        assert torch.equal(latents[:, :6, :clean], truth[:, :, list(segment.window[:clean])])
        for place, block in enumerate(segment.noisy, clean):
            assert error(latents[:, :6, place], truth[:, :, block]) > 0.1
        assert (rows[:, :clean] == 0).all(), "row 0 is timestep 0"
        assert (rows[:, clean:] > 0).all()
        zero, _ = task.dit.time_tables(torch.zeros(1))
        assert torch.allclose(modulation[:, 0], zero[:, 0], atol=1e-6)


def test_transition_runs_stage_one(parts):
    outputs = calls_of(parts["stage1"])
    batch, generator = clips(0, 0), torch.Generator()
    always, never = (TransitionConfig(probability=p, steps=3) for p in (1.0, 0.0))
    made = transit(stage_one(parts), batch, always, generator.manual_seed(1))
    assert len(outputs) == 3
    plain = transit(stage_one(parts), batch, never, generator.manual_seed(1))
    assert error(made, plain) > 1e-3
    with torch.no_grad():
        parts["stage1"].head.head.weight.mul_(3)
    again = transit(stage_one(parts), batch, always, generator.manual_seed(1))
    assert error(again, made) > 1e-3, "the artifacts are those of this Stage I"
    assert made.shape == batch.low.shape


def test_the_training_reference_is_the_one_of_inference(tiny: Profile, parts):
    """Whole clips in a batch against the engine's stream, block by block."""
    graphs: Executables = open_eager(tiny, {k: m for k, m in parts.items() if k != "words"}, torch.float32)
    stage, motion = tiny.stage1, None
    motion = torch.randn(1, 4, tiny.blocks, stage.latent_height, stage.latent_width)
    image = torch.rand(1, 3, 1, tiny.height, tiny.width) * 2 - 1
    first, motion_cache, cache = reference_first(graphs, image, motion)
    size = (tiny.height, tiny.width)
    rest, _, _ = reference_blocks(graphs, motion, tuple(range(1, tiny.blocks)), size, motion_cache, cache)
    vae1, vae2 = parts["vae1"], parts["vae2"]
    with torch.no_grad():
        low = vae1.decode(motion)
    high = torch.cat((image, torch.zeros(1, 3, FRAMES - 1, *size)), dim=2)
    assert error(hybrid_reference(vae2, low, high), torch.cat((first, rest), dim=2)) < 1e-5


def test_the_training_condition_is_the_one_of_inference(tiny: Profile, parts):
    graphs = open_eager(tiny, {k: m for k, m in parts.items() if k != "words"}, torch.float32)
    low = torch.rand(1, 3, FRAMES, tiny.stage1.height, tiny.stage1.width) * 2 - 1
    assert error(first_frame_condition(parts["vae1"], low), image_condition(graphs, tiny, low[:, :, :1])) < 1e-5


def test_stage_one_trains_dit_and_words_and_nothing_else(parts):
    one = stage_one(parts)
    task = stage1_task(one, drop_prompt=0.0)
    loss, _ = task.loss(0, 0)
    loss.backward()
    for name, module in task.modules.items():
        missing = [key for key, parameter in module.named_parameters() if parameter.grad is None]
        assert not missing, f"{name}: {missing}"
    assert all(parameter.grad is None for parameter in one.vae.parameters())
    assert task.loss(0, 0)[0].item() == pytest.approx(loss.item()), "a step is a function of (step, seed)"
    assert task.loss(1, 0)[0].item() != loss.item()


def test_dropped_prompts_are_empty(parts):
    one = stage_one(parts)
    task = stage1_task(one, drop_prompt=1.0)
    seen: list[Tensor] = []
    one.words.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    task.loss(0, 0)
    assert (seen[0] == 0).all()


def test_every_sample_has_its_own_noise_level(parts):
    dit, text = parts["stage1"], torch.randn(2, 8, 16)
    latents, sigma = torch.randn(2, 12, 3, 4, 6), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        both = dit_velocity(dit, latents, sigma, text, clean=1)
        alone = [dit_velocity(dit, latents[i : i + 1], sigma[i : i + 1], text[i : i + 1], clean=1) for i in (0, 1)]
    assert error(both, torch.cat(alone)) < 1e-5


def test_few_steps_from_one_is_the_engines_sampler():
    x, pull = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    ours = few_steps(lambda value, _: value * 0.5 - pull, x, torch.ones(2), 4, 5.0)
    theirs = euler_sample(lambda value, _: value * 0.5 - pull, x, flow_sigmas(4, 5.0))
    assert torch.allclose(ours, theirs, atol=1e-5)
    levels: list[Tensor] = []
    few_steps(lambda value, sigma: levels.append(sigma) or value, x, torch.tensor([1.0, 0.5]), 4, 5.0)
    assert torch.allclose(torch.stack(levels)[:, 1], torch.tensor(flow_sigmas(4, 5.0, 0.5)), atol=1e-6)


def test_noise_levels_cover_the_range_and_favour_inference():
    drawn = NoiseLevels(grid_share=0.5).draw(4000, torch.Generator().manual_seed(0))
    assert drawn.min() > 0
    assert drawn.max() <= 1
    grid = torch.tensor(flow_sigmas(4, 5.0))
    on_grid = (drawn.unsqueeze(1) - grid).abs().min(dim=1).values < 1e-6
    assert 0.45 < on_grid.float().mean() < 0.55
    assert (NoiseLevels(grid_share=0.0).draw(4000, torch.Generator().manual_seed(0)) < 0.5).float().mean() > 0.1


@given(blocks=st.integers(2, 30), seed=st.integers(0, 1000))
def test_drawn_plans_are_always_possible(blocks: int, seed: int):
    segments = draw_plan(blocks, Stage2Config(), torch.Generator().manual_seed(seed))
    assert [block for segment in segments for block in segment.noisy] == list(range(1, blocks))
