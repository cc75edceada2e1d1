"""From a model folder to a clip: every path resolved, every mismatch refused, the pixels those of the modules."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from swifti2v import ModelPaths, Profile, Request, Session, find_models, load_models
from swifti2v.engine.dit import DiT
from swifti2v.engine.errors import ProfileError, WeightsError
from swifti2v.engine.presets import get_profile
from swifti2v.engine.weights import FILE_NAME, save_dit
from swifti2v.runtime.conditioning import Embeddings, save_embeddings
from swifti2v.runtime.fingerprints import fingerprints, known_fingerprint
from swifti2v.runtime.inspection import describe_checkpoint
from swifti2v.runtime.model_paths import fit_profile

FP32 = torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_models) -> Path:
    return save_models(get_profile("tiny"), tmp_path_factory.mktemp("models"))


def open_folder(profile: Profile, folder: Path, **single) -> Session:
    return Session.open(load_models(profile, find_models(profile, folder, ModelPaths(**single)), dtype=FP32))


def first_chunk(session: Session, **request) -> np.ndarray:
    profile = session.profile
    image = np.random.default_rng(0).integers(0, 256, (profile.height, profile.width, 3), np.uint8)
    with session:
        return next(session.generate(Request(image, "zoom", **request))).frames


def test_a_saved_folder_makes_the_clip_of_its_modules(tiny: Profile, folder: Path, make_modules):
    loaded = load_models(tiny, find_models(tiny, folder, ModelPaths()), dtype=FP32)
    assert loaded.trained
    assert loaded.profile == tiny
    direct = replace(loaded, modules=make_modules(tiny))
    assert np.array_equal(first_chunk(Session.open(loaded)), first_chunk(Session.open(direct)))


def test_the_profile_takes_the_checkpoints_sizes(tiny: Profile, tmp_path: Path, save_models):
    wider = replace(tiny.stage1.dit, dim=48, heads=4)
    profile = replace(tiny, stage1=replace(tiny.stage1, dit=wider))
    loaded = load_models(tiny, find_models(tiny, save_models(profile, tmp_path), ModelPaths()), dtype=FP32)
    assert loaded.profile.stage1.dit == wider


def test_a_single_path_overrides_its_entry(tiny: Profile, folder: Path, tmp_path: Path, save_models):
    shutil.copytree(folder / "stage1", tmp_path / "other")
    paths = find_models(tiny, folder, ModelPaths(stage1=tmp_path / "other"))
    assert paths.stage1 == tmp_path / "other"
    assert paths.stage2 == folder / "stage2"


@pytest.mark.parametrize("names", [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")])
def test_a_folder_of_two_experts_is_both(tiny: Profile, folder: Path, tmp_path: Path, names: tuple[str, str]):
    for name in names:
        shutil.copytree(folder / "stage1", tmp_path / "pair" / name)
    loaded = load_models(tiny, find_models(tiny, folder, ModelPaths(stage1=tmp_path / "pair")), dtype=FP32)
    assert loaded.profile.stage1.boundary == 0.9
    assert {"stage1_high", "stage1_low"} <= loaded.modules.keys()
    assert first_chunk(Session.open(loaded)).shape == (13, 128, 192, 3)


def test_a_plain_second_stage_starts_from_the_reference(tiny: Profile, tmp_path: Path, save_models):
    plain = replace(tiny.stage2, dit=replace(tiny.stage2.dit, in_channels=6))
    start = replace(tiny, stage2_init="reference", strength=0.6)
    models = save_models(replace(start, stage2=plain), tmp_path)
    assert first_chunk(open_folder(start, models)).shape == (13, 128, 192, 3)
    with pytest.raises(ProfileError, match="--stage2-init reference"):
        open_folder(tiny, models)


def test_a_lora_changes_its_stage(tiny: Profile, folder: Path, tmp_path: Path):
    delta = torch.ones(24, 2), torch.ones(2, 24)
    name = "diffusion_model.blocks.0.self_attn.v"
    save_file({f"{name}.lora_up.weight": delta[0], f"{name}.lora_down.weight": delta[1]}, tmp_path / "l.safetensors")
    base = first_chunk(open_folder(tiny, folder))
    with_lora = first_chunk(open_folder(tiny, folder, loras={"stage2": ((tmp_path / "l.safetensors", 0.5),)}))
    without = first_chunk(open_folder(tiny, folder, loras={"stage2": ((tmp_path / "l.safetensors", 0.0),)}))
    assert np.array_equal(base, without)
    assert not np.array_equal(base, with_lora)


def test_embeddings_from_a_file(tiny: Profile, folder: Path, tmp_path: Path):
    paths = find_models(tiny, folder, ModelPaths())
    words = load_models(tiny, paths, dtype=FP32)
    save_embeddings(tmp_path / "e.safetensors", Embeddings(words.prompts.encode_all(["zoom"])[0]))
    paths = replace(paths, embeddings=tmp_path / "e.safetensors")
    given = load_models(tiny, paths, dtype=FP32)
    assert np.array_equal(first_chunk(Session.open(words)), first_chunk(Session.open(given)))
    guided = load_models(tiny.override(stage1_guidance=2.0), paths, dtype=FP32)
    with pytest.raises(WeightsError, match="no tensor `negative`"):
        first_chunk(Session.open(guided))


def test_a_stage_one_that_reads_clip_needs_its_encoder(tiny: Profile, tmp_path: Path, save_models):
    image = replace(tiny, stage1=replace(tiny.stage1, dit=replace(tiny.stage1.dit, image_dim=12, image_tokens=5)))
    with pytest.raises(WeightsError, match="pass --image-encoder"):
        open_folder(tiny, save_models(image, tmp_path))


def test_what_is_missing_is_named(tiny: Profile, folder: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match="got no stage1, vae1, vae2"):
        find_models(tiny, None, ModelPaths(stage2=folder / "stage2"))
    with pytest.raises(WeightsError, match="want a folder"):
        find_models(tiny, tmp_path / "none", ModelPaths())
    with pytest.raises(WeightsError, match=r"stage1: got .*none"):
        find_models(tiny, folder, ModelPaths(stage1=tmp_path / "none"))
    wan = get_profile("wan-2k")
    with pytest.raises(WeightsError, match="pass --model-dir"):
        load_models(wan)
    shutil.copytree(folder, tmp_path / "mute")
    shutil.rmtree(tmp_path / "mute" / "text")
    with pytest.raises(WeightsError, match="pass --text or --embeddings"):
        open_folder(tiny, tmp_path / "mute")


def test_swapped_models_are_refused(tiny: Profile, folder: Path):
    with pytest.raises(WeightsError, match="want those of a Wan DiT"):
        open_folder(tiny, folder, stage1=folder / "vae1")
    with pytest.raises(ProfileError, match="channels"):
        open_folder(tiny, folder, stage2=folder / "stage1")


def test_loras_are_used_or_refused(tiny: Profile, folder: Path, tmp_path: Path):
    save_file({"diffusion_model.head.head.diff": torch.ones(16, 24)}, tmp_path / "l.safetensors")
    lora = ((tmp_path / "l.safetensors", 1.0),)
    with pytest.raises(WeightsError, match="want only none, with untrained weights"):
        find_models(tiny, None, ModelPaths(loras={"stage2": lora}))
    with pytest.raises(WeightsError, match="some for stage1_low, want only stage1, stage2"):
        find_models(tiny, folder, ModelPaths(loras={"stage1_low": lora}))
    with pytest.raises(WeightsError, match="some for stage3"):
        find_models(tiny, folder, ModelPaths(loras={"stage3": lora}))
    with pytest.raises(WeightsError, match=r"stage2 LoRA: got .*none"):
        find_models(tiny, folder, ModelPaths(loras={"stage2": ((tmp_path / "none", 1.0),)}))
    pair = ModelPaths(stage1_low=folder / "stage1", loras={"stage1": lora})
    with pytest.raises(WeightsError, match="one expert of two"):
        find_models(tiny, folder, pair)
    find_models(tiny, folder, replace(pair, loras={"stage1": lora, "stage1_low": ((lora[0][0], 0.0),)}))


def test_everything_is_refused_before_any_weight_is_read(tiny: Profile, folder: Path, tmp_path: Path):
    """fit_profile alone raises what would fail later; it reads headers, so a file cut after its header still passes."""
    cut = tmp_path / "stage1"
    shutil.copytree(folder / "stage1", cut)
    paths = find_models(tiny, folder, ModelPaths(stage1=cut))
    assert fit_profile(tiny, paths) == tiny
    plain = replace(tiny.stage2.dit, in_channels=6)
    torch.manual_seed(0)
    save_dit(DiT(plain), tmp_path / "plain")
    with pytest.raises(ProfileError, match="--stage2-init reference"):
        fit_profile(tiny, find_models(tiny, folder, ModelPaths(stage2=tmp_path / "plain")))
    with pytest.raises(WeightsError, match="unlike stage1's"):
        fit_profile(tiny, find_models(tiny, folder, ModelPaths(stage1_low=folder / "stage2")))


def test_untrained_models_are_the_same_every_time_and_leave_the_generator_alone(tiny: Profile):
    torch.manual_seed(1)
    expected = torch.randn(1)
    torch.manual_seed(1)
    one, other = load_models(tiny, dtype=FP32), load_models(tiny, dtype=FP32)
    assert torch.equal(torch.randn(1), expected)
    assert not one.trained
    for name, module in one.modules.items():
        pairs = zip(module.parameters(), other.modules[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_fingerprints_are_remembered_until_a_file_changes(folder: Path, tmp_path: Path):
    model, cache = tmp_path / "vae2", tmp_path / "cache"
    shutil.copytree(folder / "vae2", model)
    first = known_fingerprint(model, cache)
    (entry,) = (cache / "fingerprints").iterdir()
    entry.write_text("0" * 64)
    assert known_fingerprint(model, cache) == "0" * 64, "it is read, not computed again"
    shutil.copytree(folder / "vae1", model, dirs_exist_ok=True)
    assert known_fingerprint(model, cache) not in (first, "0" * 64)
    index = model / f"{FILE_NAME}.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(model / FILE_NAME), FILE_NAME)}))
    by_index = known_fingerprint(index, cache)
    state = load_file(model / FILE_NAME)
    save_file({name: value + 1 for name, value in state.items()}, model / FILE_NAME)
    assert known_fingerprint(index, cache) != by_index, "a shard of the same names and size"


def test_inspection_tells_kinds_apart(folder: Path, tmp_path: Path):
    dit, vae = describe_checkpoint(folder / "stage2"), describe_checkpoint(folder / "vae2")
    assert (dit["kind"], dit["layout"], dit["in_channels"], dit["layers"]) == ("DiT", "original", 12, 2)
    assert (vae["kind"], vae["layout"], vae["latent_channels"], vae["residual"]) == ("VAE", "diffusers", 6, True)
    state = load_file(folder / "stage2" / FILE_NAME)
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, tmp_path / "c.safetensors")
    shutil.copy(folder / "stage2" / "config.json", tmp_path)
    comfy = describe_checkpoint(tmp_path / "c.safetensors")
    assert (comfy["kind"], comfy["layout"]) == ("DiT", "ComfyUI"), "`.diff` stands in diffusion_model, too"
    assert describe_checkpoint(folder / "text")["kind"] == "unknown"
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(1)}, tmp_path / "l.safetensors")
    assert describe_checkpoint(tmp_path / "l.safetensors")["kind"] == "LoRA"


def test_a_run_has_a_fingerprint_for_every_model(tiny: Profile, folder: Path, tmp_path: Path):
    save_file({"diffusion_model.head.head.diff": torch.ones(24, 24)}, tmp_path / "l.safetensors")
    paths = find_models(tiny, folder, ModelPaths(loras={"stage2": ((tmp_path / "l.safetensors", 0.5),)}))
    found = fingerprints(paths, load_models(tiny, paths, dtype=FP32), tmp_path / "cache")
    assert found.keys() == {"stage1", "stage2", "vae1", "vae2", "text", "stage2 + 1. 0.5 * l.safetensors"}
    assert len(set(found.values())) == 6
    (tmp_path / "b").mkdir()
    save_file({"diffusion_model.head.head.diff": torch.zeros(24, 24)}, tmp_path / "b" / "l.safetensors")
    both = {"stage2": ((tmp_path / "l.safetensors", 0.5), (tmp_path / "b" / "l.safetensors", 0.5))}
    paths = find_models(tiny, folder, ModelPaths(loras=both))
    again = fingerprints(paths, load_models(tiny, paths, dtype=FP32), tmp_path / "cache")
    assert len(set(again.values())) == 7, "of the same name, and both are there"
    untrained = load_models(tiny, dtype=FP32)
    assert fingerprints(find_models(tiny), untrained, tmp_path) == {"all": "untrained-0"}
