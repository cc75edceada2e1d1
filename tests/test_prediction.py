"""DiTs that give clean latents in place of velocities: in the engine, in training, and in their files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swifti2v.engine.calls import dit_conditions
from swifti2v.engine.dit import DiT
from swifti2v.engine.errors import ProfileError, SwiftError
from swifti2v.engine.profile import Profile
from swifti2v.engine.sampler import block_noise, stage_sigmas
from swifti2v.engine.segments import plan_segments
from swifti2v.engine.stage1 import image_condition, run_stage1
from swifti2v.engine.stage2 import denoise_segment, start_state
from swifti2v.engine.weights import load_dit, save_dit
from swifti2v.runtime.backend_eager import open_eager
from swifti2v.training.flow import few_steps, prediction_loss, velocity_of
from swifti2v.training.stage1 import run_few_steps
from swifti2v.training.stage2 import Stage2Task

CPU = torch.device("cpu")


@pytest.fixture
def sampling(tiny: Profile) -> Profile:
    """The tiny profile, both of whose DiTs give clean latents."""
    one, two = (replace(stage, dit=replace(stage.dit, prediction="sample")) for stage in (tiny.stage1, tiny.stage2))
    return replace(tiny, stage1=one, stage2=two)


def dit_of(modules: dict, name: str) -> DiT:
    dit = modules[name]
    assert isinstance(dit, DiT)
    return dit


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def words(profile: Profile) -> torch.Tensor:
    dit = profile.stage2.dit
    return torch.randn(1, dit.text_len, dit.text_dim, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sampling", "tiny"])
def test_stage_one_samples_as_training_does(name: str, make_modules, request: pytest.FixtureRequest):
    profile = request.getfixturevalue(name)
    modules = make_modules(profile)
    graphs, sigmas, stage = open_eager(profile, modules, torch.float32), stage_sigmas(profile.stage1), profile.stage1
    image = torch.rand(1, 3, 1, stage.height, stage.width) * 2 - 1
    condition = image_condition(graphs, profile, image)
    noise = block_noise(5, 1, range(profile.blocks), (4, stage.latent_height, stage.latent_width))
    conditions = [dit_conditions(graphs, "stage1", sigmas, words(profile))] * len(sigmas)
    made = run_stage1(graphs, profile, condition, conditions, noise, sigmas)
    ours = run_few_steps(
        dit_of(modules, "stage1"), condition, words(profile), noise, torch.ones(1), stage.steps, stage.shift
    )
    assert error(made, ours) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["sampling", "tiny"])
def test_stage_two_samples_as_training_does(name: str, make_modules, request: pytest.FixtureRequest):
    """A segment with context, from the engine and by the training's own window and steps."""
    profile = request.getfixturevalue(name)
    modules = make_modules(profile)
    graphs, sigmas, stage = open_eager(profile, modules, torch.float32), stage_sigmas(profile.stage2), profile.stage2
    first, segment = plan_segments(profile.blocks)[:2]
    shape = (6, stage.latent_height, stage.latent_width)
    latents, reference = (block_noise(seed, 2, range(profile.blocks), shape) for seed in (1, 2))
    image = torch.rand(1, 3, 1, profile.height, profile.width) * 2 - 1
    motion = block_noise(3, 1, range(profile.blocks), (4, profile.stage1.latent_height, profile.stage1.latent_width))
    state = replace(
        start_state(graphs, image, motion),
        segment=1,
        latents=latents[:, :, list(first.noisy)],
        reference=reference[:, :, list(first.noisy)],
    )
    latents[:, :, :1] = reference[:, :, :1] = state.anchor
    noise = block_noise(4, 2, segment.noisy, shape)
    conditions = dit_conditions(graphs, "stage2", sigmas, words(profile))
    own = reference[:, :, list(segment.noisy)]
    made, _ = denoise_segment(graphs["stage2_next"], profile, segment, state, conditions, own, noise, sigmas)
    dit = dit_of(modules, "stage2")
    task = Stage2Task(dit, torch.nn.Identity(), lambda step, seed: None)  # type: ignore[arg-type]

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        output = task.window_output(latents, reference, words(profile), segment, x, sigma)
        return velocity_of(dit, output, own, x, sigma)

    ours = few_steps(velocity, noise, torch.ones(1), stage.steps, stage.shift)
    assert error(made, ours) < 1e-4


@torch.no_grad()
def test_a_sample_is_where_the_last_step_ends(sampling: Profile, make_modules):
    """One step from pure noise gives the reference and the output, whatever the noise."""
    modules = make_modules(sampling)
    torch.nn.init.zeros_(dit_of(modules, "stage2").head.head.weight)
    torch.nn.init.zeros_(dit_of(modules, "stage2").head.head.bias)
    graphs = open_eager(sampling, modules, torch.float32)
    image = torch.rand(1, 3, 1, sampling.height, sampling.width) * 2 - 1
    motion = block_noise(3, 1, range(9), (4, sampling.stage1.latent_height, sampling.stage1.latent_width))
    segment, state = plan_segments(sampling.blocks)[0], start_state(graphs, image, motion)
    reference, noise = (
        block_noise(seed, 2, segment.noisy, state.anchor.shape[1:2] + state.anchor.shape[3:]) for seed in (1, 2)
    )
    for sigmas in ((1.0,), (1.0, 0.9, 0.5)):
        conditions = dit_conditions(graphs, "stage2", sigmas, words(sampling))
        graph = graphs["stage2_first"]
        made, _ = denoise_segment(graph, sampling, segment, state, conditions, reference, noise, sigmas)
        assert error(made, reference) < 1e-6
        off = replace(sampling, reference=False)
        made, _ = denoise_segment(graph, off, segment, state, conditions, reference, noise, sigmas)
        assert made.abs().max() < 1e-5, "without a reference there is nothing to add to"


def test_the_loss_is_none_where_the_prediction_is_right(tiny: Profile, sampling: Profile):
    target, noise, base = (torch.randn(2, 6, 3, 4, 4) for _ in range(3))
    sigma = torch.tensor([0.5, 0.05])
    velocity, sample = DiT(tiny.stage2.dit), DiT(sampling.stage2.dit)
    assert prediction_loss(velocity, noise - target, target, noise, base, sigma) == 0
    assert prediction_loss(sample, target - base, target, noise, base, sigma) < 1e-10
    off = (target - base) + torch.tensor([1.0, 1.0]).view(-1, 1, 1, 1, 1)
    assert prediction_loss(sample, off, target, noise, base, sigma).item() == pytest.approx((2 + 10) / 2, rel=1e-3)


def test_files_say_what_a_dit_predicts(sampling: Profile, tiny: Profile, make_modules, tmp_path: Path):
    save_dit(dit_of(make_modules(sampling), "stage2"), tmp_path / "sample")
    assert load_dit(tmp_path / "sample").config == sampling.stage2.dit
    save_dit(dit_of(make_modules(tiny), "stage2"), tmp_path / "velocity")
    assert "prediction" not in json.loads((tmp_path / "velocity" / "config.json").read_text()), "as Wan writes it"
    config = tmp_path / "sample" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction": "noise"}))
    with pytest.raises(SwiftError, match="prediction: got 'noise', want one of velocity, sample"):
        load_dit(tmp_path / "sample")
    with pytest.raises(ProfileError):
        replace(tiny.stage1.dit, prediction="epsilon")  # type: ignore[arg-type]
