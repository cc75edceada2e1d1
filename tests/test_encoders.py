"""Wan's prompt encoder against transformers and diffusers, on tiny random models in each of the three layouts."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoder_support import all_tensors, edit, randomise, relative
from safetensors.torch import save_file
from torch import Tensor

from swifti2v.engine.errors import EnvironmentMismatch, NumericsError, WeightsError
from swifti2v.runtime.conditioning import CachedEncoder, EmbeddingCache
from swifti2v.runtime.encoders import ClipVisionEncoder, Umt5Encoder, umt5_fingerprint

transformers: Any = pytest.importorskip("transformers")

SENTENCES = ["a slow zoom in on the red boat", "the camera pans left over the sea", "low quality, blurry, static"]
PROMPTS = ["a slow zoom in", "", "the camera  pans left &amp;amp; the sea", "boat " * 700]


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def umt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny UMT5 in the diffusers pipeline layout, sharded."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("umt5")
    config = transformers.UMT5Config(vocab_size=80, d_model=24, d_kv=5, d_ff=40, num_layers=3, num_heads=3)
    model = randomise(transformers.UMT5EncoderModel(config), 0.15)
    model.save_pretrained(root / "text_encoder", max_shard_size="4KB")
    make_tokenizer(root / "tokenizer")
    assert len(list((root / "text_encoder").glob("*.safetensors"))) > 2
    return root


@pytest.fixture(scope="session")
def reference(umt5: Path) -> SimpleNamespace:
    """What diffusers' pipeline needs to encode a prompt."""
    return SimpleNamespace(
        tokenizer=transformers.AutoTokenizer.from_pretrained(umt5 / "tokenizer"),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(
            umt5 / "text_encoder", torch_dtype=torch.float32
        ).eval(),
        _execution_device=torch.device("cpu"),
    )


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "empty", "dirty", "too long"])
def test_umt5_equals_padding_under_a_mask(umt5: Path, reference: SimpleNamespace, prompt: str):
    encoder = Umt5Encoder.open(umt5, dtype=torch.float32)
    clean = prompt.replace("  ", " ").replace("&amp;amp;", "&").strip()
    tokens = reference.tokenizer(clean, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    with torch.no_grad():
        rows = reference.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    want = rows * tokens.attention_mask.unsqueeze(-1)
    got = encoder.encode(prompt)
    assert got.shape == (1, 512, 24)
    assert got.dtype == torch.float32
    assert relative(got, want) <= 1e-5
    length = int(tokens.attention_mask.sum())
    assert not got[0, length:].any()
    assert got[0, :length].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "empty", "dirty", "too long"])
def test_umt5_equals_diffusers(umt5: Path, reference: SimpleNamespace, prompt: str):
    diffusers: Any = pytest.importorskip("diffusers")
    encode = diffusers.WanImageToVideoPipeline._get_t5_prompt_embeds
    with torch.no_grad():
        want = encode(reference, prompt, max_sequence_length=512)
    assert relative(Umt5Encoder.open(umt5, dtype=torch.float32).encode(prompt), want) <= 1e-5


def test_umt5_in_bf16_is_transformers_bf16(umt5: Path, reference: SimpleNamespace):
    encoder = Umt5Encoder.open(umt5)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.bfloat16}
    model = transformers.UMT5EncoderModel.from_pretrained(umt5 / "text_encoder", torch_dtype=torch.bfloat16).eval()
    tokens = reference.tokenizer("a slow zoom in", return_tensors="pt").input_ids
    with torch.no_grad():
        want = model(tokens).last_hidden_state.float()
    got = encoder.encode("a slow zoom in")
    assert got.dtype == torch.float32
    assert torch.equal(got[:, : want.shape[1]], want)
    # Loose: attention without scaling, on random weights, magnifies the rounding.
    full = Umt5Encoder.open(umt5, dtype=torch.float32).encode("a slow zoom in")
    assert 1e-4 < relative(got, full) < 1e-1


def test_umt5_refuses_fp16_and_reports_overflow(umt5: Path):
    with pytest.raises(NumericsError, match="want bfloat16 or float32"):
        Umt5Encoder.open(umt5, dtype=torch.float16)
    encoder = Umt5Encoder.open(umt5, dtype=torch.float32)
    with torch.no_grad():
        encoder.model.shared.weight.fill_(float("inf"))
    with pytest.raises(NumericsError, match="UMT5: got NaN or infinity"):
        encoder.encode("zoom")


def test_text_len_cuts_but_keeps_the_end_of_the_sentence(umt5: Path, reference: SimpleNamespace):
    tokens = reference.tokenizer("boat " * 20, max_length=8, truncation=True, return_tensors="pt").input_ids
    assert tokens.shape == (1, 8)
    assert tokens[0, -1] == 1
    with torch.no_grad():
        want = reference.text_encoder(tokens).last_hidden_state
    assert relative(Umt5Encoder.open(umt5, dtype=torch.float32, text_len=8).encode("boat " * 20), want) <= 1e-5


def original_umt5(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> the names in Wan's own file, spelled out apart from the code under test."""
    renamed = {
        "token_embedding.weight": state["shared.weight"],
        "norm.weight": state["encoder.final_layer_norm.weight"],
    }
    for n in range(3):
        theirs, attention = f"encoder.block.{n}.layer.", f"encoder.block.{n}.layer.0.SelfAttention."
        for letter in "qkvo":
            renamed[f"blocks.{n}.attn.{letter}.weight"] = state[f"{attention}{letter}.weight"]
        renamed[f"blocks.{n}.pos_embedding.embedding.weight"] = state[f"{attention}relative_attention_bias.weight"]
        renamed[f"blocks.{n}.norm1.weight"] = state[f"{theirs}0.layer_norm.weight"]
        renamed[f"blocks.{n}.norm2.weight"] = state[f"{theirs}1.layer_norm.weight"]
        renamed[f"blocks.{n}.ffn.gate.0.weight"] = state[f"{theirs}1.DenseReluDense.wi_0.weight"]
        renamed[f"blocks.{n}.ffn.fc1.weight"] = state[f"{theirs}1.DenseReluDense.wi_1.weight"]
        renamed[f"blocks.{n}.ffn.fc2.weight"] = state[f"{theirs}1.DenseReluDense.wo.weight"]
    return {name: tensor.clone() for name, tensor in renamed.items()}


@pytest.fixture
def original(umt5: Path, tmp_path: Path) -> Path:
    """The same UMT5 as Wan's own folder holds it, with the unrelated config.json that lies there."""
    state = original_umt5(all_tensors(umt5 / "text_encoder"))
    save_file(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors")
    shutil.copytree(umt5 / "tokenizer", tmp_path / "google" / "umt5-xxl")
    (tmp_path / "config.json").write_text('{"model_type": "i2v"}')
    return tmp_path


def test_umt5_layouts_are_equal(umt5: Path, original: Path, tmp_path_factory: pytest.TempPathFactory):
    flat = tmp_path_factory.mktemp("flat")
    for folder in (umt5 / "text_encoder", umt5 / "tokenizer"):
        shutil.copytree(folder, flat, dirs_exist_ok=True)
    want = Umt5Encoder.open(umt5, dtype=torch.float32).encode(PROMPTS[0])
    assert torch.equal(Umt5Encoder.open(flat, dtype=torch.float32).encode(PROMPTS[0]), want)
    assert torch.equal(Umt5Encoder.open(original, dtype=torch.float32).encode(PROMPTS[0]), want)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.update(extra=torch.ones(1)), "got tensor extra, want only those of Wan's UMT5"),
        (lambda state: state.pop("blocks.1.attn.q.weight"), r"missing \['encoder\.block\.1\.layer\.0"),
        (lambda state: state.pop("token_embedding.weight"), "got no token_embedding.weight"),
        (lambda state: state.update({"blocks.1.attn.q.weight": torch.ones(3, 3)}), "want a readable encoder"),
        (lambda state: state.update({"token_embedding.weight": torch.ones(3)}), "want a readable encoder"),
    ],
    ids=["extra", "missing", "missing size", "wrong shape", "wrong rank"],
)
def test_a_wrong_original_file_is_refused(original: Path, change: Callable[[dict[str, Tensor]], object], text: str):
    edit(original / "models_t5_umt5-xxl-enc-bf16.safetensors", change)
    with pytest.raises(WeightsError, match=text):
        Umt5Encoder.open(original)


def test_what_is_not_there_is_said(umt5: Path, original: Path, tmp_path_factory: pytest.TempPathFactory):
    with pytest.raises(WeightsError, match="got no encoder there, want text_encoder/"):
        Umt5Encoder.open(tmp_path_factory.mktemp("nothing"))
    with pytest.raises(WeightsError, match="got no tokenizer"):
        Umt5Encoder.open(umt5 / "text_encoder")
    shutil.copy(next(original.glob("models_t5*")), original / "models_t5_second.safetensors")
    with pytest.raises(WeightsError, match="want one file models_t5"):
        Umt5Encoder.open(original)


def test_pickles_are_refused(umt5: Path, tmp_path: Path):
    (tmp_path / "wan").mkdir()
    torch.save({}, tmp_path / "wan" / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(WeightsError, match=r"got a pickle, want safetensors; run swifti2v convert .*\.pth"):
        Umt5Encoder.open(tmp_path / "wan")
    shutil.copytree(umt5, tmp_path / "hf")
    for path in (tmp_path / "hf" / "text_encoder").glob("model*"):
        path.unlink()
    torch.save({}, tmp_path / "hf" / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="got a pickle"):
        Umt5Encoder.open(tmp_path / "hf")


def test_a_damaged_folder_is_refused(umt5: Path, tmp_path: Path):
    shutil.copytree(umt5, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "text_encoder" / "config.json"
    good = config.read_text()
    config.write_text(good.replace('"model_type": "umt5"', '"model_type": "t5"'))
    with pytest.raises(WeightsError, match="got model_type t5, want umt5"):
        Umt5Encoder.open(tmp_path)
    config.write_text(good)
    shard = next((tmp_path / "text_encoder").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="want a readable encoder"):
        Umt5Encoder.open(tmp_path)


def test_without_transformers_the_extra_is_named(umt5: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentMismatch, match=r"pip install 'swifti2v\[wan\]'"):
        Umt5Encoder.open(umt5)
    with pytest.raises(EnvironmentMismatch, match="transformers"):
        ClipVisionEncoder.open(umt5)


def test_opening_prints_nothing_and_leaves_the_settings_alone(umt5: Path, capfd: pytest.CaptureFixture[str]):
    logging = transformers.utils.logging
    logging.enable_progress_bar()
    before = logging.get_verbosity()
    Umt5Encoder.open(umt5, dtype=torch.float32).encode("zoom " * 600)
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before
    assert logging.is_progress_bar_enabled()


def test_fingerprint_follows_what_matters(umt5: Path, tmp_path: Path):
    base = umt5_fingerprint(umt5)
    copy = tmp_path / "moved"
    shutil.copytree(umt5, copy)
    assert Umt5Encoder.open(umt5).fingerprint == base == umt5_fingerprint(copy)
    assert len({base, umt5_fingerprint(umt5, torch.float32), umt5_fingerprint(umt5, text_len=8)}) == 3
    seen = {base}
    for name in ("tokenizer/tokenizer.json", "text_encoder/config.json"):
        (copy / name).write_text((copy / name).read_text() + " ")
        seen.add(umt5_fingerprint(copy))
    shard = next((copy / "text_encoder").glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    seen.add(umt5_fingerprint(copy))
    shard.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])  # the header
    seen.add(umt5_fingerprint(copy))
    shard.rename(shard.with_name("model-renamed.safetensors"))
    seen.add(umt5_fingerprint(copy))
    assert len(seen) == 6


def test_fingerprint_reads_the_ends_of_a_large_file(original: Path):
    path = next(original.glob("models_t5*"))
    save_file({"weight": torch.zeros(1 << 20)}, path)  # 4 MiB; no model, the fingerprint does not care
    seen = {umt5_fingerprint(original)}
    for offset in (0.2, 0.9):
        edit(path, lambda state, offset=offset: state["weight"].__setitem__(int(offset * (1 << 20)), 1.0))
        seen.add(umt5_fingerprint(original))
    assert len(seen) == 3


def test_the_cache_opens_umt5_once_and_answers_without_it(umt5: Path, tmp_path: Path):
    fingerprint = umt5_fingerprint(umt5)
    cached = CachedEncoder(lambda: Umt5Encoder.open(umt5), fingerprint, EmbeddingCache(tmp_path))
    want = Umt5Encoder.open(umt5).encode("zoom in")
    assert torch.equal(cached.encode_all(["zoom in"])[0], want)
    gone = CachedEncoder(lambda: Umt5Encoder.open(tmp_path / "gone"), fingerprint, EmbeddingCache(tmp_path))
    assert torch.equal(gone.encode_all([" zoom  in"])[0], want)
