"""The files of Wan's own encoders: where they lie, what stands for their content, and the original tensor names.

Three layouts: a diffusers pipeline, a plain transformers folder, the original Wan layout converted to safetensors.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import WeightsError

CLIP_HEAD_DIM = 80  # of ViT-H/14; the original layout's shapes do not tell it
MIB = 1 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "special_tokens_map.json")

# Original Wan name -> transformers name, inside one block.
UMT5_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
UMT5_TOP = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
CLIP_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
CLIP_TOP = {
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",  # spelled so in transformers
    "pre_norm.bias": "pre_layrnorm.bias",
    "post_norm.weight": "post_layernorm.weight",
    "post_norm.bias": "post_layernorm.bias",
}


@dataclass(frozen=True)
class EncoderFiles:
    """What one encoder is read from; `original` = Wan's own tensor names, without a config.json."""

    folder: Path
    weights: tuple[Path, ...]
    original: bool


def find_encoder(path: Path | str, subfolder: str, stem: str) -> EncoderFiles:
    """The safetensors files of an encoder: `path/subfolder`, `path/stem*.safetensors` (original), or `path` itself.

    Raises WeightsError where there is none; where there are only pickles it names the converter.
    """
    root = Path(path)
    folder = root / subfolder if (root / subfolder).is_dir() else root
    single = sorted(root.glob(f"{stem}*.safetensors")) if folder == root else []
    if len(single) > 1:
        raise WeightsError(f"{root}: got {[p.name for p in single]}, want one file {stem}*; move the others away")
    if single:
        return EncoderFiles(root, (single[0],), original=True)
    shards = sorted(folder.glob("model*.safetensors"))
    if shards and (folder / "config.json").is_file():
        return EncoderFiles(folder, tuple(shards), original=False)
    pickles = [*folder.glob("pytorch_model*.bin"), *root.glob(f"{stem}*.pth"), *root.glob(f"{stem}*.pt")]
    if pickles:
        raise WeightsError(f"{pickles[0]}: got a pickle, want safetensors; run swifti2v convert {pickles[0]}")
    raise WeightsError(
        f"{root}: got no encoder there, want {subfolder}/ or {stem}*.safetensors or config.json with model*; "
        "pass the folder of the downloaded model"
    )


def find_tokenizer(path: Path | str, files: EncoderFiles) -> Path:
    """The tokenizer's folder: `tokenizer/`, `google/umt5-xxl/`, or beside the encoder. Raises WeightsError."""
    root = Path(path)
    for folder in (root / "tokenizer", root / "google" / "umt5-xxl", files.folder):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    raise WeightsError(f"{root}: got no tokenizer, want tokenizer/ or google/umt5-xxl/; copy it from the model's page")


def fingerprint_files(weights: Iterable[Path], texts: Iterable[Path], *settings: object) -> str:
    """sha256 that stands for an encoder's results without reading 11 GB; the same wherever the files lie.

    Hashed: of each weights file its name, size, safetensors header, first and last MiB; the small files whole; the
    settings. A change inside the weights that leaves all of these alone goes unnoticed.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, 100 * MIB) + MIB))  # a damaged length must not read everything
            file.seek(max(file.tell(), size - MIB))
            digest.update(file.read())
    for path in texts:
        content = path.read_bytes()
        digest.update(f"\n{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def small_files(folder: Path) -> list[Path]:
    """Configuration and tokenizer files of a folder, in any order."""
    return [path for path in folder.iterdir() if path.suffix in (".json", ".model", ".txt")]


def umt5_from_original(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Wan's UMT5 tensors -> sizes for UMT5Config and tensors under transformers' names. Raises WeightsError."""
    mapped = {}
    for key, tensor in state.items():
        name = key.removesuffix(".weight")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block and block[2] in UMT5_BLOCK:
            mapped[f"encoder.block.{block[1]}.{UMT5_BLOCK[block[2]]}.weight"] = tensor
        elif name in UMT5_TOP:
            mapped[f"{UMT5_TOP[name]}.weight"] = tensor
        else:
            raise _unknown(path, key, "UMT5")
    vocabulary, width = _shape(state, path, "token_embedding.weight")
    buckets, heads = _shape(state, path, "blocks.0.pos_embedding.embedding.weight")
    sizes = {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _shape(state, path, "blocks.0.attn.q.weight")[0] // heads,
        "d_ff": _shape(state, path, "blocks.0.ffn.fc1.weight")[0],
        "num_layers": _layers(state, "blocks."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
    return sizes, mapped


def clip_from_original(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Wan's CLIP tensors -> sizes for CLIPVisionConfig and tensors under transformers' names. Raises WeightsError.

    The text tower (`textual.*`, `log_scale`) and the projection (`visual.head`) are known and left out.
    """
    mapped = {}
    for key, tensor in state.items():
        if key.startswith("textual.") or key in ("log_scale", "visual.head"):
            continue
        if not key.startswith("visual."):
            raise _unknown(path, key, "CLIP")
        name = key.removeprefix("visual.")
        block = re.fullmatch(r"transformer\.(\d+)\.(.+)\.(weight|bias)", name)
        if block and block[2] == "attn.to_qkv":
            for part, third in zip("qkv", tensor.chunk(3), strict=True):  # [3D, ...] -> 3 x [D, ...]
                mapped[f"encoder.layers.{block[1]}.self_attn.{part}_proj.{block[3]}"] = third
        elif block and block[2] in CLIP_BLOCK:
            mapped[f"encoder.layers.{block[1]}.{CLIP_BLOCK[block[2]]}.{block[3]}"] = tensor
        elif name in CLIP_TOP:
            # [1, 1, D] -> [D] and [1, tokens, D] -> [tokens, D]
            mapped[CLIP_TOP[name]] = tensor.squeeze() if name.endswith("_embedding") else tensor
        else:
            raise _unknown(path, key, "CLIP")
    _, tokens, width = _shape(state, path, "visual.pos_embedding")
    patch = _shape(state, path, "visual.patch_embedding.weight")[-1]
    sizes = {
        "hidden_size": width,
        "intermediate_size": _shape(state, path, "visual.transformer.0.mlp.0.weight")[0],
        "num_hidden_layers": _layers(state, "visual.transformer."),
        "num_attention_heads": width // CLIP_HEAD_DIM,
        "image_size": round((tokens - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",  # the erf form
        "layer_norm_eps": 1e-5,
    }
    # The prefix is optional to transformers 5 and required by 4.
    return sizes, {f"vision_model.{key}": tensor for key, tensor in mapped.items()}


def _shape(state: Mapping[str, Tensor], path: Path, key: str) -> torch.Size:
    if key not in state:
        raise WeightsError(f"{path}: got no {key}, want the whole encoder; convert the file again")
    return state[key].shape


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def _unknown(path: Path, key: str, model: str) -> WeightsError:
    return WeightsError(f"{path}: got tensor {key}, want only those of Wan's {model}; pass the right file")
