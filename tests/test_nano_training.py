"""The trainings of `nano` end to end in a few small steps, by the command that people run, and what they leave."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swifti2v.engine.dit import DiT
from swifti2v.engine.presets import get_profile
from swifti2v.engine.vae import VAE
from swifti2v.engine.weights import load_dit, load_vae, save_dit, save_vae
from swifti2v.runtime.model_paths import find_models, fit_profile
from swifti2v.training import nano
from swifti2v.training.batches import Crops, Cuts
from swifti2v.training.cli import main, with_changes
from swifti2v.training.log import TrainingError, read_log
from swifti2v.training.trainer import TrainConfig

SHIPPED = Path(__file__).parents[1] / "weights" / "nano"
QUICK = ["--set", "steps=2", "--set", "log_every=1", "--set", "warmup=1", "--threads", "1", "--allow-missing"]


@pytest.fixture(scope="module")
def small_phases() -> Iterator[None]:
    """The same phases on small samples, so that a step takes a second, as do the statistics of a VAE."""
    phases, pieces = dict(nano.PHASES), nano.STATISTICS_PIECES
    nano.STATISTICS_PIECES = 8  # type: ignore[misc]
    for name, phase in phases.items():
        one = replace(phase.train, batch=1)
        samples = nano.Samples(Crops(1, 128, 64), 1, 1.0)
        if isinstance(phase, nano.VaePhase):
            nano.PHASES[name] = replace(phase, train=one, samples=samples, cuts=Cuts(1, 16, 5))
        else:
            nano.PHASES[name] = replace(phase, train=one, samples=(samples,))
    yield
    nano.PHASES.update(phases)
    nano.STATISTICS_PIECES = pieces  # type: ignore[misc]


@pytest.fixture(scope="module")
def trained(small_phases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano")
    for name in nano.PHASES:
        main(["nano", name, "-o", str(out), *QUICK])
    return out


def test_every_phase_leaves_models_that_the_engine_reads(trained: Path):
    profile = get_profile("nano")
    paths = find_models(profile, trained / "models")
    assert fit_profile(profile, paths).stage2.dit == profile.stage2.dit
    assert {path.name for path in (trained / "models").iterdir()} == {*nano.PHASES, "text"}
    for name in nano.PHASES:
        records = read_log(trained / name)
        assert [record["step"] for record in records] == [1, 2]
        assert (trained / name / "loss.png").stat().st_size > 1000


def test_the_shipped_files_are_small_and_bf16():
    """Norms and modulation are fp32, as Wan has them: a few percent."""
    files = sorted(SHIPPED.rglob("*.safetensors"))
    assert {path.parent.name for path in files} == {"stage1", "stage2", "vae1", "vae2", "text"}
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 16e6
    assert sum(sizes) < 40e6
    for path in files:
        tensors = load_file(path).values()
        narrow = sum(tensor.numel() for tensor in tensors if tensor.dtype == torch.bfloat16)
        assert narrow > 0.9 * sum(tensor.numel() for tensor in tensors), path
    assert (SHIPPED.parents[1] / "docs" / "demo.webp").stat().st_size < 2e6


def test_finished_vaes_have_latent_statistics(trained: Path):
    config = json.loads((trained / "models" / "vae1" / "config.json").read_text())
    assert any(value != 0 for value in config["latents_mean"])
    assert all(value > 0 for value in config["latents_std"])


def test_a_training_starts_from_finished_models(trained: Path, tmp_path: Path):
    """At a rate of almost nothing, what comes out is what went in, up to the rounding to bf16."""
    start = trained / "models"
    shutil.copytree(start, tmp_path / "models")
    for name in ("vae2", "stage1", "stage2"):
        main(["nano", name, "-o", str(tmp_path), "--start", str(start), *QUICK, "--set", "lr=1e-12", "--set", "muon=0"])
        load = load_vae if name == "vae2" else load_dit
        before, after = (load(folder / name, dtype=torch.float32) for folder in (start, tmp_path / "models"))
        for a, b in zip(before.parameters(), after.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-2, atol=1e-6)
    main(["nano", "vae2", "-o", str(tmp_path), *QUICK, "--set", "lr=1e-12", "--set", "muon=0"])  # done: does nothing
    shutil.copytree(start / "vae1", tmp_path / "models" / "vae2", dirs_exist_ok=True)
    with pytest.raises(SystemExit):  # on the latents of another VAE it would be another run
        main(["nano", "stage2", "-o", str(tmp_path), *QUICK, "--set", "lr=1e-12", "--set", "muon=0"])


def test_a_dit_of_fewer_channels_goes_on_with_more(trained: Path, tmp_path: Path):
    config = get_profile("nano").stage2.dit
    narrow = replace(config, in_channels=config.in_channels - 8, out_channels=config.out_channels - 4)
    save_dit(DiT(narrow), tmp_path / "start" / "stage2")
    shutil.copytree(trained / "models", tmp_path / "models")
    main(["nano", "stage2", "-o", str(tmp_path), "--start", str(tmp_path / "start"), *QUICK])
    assert load_dit(tmp_path / "models" / "stage2").config == config


def test_a_vae_with_linear_maps_is_fitted(trained: Path, tmp_path: Path, capsys):
    """What follows is trained on it as on any other, its own network too, whatever the profile says."""
    models = trained / "models"
    for name in ("vae1", "vae2"):
        main(["nano", name, "-o", str(tmp_path), *QUICK, "--linear", "--like", str(models)])
        assert load_vae(tmp_path / "models" / name).config.linear
    made = load_vae(tmp_path / "models" / "vae2")
    assert made.config.decoder_dim < load_vae(models / "vae2").config.decoder_dim
    for name in ("stage1", "text", "stage2"):
        shutil.copytree(models / name, tmp_path / "models" / name)
    again = ["nano", "vae2", "-o", str(tmp_path / "again"), "--start", str(tmp_path / "models"), *QUICK]
    main(again)
    main([*again, "--set", "steps=3"])
    after = load_vae(tmp_path / "again" / "models" / "vae2").state_dict()
    assert all(torch.equal(value, after[name]) for name, value in made.state_dict().items() if ".linear." in name)
    for wrong in (
        ["nano", "vae2", "-o", str(tmp_path), *QUICK, "--linear", "--start", str(models)],
        ["nano", "vae2", "-o", str(tmp_path), *QUICK, "--linear", "--minutes", "1"],
        ["nano", "vae1", "-o", str(tmp_path), *QUICK, "--like", str(models)],
        ["nano", "stage1", "-o", str(tmp_path), *QUICK, "--linear"],
    ):
        with pytest.raises(SystemExit):
            main(wrong)
    said = capsys.readouterr().err
    for words in (
        "vae2: got --linear and --start, want",
        "vae2: got --linear and --minutes, want",
        "vae1: got --like without --linear",
        "stage1: got --linear, want",
    ):
        assert words in said


def test_latents_of_another_size_are_refused(trained: Path, tmp_path: Path, capsys):
    shutil.copytree(trained / "models", tmp_path / "models")
    vae = load_vae(tmp_path / "models" / "vae1")
    save_vae(VAE(replace(vae.config, latent_channels=8, mean=(0.0,) * 8, std=(1.0,) * 8)), tmp_path / "models" / "vae1")
    with pytest.raises(SystemExit):
        main(["nano", "stage1", "-o", str(tmp_path), *QUICK])
    assert "vae1: got 8 latent channels, want 48" in capsys.readouterr().err


def test_a_step_of_more_or_fewer_clips():
    """Samples of another size, of which a step has fewer, follow; and a group is never more than a step."""
    samples = (
        nano.Samples(Crops(48, 192, 128), 192, 20.0, 0.8, 16),
        nano.Samples(Crops(12, 384, 256), 48, 20.0, 0.2, 4),
    )
    stage2 = nano.with_batch(nano.DitPhase(TrainConfig(1, 48), samples, nano.STAGE2), 8)
    assert isinstance(stage2, nano.DitPhase)
    assert [(item.crops.count, item.group) for item in stage2.samples] == [(8, 8), (2, 2)]
    vae = nano.VaePhase(
        TrainConfig(1, 64), nano.Samples(Crops(64, 256, 160), 128, 48.0, group=8), Cuts(64, 48, 33), True
    )
    fewer = nano.with_batch(vae, 4)
    assert isinstance(fewer, nano.VaePhase)
    assert (fewer.train.batch, fewer.samples.crops.count, fewer.cuts.count) == (4, 4, 4)


def test_an_ablation_trains_on_perfect_references(trained: Path, tmp_path: Path, capsys):
    shutil.copytree(trained / "models", tmp_path / "models")
    shutil.rmtree(tmp_path / "models" / "stage1")  # which has no hand in them
    run = ["nano", "stage2", "-o", str(tmp_path), *QUICK]
    main([*run, "--transition", "0"])
    assert (tmp_path / "models" / "stage2" / "config.json").exists()
    for wrong in (
        run,  # with transition it would be another run
        [*run, "--transition", "0", "--matching", "0"],  # the same
        [*run, "--transition", "1.5"],
        [*run, "--matching", "-1"],
        ["nano", "vae2", "-o", str(tmp_path), "--transition", "0"],
        ["nano", "vae2", "-o", str(tmp_path), "--matching", "0"],
    ):
        with pytest.raises(SystemExit):
            main(wrong)
    shutil.copytree(trained / "models" / "stage1", tmp_path / "models" / "stage1")
    with pytest.raises(SystemExit):
        main(["lora", "stage1", "--model-dir", str(tmp_path), "-o", str(tmp_path / "l"), "--transition", "0.5"])
    said = capsys.readouterr().err
    assert "--transition: got 1.5" in said
    assert "--matching: got -1" in said
    assert "vae2: got --matching" in said
    assert "vae2: got --transition" in said
    assert "lora: got --transition for stage1" in said


def test_a_training_that_runs_out_of_time_says_so_and_goes_on(small_phases, tmp_path: Path, capsys):
    arguments = ["nano", "vae1", "-o", str(tmp_path), *QUICK]
    main([*arguments, "--minutes", "0"])
    assert "1 of 2 steps" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
    main(arguments)
    assert (tmp_path / "models" / "vae1" / "config.json").exists()
    late = ["nano", "vae2", "-o", str(tmp_path), *QUICK, "--minutes", "0", "--finish", "--set", "curve=false"]
    main(late)
    assert (tmp_path / "models" / "vae2" / "config.json").exists()
    assert not (tmp_path / "vae2" / "loss.png").exists()


@pytest.mark.parametrize("change", ["stps=3", "steps=many", "bf16=yes", "steps"])
def test_wrong_settings_are_refused(change: str):
    with pytest.raises(TrainingError, match="--set"):
        with_changes(TrainConfig(steps=1), [change])


def test_settings_have_their_types():
    config = with_changes(TrainConfig(steps=1), ["steps=7", "lr=1e-2", "bf16=true", "betas=[0.8, 0.9]", "minutes=2"])
    assert (config.steps, config.lr, config.bf16, config.betas, config.minutes) == (7, 1e-2, True, (0.8, 0.9), 2)


def test_the_cost_of_a_step_at_real_size(capsys):
    main(["lora", "stage2", "--profile", "nano", "--rank", "4", "--dry-run"])
    out = capsys.readouterr().out
    assert "LoRA rank 4" in out
    assert "TFLOP" in out


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_lora_by_command_merges_into_the_model(stage: str, save_models, tmp_path: Path, capsys):
    models = save_models(get_profile("tiny"), tmp_path / "models")
    arguments = ["lora", stage, "--profile", "tiny", "--model-dir", str(models), "-o", str(tmp_path / "out")]
    main([*arguments, "--rank", "2", "--alpha", "4", *QUICK, "--set", "lr=0.05"])
    file = Path(capsys.readouterr().out.strip())
    assert file.name == "lora.safetensors"
    base, merged = load_dit(models / stage), load_dit(models / stage, loras=[(file, 1.0)])
    moved = [n for n, p in base.named_parameters() if not torch.equal(p, merged.get_parameter(n))]
    assert moved
    assert all("attn" in name or "ffn" in name for name in moved)


def test_a_lora_learns_from_ready_embeddings_and_without_stage_one(save_models, tmp_path: Path):
    models = save_models(get_profile("tiny"), tmp_path / "models")
    shutil.rmtree(models / "stage1")
    shutil.rmtree(models / "text")
    save_file({"prompt": torch.randn(1, 8, 16)}, tmp_path / "rows.safetensors")
    rows = ["--embeddings", str(tmp_path / "rows.safetensors"), "--transition", "0"]
    arguments = ["lora", "stage2", "--profile", "tiny", "--model-dir", str(models), "-o", str(tmp_path / "out"), *rows]
    main([*arguments, "--rank", "2", *QUICK])
    assert (tmp_path / "out" / "lora.safetensors").exists()


def test_training_needs_neither_pyav_nor_click():
    absent = "import sys; sys.modules.update({name: None for name in ('av', 'click', 'rich', 'skimage', 'matplotlib')})"
    subprocess.run([sys.executable, "-c", f"{absent}; import swifti2v.training.cli"], check=True)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--finish"], "stage1: got --finish without --minutes"),
        (["--packed", "photos.safetensors", "--photos-dir", "photos"], "got --packed and --photos-dir, want one"),
        (["--threads", "0"], "argument --threads"),
    ],
)
def test_options_that_would_go_unused_are_refused(wrong: list[str], words: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        main(["nano", "stage1", "-o", str(tmp_path), *wrong])
    assert words in capsys.readouterr().err


def test_errors_are_one_line(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["nano", "stage1", "-o", str(tmp_path), *QUICK])
    assert stopped.value.code == 1
    assert "vae1" in capsys.readouterr().err
