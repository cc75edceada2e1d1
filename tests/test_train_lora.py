"""LoRA training: starts from the model itself, changes the pairs alone, and the file merges to the same model."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swifti2v.engine.dit import DiT
from swifti2v.engine.errors import WeightsError
from swifti2v.engine.presets import PROFILES, get_profile
from swifti2v.engine.profile import DiTConfig, Profile
from swifti2v.engine.weights import load_dit, save_dit
from swifti2v.runtime.encoders import ClipVisionEncoder
from swifti2v.runtime.model_paths import find_models
from swifti2v.training.adapt import AdaptConfig, LoraTask, adapt_task, large_enough
from swifti2v.training.batches import Crops, clip_batch
from swifti2v.training.cli import main
from swifti2v.training.clips import ClipConfig
from swifti2v.training.drawing import Drawer
from swifti2v.training.flow import ExpertLevels, dit_velocity
from swifti2v.training.log import TrainingError
from swifti2v.training.lora import Lora, checkpoint_blocks, save_lora
from swifti2v.training.stage1 import Stage1Task
from swifti2v.training.stage2 import Stage2Task
from swifti2v.training.trainer import TrainConfig, step_seed, train

CONFIG = DiTConfig(48, 96, 4, 3, 6, 6, text_dim=16, text_len=8, freq_dim=32)


def model(tmp_path: Path) -> DiT:
    torch.manual_seed(0)
    save_dit(DiT(CONFIG), tmp_path / "base")
    return load_dit(tmp_path / "base")


def run(dit: DiT, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(2, 6, 3, 4, 6, generator=generator), torch.randn(2, 8, 16, generator=generator)
    return dit.denoise(latents, torch.tensor([[0.0, 500, 500], [0, 900, 900]]), text)


def fit(dit: DiT, lora: Lora, steps: int = 5) -> list[float]:
    optimizer, losses = torch.optim.Adam(lora.parameters(), lr=0.02), []
    for _ in range(steps):
        loss = (run(dit) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_file_merges_to_the_trained_model(tmp_path: Path):
    dit = model(tmp_path)
    base = run(dit)
    lora = Lora(dit, rank=4, alpha=8.0)
    assert torch.equal(run(dit), base), "it starts from the model itself"
    losses = fit(dit, lora)
    assert losses[-1] < 0.8 * losses[0]
    save_file(lora.tensors(), tmp_path / "lora.safetensors")
    merged = load_dit(tmp_path / "base", loras=[(tmp_path / "lora.safetensors", 1.0)])
    with torch.no_grad():
        assert torch.allclose(run(merged), run(dit), atol=1e-5)
        assert (run(merged) - base).norm() / base.norm() > 0.05
    lora.remove()
    assert torch.equal(run(dit), base), "the model itself is as it was"


def test_only_the_pairs_learn(tmp_path: Path):
    dit = model(tmp_path)
    lora = Lora(dit, rank=2, alpha=2.0, targets=r"blocks\.1\.self_attn\.[qv]")
    assert sorted(lora.pairs) == ["blocks/1/self_attn/q", "blocks/1/self_attn/v"]
    fit(dit, lora, 1)
    assert all(parameter.grad is None for parameter in dit.parameters())
    assert all(parameter.grad is not None for parameter in lora.parameters())


def test_targets_that_match_nothing_are_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match="want a pattern of layer names"):
        Lora(model(tmp_path), targets="to_q")


def test_checkpointed_blocks_give_the_same_gradients(tmp_path: Path):
    plain, saving = model(tmp_path), model(tmp_path)
    checkpoint_blocks(saving)
    for dit in (plain, saving):
        dit.requires_grad_(True)
        run(dit).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if one.grad is not None:
            assert other.grad is not None, name
            assert torch.allclose(one.grad, other.grad, atol=1e-6), name


# A first stage like Wan's: image tokens, two experts or one; every file small and real.

transformers: Any = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def profile() -> Profile:
    tiny = get_profile("tiny").override(size=(128, 64), frames=13)
    dit = replace(tiny.stage1.dit, image_dim=12, image_tokens=5)
    return replace(tiny, stage1=replace(tiny.stage1, dit=dit, boundary=0.9))


@pytest.fixture(scope="module")
def two_experts(profile: Profile, save_models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with both experts, and a CLIP tower of 5 tokens."""
    folder = save_models(profile, tmp_path_factory.mktemp("two"))
    (folder / "stage1_high").rename(folder / "stage1")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    transformers.CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    return folder


@pytest.fixture
def one_expert(two_experts: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(two_experts, tmp_path / "one")
    shutil.rmtree(folder / "stage1_low")
    return folder


def task_of(profile: Profile, stage: Any, models: Path, bf16: bool = False, **config: Any) -> LoraTask:
    """A LoRA task on one clip that is used again and again."""
    photos = [np.random.default_rng(0).integers(0, 256, (200, 240, 3), dtype=np.uint8)]
    settings = TrainConfig(20, lr=0.02, warmup=1, curve=False, skips=0, bf16=bf16)
    config = {"rank": 4, "window": 1, "reuse": 1000.0, **config}
    adapt = AdaptConfig(settings, **config)
    return adapt_task(profile, stage, models, photos, adapt, open_images=ClipVisionEncoder.open)


def other_lora(dit: Path, file: Path) -> Path:
    """A LoRA for that DiT as one finds them, with random values."""
    tensors = Lora(load_dit(dit), rank=2).tensors()
    save_file({n: torch.randn(t.shape) / 4 if t.ndim == 2 else t for n, t in tensors.items()}, file)
    return file


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_lora_of_one_expert_learns_and_merges(expert: Any, profile: Profile, two_experts: Path, tmp_path: Path):
    task = task_of(profile, "stage1", two_experts, expert=expert)
    assert isinstance(task.task, Stage1Task)
    samples = task.task.batch(0, 0)
    clips = ClipConfig(profile.width, profile.height, profile.frames, low_factor=4)
    photos = [np.random.default_rng(0).integers(0, 256, (200, 240, 3), dtype=np.uint8)]
    places = Crops(1, profile.width, profile.height).places(clips, step_seed(0, "sample", 0))
    high = clip_batch(Drawer(photos).ahead(clips, lambda _: places)(0), "cpu").high
    tower = ClipVisionEncoder.open(two_experts / "image_encoder")
    assert samples.image_tokens is not None
    assert torch.equal(samples.image_tokens, tower.encode(high[:, :, :1])), "of the sample's first frame"
    levels = [task.loss(0, seed)[1]["sigma"] for seed in range(20)]
    assert all((level >= 0.9) == (expert == "high") for level in levels)

    def mean() -> float:
        with torch.no_grad():
            return sum(task.loss(0, seed)[0].item() for seed in range(4)) / 4

    before = mean()
    train(task, TrainConfig(20, lr=0.02, warmup=1, curve=False, log_every=20), tmp_path / "run")
    assert mean() < 0.9 * before
    name = "stage1" if expert == "high" else "stage1_low"
    file = save_lora(task.lora, tmp_path / "lora.safetensors")
    paths = find_models(profile, two_experts)
    assert find_models(profile, two_experts).stage1_low is not None
    merged, base = load_dit(getattr(paths, name), loras=[(file, 1.0)]), load_dit(getattr(paths, name))
    x, text = torch.randn(1, 12, 3, 4, 8), torch.randn(1, 8, 16)
    with torch.no_grad():
        ours, theirs, without = (
            dit_velocity(dit, x, torch.tensor([0.9]), text, image_tokens=samples.image_tokens)
            for dit in (task.task.dit, merged, base)
        )
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - without).norm() / without.norm() > 0.05


def test_transition_loads_the_experts_that_its_levels_reach(profile: Profile, two_experts: Path, tmp_path: Path):
    only_low = shutil.copytree(two_experts, tmp_path / "models")
    shutil.rmtree(only_low / "stage1")
    task = task_of(profile, "stage2", only_low)
    assert isinstance(task.task, Stage2Task)
    loss, _ = task.loss(0, 0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in task.lora.parameters())
    everywhere = AdaptConfig(TrainConfig(1)).stage2
    everywhere = replace(everywhere, transition=replace(everywhere.transition, highest=1.0))
    with pytest.raises(WeightsError, match="got no stage1, want"):
        task_of(profile, "stage2", only_low, stage2=everywhere)


def test_each_stage_has_its_own_noise_levels(profile: Profile, two_experts: Path):
    plain = AdaptConfig(TrainConfig(1)).stage2
    task = task_of(profile, "stage2", two_experts, stage2=replace(plain, levels=replace(plain.levels, grid_share=1.0)))
    levels = task.task.config.levels
    assert (levels.grid_share, levels.shift) == (1.0, profile.stage2.shift)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_in_bf16_the_tower_stays_as_it_is_at_inference(stage: str, profile: Profile, one_expert: Path, tmp_path: Path):
    """Weights and autocast in bf16, as on a GPU; the loss is that of fp32 up to rounding."""
    rounded, exact = (task_of(profile, stage, one_expert, bf16=bf16) for bf16 in (True, False))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert rounded.loss(0, 0)[0].item() == pytest.approx(exact.loss(0, 0)[0].item(), rel=0.05)
    done = train(rounded, TrainConfig(2, warmup=1, curve=False, skips=0, bf16=True), tmp_path / "run")
    assert done == 2
    if stage == "stage1":
        ours, theirs = rounded.task.batch(0, 0).image_tokens, exact.task.batch(0, 0).image_tokens
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_the_tower_is_part_of_what_a_resumed_run_shares(profile: Profile, one_expert: Path):
    task = task_of(profile, "stage1", one_expert)
    assert task.settings["image_encoder"] == ClipVisionEncoder.open(one_expert / "image_encoder").fingerprint
    assert not isinstance(task.task.config.levels, ExpertLevels)
    shutil.rmtree(one_expert / "image_encoder")
    with pytest.raises(WeightsError, match="got no image_encoder, want"):
        task_of(profile, "stage1", one_expert)


def test_a_merged_lora_is_part_of_the_model(profile: Profile, one_expert: Path, tmp_path: Path):
    file = other_lora(one_expert / "stage1", tmp_path / "few-step.safetensors")
    plain = task_of(profile, "stage1", one_expert)
    merged = task_of(profile, "stage1", one_expert, merged={"stage1": [(file, 0.5)]})
    assert plain.loss(0, 0)[0] != merged.loss(0, 0)[0]
    assert plain.settings["models"] == merged.settings["models"]
    assert merged.settings["merged"]["stage1"][0][1] == 0.5
    with pytest.raises(WeightsError, match="LoRAs: got some for stage2, want only for stage1;"):
        task_of(profile, "stage1", one_expert, merged={"stage2": [(file, 1.0)]})


def test_an_expert_is_chosen_where_there_are_two_and_only_there(profile: Profile, two_experts: Path, one_expert: Path):
    with pytest.raises(WeightsError, match="pass --expert high or --expert low"):
        task_of(profile, "stage1", two_experts)
    with pytest.raises(WeightsError, match="got --expert low and one DiT"):
        task_of(profile, "stage1", one_expert, expert="low")


def test_experts_inside_one_folder_and_single_files_are_found(profile: Profile, two_experts: Path, tmp_path: Path):
    models = shutil.copytree(two_experts, tmp_path / "models")
    for name, inside in (("stage1", "high_noise_model"), ("stage1_low", "low_noise_model")):
        (models / name).rename(models / inside)
    (models / "stage1").mkdir()
    for inside in ("high_noise_model", "low_noise_model"):
        (models / inside).rename(models / "stage1" / inside)
    a, b = (task_of(profile, "stage1", folder, expert="low") for folder in (models, two_experts))
    assert a.settings["models"] == b.settings["models"]
    assert find_models(profile, models).stage1_low == models / "stage1" / "low_noise_model"


def test_photographs_smaller_than_the_clips_are_left_out(profile: Profile):
    small, large = (np.zeros((side, 2 * side, 3), np.uint8) for side in (profile.height - 1, profile.height))
    assert [photo.shape[0] for photo in large_enough([small, large], profile)] == [profile.height]
    with pytest.raises(TrainingError, match=f"want {profile.width}x{profile.height} and more for {profile.name}"):
        large_enough([small], profile)


def test_ready_embeddings_are_filled_as_at_inference(profile: Profile, two_experts: Path, tmp_path: Path):
    photos, config = [np.zeros((200, 240, 3), np.uint8)], AdaptConfig(TrainConfig(1), expert="low")
    for rows in (torch.randn(3, 16), torch.randn(1, 9, 16), torch.randn(1, 8, 15)):
        save_file({"prompt": rows}, tmp_path / "rows.safetensors")
        arguments: Any = (
            profile,
            "stage1",
            two_experts,
            photos,
            config,
            tmp_path / "rows.safetensors",
            ClipVisionEncoder.open,
        )
        if rows.shape != (3, 16):
            with pytest.raises(TrainingError, match=r"want \(1, 1 to 8, 16\)"):
                adapt_task(*arguments)
            continue
        task = adapt_task(*arguments).task
        got = task.words(task.words.tokenize(["", ""]))
        assert got.shape == (2, 8, 16)
        assert torch.equal(got[1, :3], rows)
        assert (got[:, 3:] == 0).all()


def test_a_large_model_wants_ready_embeddings(two_experts: Path):
    with pytest.raises(TrainingError, match="text of wan-2k: got no embeddings"):
        task_of(get_profile("wan-2k"), "stage1", two_experts, expert="low")


QUICK = ["--set", "steps=2", "--set", "log_every=1", "--set", "warmup=1", "--set", "curve=false", "--allow-missing"]


@pytest.mark.parametrize("stage", [["stage1", "--expert", "low"], ["stage2", "--transition", "1"]])
def test_by_command(
    stage: list[str], profile: Profile, two_experts: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(PROFILES, "tiny", lambda: replace(profile, stage1=replace(profile.stage1, boundary=None)))
    few = other_lora(two_experts / "stage1_low", tmp_path / "few@step.safetensors")
    main(
        ["lora", *stage, "--profile", "tiny", "--model-dir", str(two_experts), "-o", str(tmp_path / "out"), *QUICK,
         "--rank", "2", "--lora", f"stage1_low={few}@0.5"]
    )  # fmt: skip
    tensors = load_file(capsys.readouterr().out.strip())
    assert any((tensor != 0).any() for name, tensor in tensors.items() if "lora_up" in name)


@pytest.mark.parametrize("wrong", ["stage3=a.safetensors", "stage1", "stage1=", "stage1=a.safetensors@much"])
def test_wrong_loras_are_wrong_usage(wrong: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["lora", "stage1", "--model-dir", str(tmp_path), "-o", str(tmp_path), "--lora", wrong])
    assert stopped.value.code == 2
    assert "--lora" in capsys.readouterr().err


def test_an_expert_of_stage_two_is_refused(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        main(["lora", "stage2", "--expert", "low", "--model-dir", str(tmp_path), "-o", str(tmp_path)])
    assert "want it for stage1 alone" in capsys.readouterr().err
