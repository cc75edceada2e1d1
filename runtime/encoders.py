"""Wan's own encoders through transformers: UMT5 for prompts, the CLIP vision tower for images (Wan2.1 only).

Each opens from a local folder, see runtime/encoder_files.py. Nothing is downloaded and no pickle is read.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..engine.errors import EnvironmentMismatch, NumericsError, SpecError, WeightsError
from .conditioning import clean_prompt, require, zero_fill
from .encoder_files import (
    EncoderFiles,
    clip_from_original,
    find_encoder,
    find_tokenizer,
    fingerprint_files,
    small_files,
    umt5_from_original,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Tensors under original names and their file -> sizes for the configuration, tensors under transformers' names.
Convert = Callable[[Mapping[str, Tensor], Path], tuple[dict[str, Any], dict[str, Tensor]]]


def umt5_fingerprint(path: Path | str, dtype: torch.dtype = torch.bfloat16, text_len: int = 512) -> str:
    """The fingerprint that `Umt5Encoder.open` with these arguments has, without opening the model."""
    files = find_encoder(path, "text_encoder", "models_t5")
    texts = {*small_files(find_tokenizer(path, files)), *([] if files.original else small_files(files.folder))}
    return fingerprint_files(files.weights, sorted(texts), "umt5", dtype, text_len)


@dataclass(frozen=True, eq=False)
class Umt5Encoder:
    """UMT5 as Wan reads it: clean prompt -> tokens -> encoder -> rows, zero past the prompt."""

    model: Any
    tokenizer: Any
    fingerprint: str
    text_len: int
    device: torch.device

    @classmethod
    def open(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        text_len: int = 512,
    ) -> "Umt5Encoder":
        """Open from a local folder. Raises WeightsError, and EnvironmentMismatch without the `wan` extra."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise NumericsError(f"UMT5 dtype: got {dtype}, want bfloat16 or float32; UMT5 overflows in float16")
        transformers = require("transformers")
        files = find_encoder(path, "text_encoder", "models_t5")
        folder = find_tokenizer(path, files)
        config = state = None
        if files.original:
            sizes, state = _read_original(files.weights[0], umt5_from_original)
            config = transformers.UMT5Config(**sizes)
        with _third_party(files.folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        model = _load_model(transformers.UMT5EncoderModel, "umt5", files, config, state, dtype)
        fingerprint = umt5_fingerprint(path, dtype, text_len)
        return cls(model.to(device), tokenizer, fingerprint, text_len, torch.device(device))

    def encode_all(self, prompts: Sequence[str]) -> list[Tensor]:
        """fp32 [1, text_len, D] for each prompt."""
        return [self.encode(prompt) for prompt in prompts]

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Prompt -> fp32 [1, text_len, D] on the encoder's device; longer prompts are cut. Raises NumericsError.

        Encoding only the prompt's own tokens equals padding them to `text_len` under a mask, and costs less.
        """
        tokens = self.tokenizer(
            clean_prompt(prompt),
            truncation=True,
            max_length=self.text_len,
            add_special_tokens=True,
            return_tensors="pt",
        )
        rows = self.model(input_ids=tokens.input_ids.to(self.device)).last_hidden_state  # [1, L, D]
        return zero_fill(_finite("UMT5", rows), self.text_len)


def clip_fingerprint(path: Path | str, dtype: torch.dtype = torch.float32) -> str:
    """The fingerprint that `ClipVisionEncoder.open` with these arguments has, without opening the model."""
    files = find_encoder(path, "image_encoder", "models_clip")
    texts = [] if files.original else [files.folder / "config.json"]
    return fingerprint_files(files.weights, texts, "clip", dtype)


@dataclass(frozen=True, eq=False)
class ClipVisionEncoder:
    """The CLIP vision tower as Wan2.1 I2V reads it: all tokens after the last layer but one, before the final norm."""

    model: Any
    fingerprint: str
    device: torch.device

    @classmethod
    def open(
        cls, path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ClipVisionEncoder":
        """Open from a local folder. Raises WeightsError, and EnvironmentMismatch without the `wan` extra."""
        transformers = require("transformers")
        files = find_encoder(path, "image_encoder", "models_clip")
        config = state = None
        if files.original:
            sizes, state = _read_original(files.weights[0], clip_from_original)
            config = transformers.CLIPVisionConfig(**sizes)
        model = _load_model(transformers.CLIPVisionModel, "clip_vision_model", files, config, state, dtype)
        return cls(model.to(device), clip_fingerprint(path, dtype), torch.device(device))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """uint8 [H, W, 3] or float [1, 3, 1, H, W] in -1..1 -> fp32 [1, 257, 1280]. Raises SpecError, NumericsError."""
        pixels = clip_pixels(image.to(self.device), self.model.config.image_size)
        states = self.model(pixel_values=pixels.to(self.model.dtype), output_hidden_states=True).hidden_states
        return _finite("CLIP", states[-2])


def clip_pixels(image: Tensor, side: int) -> Tensor:
    """An image as Wan's own code prepares it for CLIP: squashed to a square -> [1, 3, side, side]; no antialias.

    image: uint8 [H, W, 3] or float [1, 3, 1, H, W] in -1..1. transformers' own processor crops instead.
    """
    if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[2] == 3:
        x = image.permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1  # [H, W, 3] -> [1, 3, H, W]
    elif image.is_floating_point() and image.ndim == 5 and image.shape[:3] == (1, 3, 1):
        x = image.squeeze(2).float()  # [1, 3, 1, H, W] -> [1, 3, H, W]
    else:
        raise SpecError(
            f"image: got {tuple(image.shape)} {image.dtype}, want uint8 [H, W, 3] or float [1, 3, 1, H, W]; convert it"
        )
    x = F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))  # [3] -> [3, 1, 1]
    return (x * 0.5 + 0.5 - mean) / std  # statistics are those of 0..1; the overshoot of bicubic is kept


def _finite(name: str, rows: Tensor) -> Tensor:
    if not rows.isfinite().all():
        raise NumericsError(f"{name}: got NaN or infinity in its output, want finite values; open it in float32")
    return rows.float()


def _read_original(path: Path, convert: Convert) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with _third_party(path):
        return convert(load_file(path), path)


def _load_model(
    model_class: Any, kind: str, files: EncoderFiles, config: Any, state: dict[str, Tensor] | None, dtype: torch.dtype
) -> Any:
    with _third_party(files.folder):
        if not files.original:
            _check_kind(files.folder / "config.json", kind)
        model, info = model_class.from_pretrained(
            None if files.original else str(files.folder),
            config=config,
            state_dict=state,
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    # Projections and position numbers are saved with some models and play no part in the rows we read.
    extra = [key for key in info["unexpected_keys"] if key.split(".")[-1] != "position_ids" and "projection" not in key]
    missing = info["missing_keys"]
    if extra or missing:
        raise WeightsError(
            f"{files.folder}: got extra {sorted(extra)}, missing {sorted(missing)}, want exactly the {kind} encoder; "
            "download or convert it again"
        )
    return model.eval().requires_grad_(False)


def _check_kind(path: Path, kind: str) -> None:
    got = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if got != kind:
        raise WeightsError(f"{path}: got model_type {got}, want {kind}; pass the folder of that encoder")


@contextmanager
def _third_party(path: Path) -> Iterator[None]:
    """Call transformers or safetensors: silent, since a library prints nothing, and failing with our error."""
    logging = require("transformers").utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except WeightsError:
        raise
    except ImportError as error:
        raise EnvironmentMismatch(f"{path}: got {error}, want the `wan` extra; pip install 'swifti2v[wan]'") from error
    except Exception as error:  # whatever they raise on a damaged file, and that is many kinds
        raise WeightsError(f"{path}: got {error}, want a readable encoder; download or convert it again") from error
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
