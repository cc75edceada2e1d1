"""Prompts and their embeddings: cleaning, the encoder's interface, a cache on disk, files of ready embeddings.

Axes: L rows of text, D width of text. Text is always [1, text_len, D] fp32, zero past the end of the prompt.
"""

import gc
import hashlib
import html
import importlib
import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..engine.errors import EnvironmentMismatch, NumericsError, WeightsError

LOG = logging.getLogger(__name__)
CLIP_SHAPE = (257, 1280)  # tokens and width of the image features that Wan2.1 I2V reads


def require(package: str) -> Any:
    """Import a package of the `wan` extra. Raises EnvironmentMismatch where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise EnvironmentMismatch(
            f"{package}: got {error}, want it for Wan's encoders; run pip install 'swifti2v[wan]'"
        ) from error


def clean_prompt(prompt: str) -> str:
    """The prompt as Wan's pipelines clean it: mojibake and HTML escapes repaired, white space collapsed."""
    fixed = require("ftfy").fix_text(prompt)
    unescaped = html.unescape(html.unescape(fixed)).strip()  # twice: prompts arrive escaped twice
    return re.sub(r"\s+", " ", unescaped).strip()


def zero_fill(text: Tensor, text_len: int) -> Tensor:
    """Append zero rows: [1, L, D] -> [1, text_len, D]."""
    return F.pad(text, (0, 0, 0, text_len - text.shape[1]))


class PromptEncoder(Protocol):
    """Turns a prompt into text rows; equal fingerprints mean equal results."""

    @property
    def fingerprint(self) -> str: ...

    def encode_all(self, prompts: Sequence[str]) -> list[Tensor]:
        """Prompts -> fp32 [1, text_len, D] each, zero past their end."""
        ...


class EmbeddingCache:
    """Embeddings on disk, one safetensors file each; a damaged entry is deleted and counts as absent."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, fingerprint: str, prompt: str) -> Path:
        """The file of a cleaned prompt under the encoder of that fingerprint."""
        return self.folder / (hashlib.sha256(f"{fingerprint}\n{prompt}".encode()).hexdigest() + ".safetensors")

    def get(self, fingerprint: str, prompt: str) -> Tensor | None:
        """The stored [1, text_len, D] fp32, or None."""
        path = self.path(fingerprint, prompt)
        try:
            with safe_open(path, framework="pt") as file:
                embedding, digest = file.get_tensor("prompt"), (file.metadata() or {}).get("sha256")
        except OSError:  # absent, or not ours to read: another folder's rights are no damage
            return None
        except SafetensorError:
            embedding, digest = None, None
        if embedding is not None and digest == _digest(embedding):
            return embedding
        path.unlink(missing_ok=True)
        return None

    def put(self, fingerprint: str, prompt: str, embedding: Tensor) -> None:
        """Store [1, text_len, D] fp32. A folder that cannot be written costs a warning, not the result."""
        embedding = _storable(embedding)
        try:
            _write(self.path(fingerprint, prompt), {"prompt": embedding}, {"sha256": _digest(embedding)})
        except (OSError, SafetensorError) as error:
            LOG.warning("embedding cache %s: got %s, want a writable folder; pass another one", self.folder, error)


@dataclass
class CachedEncoder:
    """A PromptEncoder that opens the real one only for prompts the cache lacks, and frees it right after.

    `make_encoder` must keep no reference to what it returns, or 11 GB stay in memory.
    """

    make_encoder: Callable[[], PromptEncoder]
    fingerprint: str
    cache: EmbeddingCache | None = None

    def encode_all(self, prompts: Sequence[str]) -> list[Tensor]:
        """Prompts -> fp32 [1, text_len, D] each; all that are missing share one opening of the encoder.

        Raises WeightsError where the encoder that opens is not the one of `fingerprint`.
        """
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        found = {}
        for prompt in cleaned:
            stored = None if self.cache is None else self.cache.get(self.fingerprint, prompt)
            if stored is not None:
                found[prompt] = stored
        missing = [prompt for prompt in dict.fromkeys(cleaned) if prompt not in found]
        if missing:
            found.update(self._make(missing))
        return [found[prompt] for prompt in cleaned]

    def _make(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoder = self.make_encoder()
        if encoder.fingerprint != self.fingerprint:
            raise WeightsError(
                f"prompt encoder: got fingerprint {encoder.fingerprint}, want {self.fingerprint}; "
                "the files changed, compute the fingerprint again"
            )
        made = {}
        for prompt in prompts:
            made[prompt] = encoder.encode_all([prompt])[0].cpu()
            if self.cache is not None:
                self.cache.put(self.fingerprint, prompt, made[prompt])
        del encoder
        gc.collect()  # the modules refer to one another in circles
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use
        return made


@dataclass(frozen=True)
class Embeddings:
    """Ready embeddings of one request, fp32: text [1, text_len, D], image features [1, 257, 1280]."""

    prompt: Tensor
    negative: Tensor | None = None
    image: Tensor | None = None


def load_embeddings(
    path: Path | str, text_dim: int, text_len: int, image_shape: tuple[int, int] = CLIP_SHAPE
) -> Embeddings:
    """Read ready embeddings from a safetensors file; text of fewer than `text_len` rows is filled with zeros.

    Tensors: `prompt` [L, D] or [1, L, D], and optionally `negative` alike and `image` [1, tokens, width], each fp32,
    bf16 or fp16. Raises WeightsError for another file, name, shape or dtype, NumericsError for NaN and infinity.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: got {error}, want a safetensors file; write one with save_embeddings") from error
    if "prompt" not in tensors or not tensors.keys() <= {"prompt", "negative", "image"}:
        raise WeightsError(
            f"{path}: got tensors {sorted(tensors)}, want prompt and optionally negative, image; rename them"
        )
    ready = {}
    for name, tensor in tensors.items():
        _check_values(f"{path}: {name}", tensor)
        if name == "image":
            if tensor.shape != (1, *image_shape):
                raise WeightsError(_shape_text(path, name, tensor, f"(1, {image_shape[0]}, {image_shape[1]})"))
            ready[name] = tensor.float()
            continue
        text = tensor.unsqueeze(0) if tensor.ndim == 2 else tensor  # [L, D] -> [1, L, D]
        if text.ndim != 3 or text.shape[0] != 1 or not 1 <= text.shape[1] <= text_len or text.shape[2] != text_dim:
            raise WeightsError(_shape_text(path, name, tensor, f"(1, 1 to {text_len}, {text_dim})"))
        ready[name] = zero_fill(text.float(), text_len)
    return Embeddings(**ready)


def save_embeddings(path: Path | str, embeddings: Embeddings) -> None:
    """Write what `load_embeddings` reads, as fp32. Raises as that does, and where the file cannot be written."""
    named = {"prompt": embeddings.prompt, "negative": embeddings.negative, "image": embeddings.image}
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    for name, tensor in tensors.items():
        _check_values(f"{path}: {name}", tensor)
    try:
        _write(Path(path), {name: _storable(tensor) for name, tensor in tensors.items()})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: got {error}, want a place to write; choose another path") from error


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise WeightsError(f"{name}: got {tensor.dtype}, want float32, bfloat16 or float16; convert it")
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise NumericsError(f"{name}: got {bad} values that are NaN or infinite, want none; encode in bf16 or fp32")


def _shape_text(path: Path | str, name: str, tensor: Tensor, want: str) -> str:
    return f"{path}: {name}: got shape {tuple(tensor.shape)}, want {want}; encode for this profile's models"


def _storable(tensor: Tensor) -> Tensor:
    # A clone, because safetensors refuses tensors that share memory, such as one prompt used twice.
    return tensor.detach().to("cpu", torch.float32).contiguous().clone()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # its own name: two writers must not share one
    try:
        save_file(dict(tensors), part, metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
