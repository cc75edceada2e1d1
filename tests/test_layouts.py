"""The layouts of public checkpoints, and the refusal of everything that does not fit one."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file
from support import TINY, original_dit, refused, same, write
from torch import Tensor

from swifti2v.engine.dit import DiT
from swifti2v.engine.layouts import dit_name_from_diffusers
from swifti2v.engine.presets import WAN21_MEAN, WAN21_STD, WAN22_MEAN, WAN22_STD
from swifti2v.engine.profile import DiTConfig, VAEConfig
from swifti2v.engine.vae import VAE
from swifti2v.engine.weights import FILE_NAME, convert, load_dit, load_vae, save_dit, save_vae

IMAGE = replace(TINY, in_channels=14, image_dim=20, image_tokens=5)
STATISTICS = ((0.1, 0.2, -0.3, 0.4), (0.5, 1.5, 2.5, 0.25))
VAE21 = VAEConfig(4, encoder_dim=4, decoder_dim=4, mean=STATISTICS[0], std=STATISTICS[1])
VAE22 = replace(VAE21, decoder_dim=6, patch=2, residual=True)
CONFIG = {"num_heads": 2, "text_len": 8}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def original_vae(diffusers: Mapping[str, Tensor], nested: bool) -> dict[str, Tensor]:
    """diffusers' VAE tensors under the names of the original, written down apart from the package."""

    def rename(name: str) -> str:
        swaps = [
            (r"^quant_conv", "conv1"),
            (r"^post_quant_conv", "conv2"),
            (r"coder\.conv_in", "coder.conv1"),
            (r"coder\.norm_out", "coder.head.0"),
            (r"coder\.conv_out", "coder.head.2"),
            (r"mid_block\.resnets\.0", "middle.0"),
            (r"mid_block\.attentions\.0", "middle.1"),
            (r"mid_block\.resnets\.1", "middle.2"),
            (r"\.norm1\.", ".residual.0."),
            (r"(?<=\d)\.conv1\.", ".residual.2."),
            (r"\.norm2\.", ".residual.3."),
            (r"(?<=\d)\.conv2\.", ".residual.6."),
            ("conv_shortcut", "shortcut"),
        ]
        if nested:
            swaps += [
                (r"down_blocks\.(\d)\.resnets\.(\d)", r"downsamples.\1.downsamples.\2"),
                (r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.2"),
                (r"up_blocks\.(\d)\.resnets\.(\d)", r"upsamples.\1.upsamples.\2"),
                (r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.3"),
            ]
        else:
            swaps += [
                (r"down_blocks\.(\d+)", r"downsamples.\1"),
                (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
                (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
            ]
        for pattern, replacement in swaps:
            name = re.sub(pattern, replacement, name)
        return name

    return {rename(name): tensor for name, tensor in diffusers.items()}


def diffusers_dit(config: DiTConfig) -> Any:
    return WanTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        image_dim=config.image_dim or None,
        added_kv_proj_dim=config.dim if config.image_dim else None,
    ).eval()


# Layouts


@pytest.mark.parametrize("config", [TINY, IMAGE], ids=["text", "image"])
@pytest.mark.parametrize("prefix", ["", "model.", "diffusion_model.", "model.diffusion_model."])
def test_original_and_comfyui_dits(tmp_path: Path, config: DiTConfig, prefix: str):
    model = DiT(config)
    state = {prefix + name: tensor for name, tensor in original_dit(model, tmp_path).items()}
    loaded = load_dit(write(tmp_path / "a.safetensors", state, CONFIG | {"image_tokens": config.image_tokens}))
    assert loaded.config == config
    assert not loaded.training
    same(loaded, model)


@pytest.mark.parametrize("config", [TINY, IMAGE], ids=["text", "image"])
def test_original_ours_diffusers_and_back(tmp_path: Path, config: DiTConfig):
    """Our file, through diffusers' own converter, is diffusers' model; what that saves is our model again."""
    model = DiT(config)
    theirs = diffusers_dit(config)
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(original_dit(model, tmp_path)), strict=True)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_dit(tmp_path / "theirs")
    same(back, model)
    assert replace(back.config, text_len=8, image_tokens=config.image_tokens) == config, "diffusers does not say these"


def test_names_of_diffusers(tmp_path: Path):
    original = original_dit(DiT(IMAGE), tmp_path)
    theirs = convert_wan_transformer_to_diffusers(dict(original))
    assert {dit_name_from_diffusers(name) for name in theirs} == set(original)
    assert dit_name_from_diffusers("blocks.0.self_attn.q.weight") is None
    assert dit_name_from_diffusers("blocks.0.attn3.to_q.weight") is None


@pytest.mark.parametrize("config", [VAE21, VAE22], ids=["wan21", "wan22"])
@pytest.mark.parametrize("prefix", ["", "model.", "vae.", "first_stage_model."])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_vaes_of_every_layout(tmp_path: Path, config: VAEConfig, prefix: str, layout: str):
    model = VAE(config)
    state = load_file(save_vae(model, tmp_path / "vae"))
    if layout == "original":
        diffusers, state = state, original_vae(state, config.residual)
        assert not state.keys() & diffusers.keys() - {n for n in diffusers if "time_conv" in n}
        if not config.residual:
            again = convert_wan_vae_to_diffusers(dict(state))
            assert again.keys() == diffusers.keys()
            assert all(torch.equal(again[name], diffusers[name]) for name in again)
    state = {prefix + name: tensor for name, tensor in state.items()}
    statistics = {"latents_mean": list(config.mean), "latents_std": list(config.std)}
    loaded = load_vae(write(tmp_path / "b" / "vae.safetensors", state, statistics))
    assert loaded.config == config
    assert not loaded.training
    same(loaded, model)


@pytest.mark.parametrize("config", [VAE21, VAE22], ids=["wan21", "wan22"])
@torch.no_grad()
def test_diffusers_reads_the_vae_we_save(tmp_path: Path, config: VAEConfig):
    model = VAE(config).eval()
    save_vae(model, tmp_path)
    theirs: Any = AutoencoderKLWan.from_pretrained(tmp_path)
    latents = torch.randn(1, 4, 2, 2, 3)
    want = theirs.decode(latents * model.std + model.mean).sample
    torch.testing.assert_close(model.decode(latents), want, rtol=1e-5, atol=1e-5)


def test_other_depths_of_a_vae_are_inferred(tmp_path: Path):
    config = replace(VAE21, mult=(1, 3, 2), res_blocks=1, temporal=(True, False), encoder_dim=6, decoder_dim=8)
    save_vae(VAE(config), tmp_path)
    assert load_vae(tmp_path).config == config


@pytest.mark.parametrize(
    ("channels", "mean", "std"), [(16, WAN21_MEAN, WAN21_STD), (48, WAN22_MEAN, WAN22_STD)], ids=["wan21", "wan22"]
)
def test_statistics_of_the_public_vaes_are_known(tmp_path: Path, channels: int, mean: tuple, std: tuple):
    file = save_vae(VAE(replace(VAE21, latent_channels=channels, mean=mean, std=std)), tmp_path)
    (tmp_path / "config.json").unlink()
    assert (load_vae(file).config.mean, load_vae(file).config.std) == (mean, std)


def test_a_dit_without_config_has_wan_s_heads(tmp_path: Path):
    config = replace(TINY, dim=256, text_len=512)
    file = save_dit(DiT(config), tmp_path)
    (tmp_path / "config.json").unlink()
    assert load_dit(file).config == config


def test_a_config_of_another_model_is_not_this_one_s(tmp_path: Path):
    """The original Wan folders hold the DiT's config.json, the DiT and the VAE."""
    config = replace(VAE21, latent_channels=16, mean=WAN21_MEAN, std=WAN21_STD)
    vae = load_file(save_vae(VAE(config), tmp_path / "vae"))
    save_dit(DiT(TINY), tmp_path)
    assert load_vae(write(tmp_path / "Wan2.1_VAE.safetensors", vae)).config == config
    assert load_dit(tmp_path / FILE_NAME).config == TINY
    assert load_dit(tmp_path).config == TINY, "the folder is the DiT's"
    refused(tmp_path, "Wan VAE", load=load_vae)


def test_harmless_extras_are_dropped(tmp_path: Path):
    model = DiT(TINY)
    original = original_dit(model, tmp_path)
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    same(
        load_dit(write(tmp_path / "a.safetensors", original | {"freqs": torch.ones(2).to(torch.cfloat)}, config)), model
    )
    theirs = convert_wan_transformer_to_diffusers(dict(original)) | {
        "blocks.1.attn2.norm_added_q.weight": torch.ones(24)
    }
    same(load_dit(write(tmp_path / "b.safetensors", theirs)), model)


def test_a_converted_vae_loads(tmp_path: Path):
    config = replace(VAE22, latent_channels=48, mean=WAN22_MEAN, std=WAN22_STD)
    model = VAE(config)
    state = original_vae(load_file(save_vae(model, tmp_path / "vae")), nested=True)
    torch.save(state, tmp_path / "Wan2.2_VAE.pth")
    out = tmp_path / "new" / "vae.safetensors"
    convert(tmp_path / "Wan2.2_VAE.pth", out)
    same(load_vae(out), model)


# What does not fit


def test_a_file_of_another_model(tmp_path: Path):
    dit, vae = save_dit(DiT(TINY), tmp_path / "dit"), save_vae(VAE(VAE21), tmp_path / "vae")
    refused(vae, "want those of a Wan DiT", "'patch_embedding.weight'")
    refused(dit, "want those of a Wan VAE", load=load_vae)
    refused(write(tmp_path / "a.safetensors", {}), "0 tensors")


def test_unknown_tensors(tmp_path: Path):
    extra = {f"blocks.0.face_adapter.{i}": torch.ones(1) for i in range(7)}
    original = original_dit(DiT(TINY), tmp_path)
    text = refused(
        write(tmp_path / "a.safetensors", original | extra, CONFIG), "7 of them", "'blocks.0.face_adapter.0'"
    )
    assert text.count("face_adapter") == 5
    theirs = convert_wan_transformer_to_diffusers(dict(original))
    refused(write(tmp_path / "b.safetensors", theirs | extra, CONFIG), "7 of them", "'blocks.0.face_adapter.0'")
    mixed = theirs | {"blocks.0.self_attn.q.weight": torch.ones(24, 24)}
    refused(write(tmp_path / "c.safetensors", mixed, CONFIG), "unknown", "'blocks.0.self_attn.q.weight'")
    vae = load_file(save_vae(VAE(VAE21), tmp_path / "vae"))
    refused(write(tmp_path / "vae" / FILE_NAME, vae | extra), "7 of them", "'blocks.0.face_adapter.0'", load=load_vae)


def test_tensors_twice(tmp_path: Path):
    state = original_dit(DiT(TINY), tmp_path)
    twice = state | {f"model.{name}": tensor.clone() for name, tensor in state.items()}
    refused(write(tmp_path / "a.safetensors", twice, CONFIG), "with and without a prefix", "'model.blocks.0.")


@pytest.mark.parametrize(
    "name", ["head.head.weight", "blocks.1.norm3.bias", "blocks.0.ffn.0.weight", "patch_embedding.bias"]
)
def test_missing_tensors_of_a_dit(tmp_path: Path, name: str):
    state = original_dit(DiT(TINY), tmp_path)
    del state[name]
    refused(write(tmp_path / "a.safetensors", state, CONFIG), f"'{name}'", "incomplete")


def test_a_missing_block_of_a_dit(tmp_path: Path):
    model = DiT(replace(TINY, layers=3))
    state = {n: t for n, t in original_dit(model, tmp_path).items() if not n.startswith("blocks.1.")}
    refused(write(tmp_path / "a.safetensors", state, CONFIG), "'blocks.1'", "incomplete")


@pytest.mark.parametrize(
    "name",
    [
        "encoder.down_blocks.0.conv1.weight",
        "encoder.down_blocks.0.conv2.bias",
        "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.down_blocks.5.time_conv.bias",
        "decoder.up_blocks.0.upsamplers.0.time_conv.weight",
        "quant_conv.weight",
    ],
)
def test_missing_tensors_of_a_vae(tmp_path: Path, name: str):
    file = save_vae(VAE(VAE21), tmp_path)
    state = load_file(file)
    del state[name]
    leaf = name.removeprefix("encoder.").removeprefix("decoder.").split(".")[-1]
    refused(write(file, state), "got", leaf, "incomplete", load=load_vae)


def test_tensors_of_another_shape(tmp_path: Path):
    state = original_dit(DiT(TINY), tmp_path)
    state["blocks.1.ffn.2.weight"] = torch.ones(24, 41)
    refused(write(tmp_path / "a.safetensors", state, CONFIG), "'blocks.1.ffn.2.weight [24, 41] for [24, 40]'")
    state["patch_embedding.weight"] = torch.ones(24, 6, 1, 4, 4)
    refused(write(tmp_path / "b.safetensors", state, CONFIG), "patch_embedding.weight [24, 6, 1, 4, 4]", "2 of them")
    state["patch_embedding.weight"] = torch.ones(24)
    refused(write(tmp_path / "c.safetensors", state, CONFIG), "patch_embedding.weight", "more axes")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64], ids=str)
def test_quantised_tensors(tmp_path: Path, dtype: torch.dtype):
    state = original_dit(DiT(TINY), tmp_path)
    state["blocks.0.self_attn.q.weight"] = state["blocks.0.self_attn.q.weight"].to(dtype)
    state["blocks.0.self_attn.q.scale_weight"] = torch.ones(1)
    refused(write(tmp_path / "a.safetensors", state, CONFIG), "quantised", "blocks.0.self_attn.q.weight", "1 of them")


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 32},
        {"num_layers": 3},
        {"in_dim": 12},
        {"in_channels": 12},
        {"ffn_dim": 48},
        {"attention_head_dim": 8},
        {"num_heads": 3, "attention_head_dim": 12},
        {"num_heads": 5},
        {"num_heads": 24},
        {"num_heads": "2"},
        {"text_len": 0},
        {"eps": "small"},
        {"patch_size": [1, 4, 4]},
        {"window_size": [5, 5]},
    ],
    ids=str,
)
def test_a_config_that_contradicts_a_dit(tmp_path: Path, change: dict[str, Any]):
    save_dit(DiT(TINY), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path, "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"base_dim": 8},
        {"z_dim": 16},
        {"dim_mult": [1, 2, 4]},
        {"num_res_blocks": 3},
        {"is_residual": True},
        {"patch_size": 2},
        {"temperal_downsample": [True, True, True]},
        {"attn_scales": [1.0]},
        {"latents_mean": [0.0]},
        {"latents_mean": None},
        {"latents_std": [1.0, 1.0, 0.0, 1.0]},
        {"latents_std": "1"},
        {"latents_mean": [float("nan")] * 4},
    ],
    ids=str,
)
def test_a_config_that_contradicts_a_vae(tmp_path: Path, change: dict[str, Any]):
    save_vae(VAE(VAE21), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path, "config.json", load=load_vae)


def test_a_config_that_is_no_object(tmp_path: Path):
    save_dit(DiT(TINY), tmp_path)
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json", "list")


def test_what_only_a_config_can_say(tmp_path: Path):
    dit, vae = save_dit(DiT(TINY), tmp_path / "dit"), save_vae(VAE(VAE21), tmp_path / "vae")
    (tmp_path / "dit" / "config.json").unlink()
    (tmp_path / "vae" / "config.json").unlink()
    refused(dit, "width 24", "multiple of 128", "num_heads")
    refused(vae, "latent statistics", "4 latent channels", "latents_mean", load=load_vae)
