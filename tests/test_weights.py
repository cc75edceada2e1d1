"""Checkpoints on disk: loading and its options, saving, files and folders, fingerprints, pickles."""

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import TINY, original_dit, refused, same, write

import swifti2v
from swifti2v.engine.dit import DiT
from swifti2v.engine.presets import get_profile
from swifti2v.engine.rope import half_split_order
from swifti2v.engine.text import WordEncoder
from swifti2v.engine.vae import VAE
from swifti2v.engine.weights import (
    FILE_NAME,
    convert,
    fingerprint,
    load_dit,
    load_vae,
    load_words,
    read_state,
    save_dit,
    save_vae,
    save_words,
)

CONFIG = {"num_heads": 2, "text_len": 8}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# What load_dit can change


@torch.no_grad()
def test_rows_are_permuted_on_load_and_put_back_on_save(tmp_path: Path):
    state = original_dit(DiT(TINY), tmp_path)
    loaded = load_dit(tmp_path / "original")
    order = half_split_order(24, 2)
    for part in ("q.weight", "k.weight", "q.bias", "k.bias", "norm_q.weight", "norm_k.weight"):
        name = f"blocks.1.self_attn.{part}"
        assert torch.equal(loaded.state_dict()[name], state[name][order])
    assert torch.equal(loaded.state_dict()["blocks.1.self_attn.v.weight"], state["blocks.1.self_attn.v.weight"])
    assert torch.equal(loaded.state_dict()["blocks.1.cross_attn.q.weight"], state["blocks.1.cross_attn.q.weight"])
    again = load_file(save_dit(loaded, tmp_path / "again"))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@given(heads=st.integers(1, 6), pairs=st.integers(1, 12))
def test_half_split_order_is_a_permutation_inside_each_head(heads: int, pairs: int):
    dim = heads * pairs * 2
    order = half_split_order(dim, heads)
    assert torch.equal(order.sort().values, torch.arange(dim))
    assert torch.equal(order // (2 * pairs), torch.arange(dim) // (2 * pairs))


@torch.no_grad()
def test_reference_channels_start_at_zero(tmp_path: Path):
    save_dit(DiT(TINY), tmp_path)
    base, wide = load_dit(tmp_path), load_dit(tmp_path, in_channels=12)
    assert wide.config == replace(TINY, in_channels=12)
    assert torch.equal(wide.patch_embedding.weight[:, :6], base.patch_embedding.weight)
    assert not wide.patch_embedding.weight[:, 6:].any()
    latents, text = torch.randn(1, 6, 2, 6, 8), torch.randn(1, 8, 16)
    t = torch.tensor([[0.0, 900.0]])
    both = torch.cat((latents, torch.randn_like(latents)), dim=1)
    torch.testing.assert_close(wide.denoise(both, t, text), base.denoise(latents, t, text), rtol=1e-6, atol=1e-6)
    assert load_dit(tmp_path, in_channels=6).config == TINY
    refused(tmp_path, "6 input channels", "4", in_channels=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(tmp_path: Path, dtype: torch.dtype):
    model = DiT(TINY)
    save_dit(model, tmp_path)
    loaded = load_dit(tmp_path, dtype=dtype)
    kept = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert all(p.dtype == (torch.float32 if name in kept else dtype) for name, p in loaded.named_parameters())
    if dtype != torch.float32:
        assert {name.rpartition("blocks.0.")[2] for name in kept if "blocks.1." not in name} == {
            "modulation", "norm3.weight", "norm3.bias", "self_attn.norm_q.weight", "self_attn.norm_k.weight",
            "cross_attn.norm_q.weight", "cross_attn.norm_k.weight", "head.modulation", "time_embedding.0.weight",
            "time_embedding.0.bias", "time_embedding.2.weight", "time_embedding.2.bias", "time_projection.1.weight",
            "time_projection.1.bias",
        } | {name for name in kept if "norm_k_img" in name}  # fmt: skip
    state, wide = dict(loaded.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(state[name], wide[name].to(state[name].dtype)) for name in wide)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for load in (load_dit, load_vae):
        refused(tmp_path, "torch.float8_e4m3fn", "bfloat16", load=load, dtype=torch.float8_e4m3fn)


def test_loading_leaves_the_file_as_it_is(tmp_path: Path):
    file = save_dit(DiT(TINY), tmp_path)
    before = file.read_bytes()
    model = load_dit(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before
    save_dit(model, tmp_path)  # over the file that the model is mapped from
    same(load_dit(tmp_path), model)


def test_loras_are_merged_in_the_original_names_and_row_order(tmp_path: Path):
    model = DiT(TINY)
    state = original_dit(model, tmp_path)
    name = "blocks.0.self_attn.q"
    up, down = torch.randn(24, 2), torch.randn(2, 24)
    lora = write(
        tmp_path / "lora.safetensors",
        {f"diffusion_model.{name}.lora_up.weight": up, f"diffusion_model.{name}.lora_down.weight": down},
    )
    merged = load_dit(tmp_path / "original", loras=[(lora, 0.5), (lora, 0.25)], dtype=torch.bfloat16)
    state[f"{name}.weight"] = state[f"{name}.weight"] + 0.75 * up @ down
    write(tmp_path / "merged" / "a.safetensors", state, CONFIG)
    want = load_dit(tmp_path / "merged")
    for key, tensor in want.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key].float(), tensor, rtol=1e-2, atol=1e-3, msg=key)
    assert not torch.equal(merged.state_dict()[f"{name}.weight"], model.state_dict()[f"{name}.weight"].bfloat16())
    same(load_dit(tmp_path / "original"), model)


@pytest.mark.parametrize("name", ["tiny", "nano"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_profile_s_models_come_back_equal(tmp_path: Path, name: str, dtype: torch.dtype):
    profile = get_profile(name)
    for number, stage in enumerate((profile.stage1, profile.stage2)):
        dit, vae = DiT(stage.dit).to(dtype), VAE(stage.vae)
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(dtype)
        save_dit(dit, tmp_path / f"dit{number}")
        save_vae(vae, tmp_path / f"vae{number}")
        dit_again, vae_again = load_dit(tmp_path / f"dit{number}"), load_vae(tmp_path / f"vae{number}")
        assert (dit_again.config, vae_again.config) == (stage.dit, stage.vae)
        same(dit_again, dit)
        same(vae_again, vae)
        assert torch.equal(vae_again.mean, vae.mean)
        assert torch.equal(vae_again.std, vae.std)
    assert not list(tmp_path.rglob("*.part"))


def test_words_come_back_equal(tmp_path: Path):
    model = WordEncoder(16, 6, 5)
    file = save_words(model, tmp_path)
    same(load_words(tmp_path), model)
    state = load_file(file)
    refused(write(tmp_path / "b" / "a.safetensors", {"x": torch.ones(1)}), "a word encoder's tensors", load=load_words)
    del state["embedding.weight"]
    refused(write(file, state), "a word encoder's tensors", load=load_words)


# Files and folders


def sharded(tmp_path: Path, changes: Mapping[str, str] | None = None) -> tuple[DiT, Path]:
    model = DiT(TINY)
    state = original_dit(model, tmp_path)
    folder = tmp_path / "shards"
    names = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(state)}
    for file in set(names.values()):
        write(folder / file, {name: tensor for name, tensor in state.items() if names[name] == file}, CONFIG)
    index = folder / f"{FILE_NAME}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names | dict(changes or {})}))
    return model, index


def test_an_index_and_its_folder(tmp_path: Path):
    model, index = sharded(tmp_path)
    same(load_dit(index), model)
    same(load_dit(index.parent), model)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "x.bin"])
def test_an_index_cannot_reach_other_places(tmp_path: Path, name: str):
    _, index = sharded(tmp_path, {"head.head.weight": name})
    refused(index, repr(name))
    refused(index.parent, repr(name))


def test_an_index_that_differs_from_its_files(tmp_path: Path):
    _, index = sharded(tmp_path, {"more": "part-0.safetensors"})
    refused(index, "'more'", "differ")
    (index.parent / "part-1.safetensors").unlink()
    refused(index, "part-1.safetensors", "no such file")
    index.write_text('{"weight_map": 3}')
    refused(index, "no weight_map")
    index.write_text("{")
    refused(index, "unreadable JSON")


def test_which_file_of_a_folder(tmp_path: Path):
    refused(tmp_path, "without *.safetensors")
    refused(tmp_path / "none", "no such file or folder")
    refused(tmp_path / "none.safetensors", "no such file")
    for name, words in (("a.gguf", "quantised GGUF"), ("a.txt", "no checkpoint"), ("m.pth", "swifti2v convert m.pth")):
        (tmp_path / name).write_bytes(b"GGUF")
        refused(tmp_path / name, words)
    refused(tmp_path, "swifti2v convert m.pth")
    save_dit(DiT(TINY), tmp_path)
    assert load_dit(tmp_path).config == TINY
    write(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    assert load_dit(tmp_path).config == TINY, "the main model of a folder goes by the name that Wan gives it"
    _, index = sharded(tmp_path)
    write(index.parent / "b.safetensors", {"x": torch.ones(1)})
    assert load_dit(index.parent).config == TINY
    write(tmp_path / "two" / "a.safetensors", {"x": torch.ones(1)})
    write(tmp_path / "two" / "b.safetensors", {"x": torch.ones(1)})
    refused(tmp_path / "two", "2 checkpoints (a.safetensors, b.safetensors)")


def test_pickles_are_not_loaded(tmp_path: Path):
    for suffix in ("pth", "pt", "bin", "ckpt"):
        torch.save({"a": torch.ones(2)}, tmp_path / f"wan.{suffix}")
        for load in (load_dit, load_vae, read_state):
            refused(tmp_path / f"wan.{suffix}", "pickle", f"swifti2v convert wan.{suffix}", load=load)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    return path.read_bytes()


@given(cut=st.integers(0, 175))
@settings(max_examples=60)
def test_a_file_cut_short_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, whole_file: bytes, cut: int):
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(whole_file[: cut % len(whole_file)])
    refused(path, "does not open", "fetch it again", load=read_state)


@given(garbage=st.binary(max_size=200))
@settings(max_examples=60)
def test_garbage_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, garbage: bytes):
    path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    path.write_bytes(garbage)
    refused(path, "does not open", load=read_state)


# Fingerprints


def test_a_fingerprint_is_of_the_contents(tmp_path: Path):
    model, index = sharded(tmp_path)
    file = write(tmp_path / "one" / "other-name.safetensors", original_dit(model, tmp_path), CONFIG)
    want = fingerprint(file)
    assert re.fullmatch(r"[0-9a-f]{64}", want)
    assert fingerprint(index) == fingerprint(index.parent) == want
    (file.parent / "config.json").write_text(json.dumps(CONFIG | {"eps": 1e-5}))
    assert fingerprint(file) != want
    (file.parent / "config.json").write_text(json.dumps(dict(reversed(CONFIG.items())), indent=4))
    assert fingerprint(file) == want
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(file) != want


def test_a_fingerprint_of_several_and_of_every_dtype(tmp_path: Path):
    kinds = (torch.float8_e4m3fn, torch.bfloat16, torch.bool, torch.int64)
    a = write(tmp_path / "a.safetensors", {str(k): torch.ones(3).to(k) for k in kinds} | {"scalar": torch.tensor(1.0)})
    b = write(tmp_path / "b.safetensors", {"empty": torch.ones(0, 4)})
    assert len({fingerprint(a), fingerprint(b), fingerprint(a, b), fingerprint(b, a)}) == 4


def test_a_state_is_read_when_asked_for(tmp_path: Path):
    write(tmp_path / "a.safetensors", {"x": torch.ones(2, 3, dtype=torch.bfloat16), "y": torch.zeros(1)})
    state = read_state(tmp_path)
    assert set(state) == {"x", "y"}
    assert (state.shape("x"), state.dtype("x")) == ((2, 3), "BF16")
    assert torch.equal(state["x"], torch.ones(2, 3, dtype=torch.bfloat16))


# Pickles


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("module",), ("model", "state_dict")], ids=str)
def test_convert(tmp_path: Path, zipped: bool, nest: tuple[str, ...]):
    tied = torch.randn(4, 6)
    value: Any = {
        "a": tied,
        "tied": tied,
        "view": tied[1:3],
        "turned": tied.T,
        "half": torch.randn(5).bfloat16(),
        "count": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    want = {name: tensor.detach().clone().contiguous() for name, tensor in value.items()}
    for key in nest:
        value = {key: value, "epoch": 3}
    source = tmp_path / "Wan2.1_VAE.pth"
    torch.save(value, source, _use_new_zipfile_serialization=zipped)
    manifest = convert(source, tmp_path / "out.d")
    out = tmp_path / "out.d" / "Wan2.1_VAE.safetensors"
    got = load_file(out)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype for name in want)
    assert manifest == {
        "format": 1,
        "source": "Wan2.1_VAE.pth",
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "tensors": 7,
        "dtypes": {"float32": 5, "bfloat16": 1, "int64": 1},
        "bytes": sum(t.nbytes for t in want.values()),
        "output": "Wan2.1_VAE.safetensors",
        "output_sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "swifti2v": swifti2v.__version__,
    }
    assert json.loads((tmp_path / "out.d" / "Wan2.1_VAE.safetensors.manifest.json").read_text()) == manifest
    assert sorted(p.name for p in out.parent.iterdir()) == [out.name, out.name + ".manifest.json"]


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_convert_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "b": Trap()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"a": Trap()}, protocol=2))
    for name in ("a.pth", "b.pth"):
        refused(tmp_path / name, "not plain weights", load=lambda path: convert(path, tmp_path / "out"))
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ([torch.ones(1)], "list"),
        (torch.ones(1), "Tensor"),
        ({}, "dict"),
        ({"a": torch.ones(1), "step": 3}, "'step' (int)"),
        ({"a": {"b": torch.ones(1)}}, "'a' (dict)"),
        ({3: torch.ones(1)}, "3 (Tensor)"),
        ({"a": torch.eye(2).to_sparse()}, "'a' (Tensor)"),
    ],
    ids=["list", "tensor", "empty", "number", "nested", "key", "sparse"],
)
def test_convert_refuses_all_but_a_flat_dict(tmp_path: Path, value: Any, word: str):
    torch.save(value, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", word, "flat dict", load=lambda path: convert(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_convert_refuses_a_damaged_or_missing_pickle(tmp_path: Path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:3000])
    refused(tmp_path / "b.pth", "not plain weights", load=lambda path: convert(path, tmp_path / "out"))
    refused(tmp_path / "c.pth", "no such file", load=lambda path: convert(path, tmp_path / "out"))


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "while writing", load=lambda path: save_dit(DiT(TINY), path / "below"))
