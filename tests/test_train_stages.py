"""Training of both stages on tiny models: what is noised, what is clean, what the loss sees, what transition runs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from stage_clips import FRAMES, clips, stage1_task, stage2_task, stage_one, stage_parts
from torch import Tensor, nn

from swifti2v.engine.calls import Executables, dit_conditions
from swifti2v.engine.errors import SpecError
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile
from swifti2v.engine.reference import reference_blocks, reference_first
from swifti2v.engine.sampler import euler_sample, flow_sigmas
from swifti2v.engine.segments import plan_segments
from swifti2v.engine.stage1 import expert_of, image_condition, run_stage1
from swifti2v.engine.text import WordEncoder
from swifti2v.runtime.backend_eager import open_eager
from swifti2v.training.flow import Expert, ExpertLevels, NoiseLevels, dit_velocity, encode_clip, few_steps
from swifti2v.training.log import TrainingError
from swifti2v.training.stage1 import Stage1Task, first_frame_condition, stage1_batch
from swifti2v.training.stage2 import Stage2Config, draw_plan
from swifti2v.training.transition import StageOne, TransitionConfig, hybrid_reference, transit, transit_latents

BOUNDARY = 0.9


@pytest.fixture
def tiny() -> Profile:
    return get_profile("tiny").override(size=(128, 64), frames=FRAMES)


@pytest.fixture
def parts(tiny: Profile, make_modules) -> dict[str, nn.Module]:
    return stage_parts(tiny, make_modules(tiny))


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


@pytest.mark.parametrize(("probability", "calls"), [(1.0, 3), (0.0, 0)])
def test_training_of_stage_two_runs_stage_one(parts, probability: float, calls: int):
    outputs = calls_of(parts["stage1"])
    transition = TransitionConfig(probability=probability, steps=3)
    stage2_task(parts, own_context=0.0, transition=transition).loss(0, 0)
    assert len(outputs) == calls


def test_a_share_of_the_clips_goes_through_stage_one(parts):
    batch, share = clips(0, 0, 2), TransitionConfig(probability=0.5, steps=1)
    plain = encode_clip(parts["vae1"], batch.low)
    changed = []
    for seed in range(16):
        made = transit_latents(stage_one(parts), batch, share, torch.Generator().manual_seed(seed))
        changed += [not torch.equal(a, b) for a, b in zip(made, plain, strict=True)]
    assert 8 <= sum(changed) <= 24, "half of 32, give or take three deviations"


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
    uniform = NoiseLevels(grid_share=0.0, between=1.0).draw(4000, torch.Generator().manual_seed(0))
    assert (uniform < 0.5).float().mean() == pytest.approx(0.5, abs=0.03)


@given(blocks=st.integers(2, 30), seed=st.integers(0, 1000))
def test_drawn_plans_are_always_possible(blocks: int, seed: int):
    segments = draw_plan(blocks, Stage2Config(), torch.Generator().manual_seed(seed))
    assert [block for segment in segments for block in segment.noisy] == list(range(1, blocks))


class Tower:
    """An image encoder: the colours of 5 x 12 places of the first frame."""

    fingerprint = "colours"

    def encode(self, image: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(image[:, :, 0], (5, 12)).sum(1)  # [1, 3, 1, H, W] -> [1, 5, 12]


@pytest.fixture
def wan(tiny: Profile) -> Profile:
    """The tiny profile with a first stage that reads image tokens and has two experts."""
    dit = replace(tiny.stage1.dit, image_dim=12, image_tokens=5)
    return replace(tiny, stage1=replace(tiny.stage1, dit=dit, boundary=BOUNDARY))


@pytest.fixture
def two(wan: Profile, make_modules) -> StageOne:
    modules = make_modules(wan)
    torch.manual_seed(0)
    words = WordEncoder(wan.text.vocabulary, wan.stage1.dit.text_dim, wan.stage1.dit.text_len)
    return StageOne(
        modules["stage1_high"], words, modules["vae1"], low=modules["stage1_low"], boundary=BOUNDARY, images=Tower()
    )


def test_stage_one_in_training_is_that_of_inference(wan: Profile, two: StageOne, make_modules):
    """Two experts and image tokens: a whole sampling by training's own calls against the engine's graphs."""
    graphs = open_eager(wan, make_modules(wan), torch.float32)
    stage, sigmas = wan.stage1, flow_sigmas(4, wan.stage1.shift)
    text, tokens = torch.randn(1, 8, 16), torch.randn(1, 5, 12)
    by_expert = {
        expert: dit_conditions(graphs, expert, sigmas, text, image_tokens=tokens)
        for expert in ("stage1_high", "stage1_low")
    }
    assert {expert_of(wan, sigma) for sigma in sigmas} == set(by_expert), "both work"
    condition = torch.randn(1, 8, wan.blocks, stage.latent_height, stage.latent_width)
    noise = torch.randn(1, 4, wan.blocks, stage.latent_height, stage.latent_width)
    conditions = [by_expert[expert_of(wan, sigma)] for sigma in sigmas]
    with torch.no_grad():
        theirs = run_stage1(graphs, wan, condition, conditions, noise, sigmas)

    def ours(one: StageOne, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return few_steps(
                lambda x, sigma: one.velocity(torch.cat((x, condition), dim=1), sigma, text, tokens),
                noise, torch.ones(1), 4, stage.shift,
            )  # fmt: skip

    assert error(ours(two, tokens), theirs) < 1e-5
    assert error(ours(two, -tokens), theirs) > 1e-3, "the tokens are read"
    for other in (replace(two, low=two.dit), replace(two, dit=two.low)):
        assert error(ours(other, tokens), theirs) > 1e-3, "each expert has its steps"


def test_the_loss_depends_on_the_tokens_of_the_first_frame(two: StageOne):
    assert two.dit is not None
    batch = clips(0, 0)
    samples = stage1_batch(two.vae, batch, two.images)
    assert samples.image_tokens is not None
    for one, frame in zip(samples.image_tokens, batch.high[:, :, :1], strict=True):
        assert torch.equal(one, Tower().encode(frame.unsqueeze(0))[0])

    def loss(tokens: Tensor | None) -> Tensor:
        assert two.dit is not None
        given = replace(samples, image_tokens=tokens)
        return Stage1Task(two.dit.requires_grad_(True), two.words, lambda *_: given).loss(0, 0)[0]

    plain = loss(samples.image_tokens)
    assert abs(loss(samples.image_tokens.flip(0)).item() - plain.item()) > 1e-4
    plain.backward()
    learned = [name for name, p in two.dit.named_parameters() if p.grad is not None and (p.grad != 0).any()]
    assert "img_emb.proj.1.weight" in learned
    assert "blocks.1.cross_attn.k_img.weight" in learned
    with pytest.raises(SpecError, match=r"image tokens: got None, want \(2, 5, 12\)"):
        loss(None)
    with pytest.raises(SpecError, match=r"got \(2, 4, 12\)"):
        loss(samples.image_tokens[:, :4])


def test_a_model_without_image_tokens_refuses_them(parts):
    with pytest.raises(SpecError, match=r"got \(1, 5, 12\), want None"):
        dit_velocity(
            parts["stage1"], torch.randn(1, 12, 3, 4, 6), torch.ones(1), torch.randn(1, 8, 16),
            image_tokens=torch.randn(1, 5, 12),
        )  # fmt: skip


@pytest.mark.parametrize("expert", ["high", "low"])
def test_each_expert_is_trained_at_the_levels_it_works_at(expert: Expert):
    """As the levels of one DiT are distributed, without those of the other side."""
    drawn = ExpertLevels(expert=expert, boundary=BOUNDARY).draw(4000, torch.Generator().manual_seed(0))
    every = NoiseLevels().draw(16000, torch.Generator().manual_seed(1))
    assert len(drawn) == 4000
    assert ((drawn >= BOUNDARY) == (expert == "high")).all()
    mine = every[(every >= BOUNDARY) == (expert == "high")]
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        level = mine.quantile(share)
        assert abs((drawn < level).float().mean() - (mine < level).float().mean()) < 0.03


def test_transition_runs_the_expert_of_each_sigma(two: StageOne):
    """Samples of one batch cross the boundary at different steps."""
    assert two.dit is not None
    assert two.low is not None
    seen: dict[str, list[int]] = {"high": [], "low": []}
    for name, dit in (("high", two.dit), ("low", two.low)):
        dit.register_forward_hook(lambda *arguments, name=name: seen[name].append(len(arguments[2])))
    config = TransitionConfig(probability=1.0, lowest=0.85, highest=1.0, steps=4)
    for seed in range(3):
        for calls in seen.values():
            calls.clear()
        start = 0.85 + 0.15 * torch.rand(2, generator=torch.Generator().manual_seed(seed))
        steps = [sigma for value in start.tolist() for sigma in flow_sigmas(4, 5.0, value)]
        transit(two, clips(0, 0), config, torch.Generator().manual_seed(seed))
        assert sum(seen["high"]) == sum(sigma >= BOUNDARY for sigma in steps)
        assert sum(seen["low"]) == sum(sigma < BOUNDARY for sigma in steps)
    assert sum(seen["low"])


def test_transition_reads_the_first_frame_at_full_size(two: StageOne):
    batch, config = clips(0, 0), TransitionConfig(probability=1.0, steps=2)
    first, later = batch.high.clone(), batch.high.clone()
    first[:, :, 0], later[:, :, 1:] = -first[:, :, 0], -later[:, :, 1:]
    made, other, same = (
        transit(two, replace(batch, high=high), config, torch.Generator().manual_seed(0))
        for high in (batch.high, first, later)
    )
    assert error(other, made) > 1e-4
    assert torch.equal(same, made)


def test_a_batch_of_both_experts_keeps_its_order(two: StageOne):
    x, text, tokens = torch.randn(4, 12, 3, 4, 6), torch.randn(4, 8, 16), torch.randn(4, 5, 12)
    sigma = torch.tensor([0.3, 0.95, 0.89, BOUNDARY])
    with torch.no_grad():
        both = two.velocity(x, sigma, text, tokens)
        for i, dit in enumerate((two.low, two.dit, two.low, two.dit)):
            assert dit is not None
            row = slice(i, i + 1)
            alone = dit_velocity(dit, x[row], sigma[row], text[row], image_tokens=tokens[row])
            assert error(both[row], alone) < 1e-5


def test_transition_without_the_expert_it_reaches_is_refused(two: StageOne):
    low = replace(two, dit=None)
    never_high, high = TransitionConfig(probability=1.0), TransitionConfig(probability=1.0, lowest=0.95, highest=1.0)
    transit(low, clips(0, 0), never_high, torch.Generator().manual_seed(0))
    with pytest.raises(TrainingError, match="got no Stage I for noise levels"):
        transit(low, clips(0, 0), high, torch.Generator().manual_seed(0))
