"""The two JSON texts of callers in other languages, read strictly: what a session opens, and what is asked of it."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from ..engine.manifest import read_bundle
from ..engine.plain import PlainError, from_plain, to_plain
from .acceleration import KernelChoice, check_acceleration
from .backend_fit import device_of
from .bundle import load_bundle
from .capi_status import API_VERSION, CallError, Status
from .capi_worker import say
from .cli_bundle import bundle_paths
from .cli_options import PROFILE_KEYS, make_profile, pick_device
from .fused import accelerate
from .image import MAX_PIXELS, MIN_SIDE, fit_image, load_image
from .model_paths import ModelPaths
from .models import Loaded, load_models
from .session import Request

T = TypeVar("T")
MAX_BYTES = 1 << 20
MOST = {"frames": 100_001, "noisy": 10_000, "neighbours": 10_000, "stage1_steps": 1000, "stage2_steps": 1000}
MODELS = ("stage1", "stage1_low", "stage2", "vae1", "vae2", "text", "image_encoder", "embeddings")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA to merge."""

    path: str
    strength: float


@dataclass(frozen=True)
class Config:
    """What a session opens: a bundle folder, a profile, or both; the rest as the options of `swifti2v generate`."""

    version: int = API_VERSION
    bundle: str | None = None
    profile: str | None = None
    frames: int | None = None
    size: tuple[int, ...] | None = None  # width, height
    noisy: int | None = None
    neighbours: int | None = None
    stage1_steps: int | None = None
    stage2_steps: int | None = None
    shift: float | None = None
    stage1_guidance: float | None = None
    stage2_guidance: float | None = None
    reuse_context: bool | None = None
    stage2_init: Literal["noise", "reference"] | None = None
    strength: float | None = None
    model_dir: str | None = None
    models: dict[str, str] = field(default_factory=dict)  # single entries of the model folder
    loras: dict[str, tuple[LoraFile, ...]] = field(default_factory=dict)  # by stage1, stage1_low, stage2
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    kernels: KernelChoice = "auto"
    cuda_graphs: bool = False
    cache: str | None = None  # folder where prompt embeddings, fingerprints and measured kernels are kept
    queue: int = 2  # finished segments that wait for the caller before generation does


@dataclass(frozen=True)
class Ask:
    """A request, whose image is a path or comes beside it as RGB bytes."""

    version: int = API_VERSION
    prompt: str = ""
    negative: str | None = None
    seed: int = 0
    image: str | None = None
    fit: Literal["crop", "pad", "exact"] = "crop"


@dataclass(frozen=True)
class Pixels:
    """An RGB image in the caller's memory: `rows` holds height rows, row_bytes apart (0: 3 * width)."""

    rows: Any
    width: int
    height: int
    row_bytes: int = 0


def read_config(text: str | bytes) -> Config:
    """A session's JSON. CallError for what is not understood, in full or in part."""
    config = _read(Config, text, "config")
    if config.bundle is None and config.profile is None:
        raise _refusal('config: got neither a bundle nor a profile, want one, such as {"profile": "nano"}')
    for name, most in MOST.items():
        value = getattr(config, name)
        if value is not None and not 0 <= value <= most:
            raise _refusal(f"config.{name}: got {value}, want 0 to {most}")
    if config.size is not None and not (len(config.size) == 2 and config.size[0] * config.size[1] <= MAX_PIXELS):
        raise _refusal(f"config.size: got {list(config.size)}, want [width, height] of at most {MAX_PIXELS:,} pixels")
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", config.device):
        raise _refusal(f"config.device: got {config.device!r}, want auto, cpu, cuda or cuda:N")
    if not 1 <= config.queue <= 64:
        raise _refusal(f"config.queue: got {config.queue}, want 1 to 64")
    _check_names("config.models", config.models, MODELS)
    _check_names("config.loras", config.loras, ("stage1", "stage1_low", "stage2"))
    return config


def open_models(config: Config) -> Loaded:
    """The models of a session; a bundle's own profile and device are the default ones."""
    bundle = None if config.bundle is None else Path(config.bundle)
    opened = None if bundle is None else read_bundle(bundle)
    base = config.profile or (opened.manifest.profile if opened else "")
    profile = make_profile(base, {name: getattr(config, name) for name in PROFILE_KEYS})
    loras = {name: tuple((Path(lora.path), lora.strength) for lora in files) for name, files in config.loras.items()}
    single = ModelPaths(**{name: Path(path) for name, path in config.models.items()}, loras=loras)
    folder = None if config.model_dir is None else Path(config.model_dir)
    paths = bundle_paths(profile, folder, single, bundle)
    device, dtype = pick_device(
        device_of(opened).type if opened and config.device == "auto" else config.device, config.dtype
    )
    check_acceleration(config.kernels, config.cuda_graphs, device)
    cache = None if config.cache is None else Path(config.cache)
    if bundle is None or opened is None:
        loaded = load_models(profile, paths, device, dtype, cache)
    elif config.dtype not in ("auto", opened.manifest.precision):
        raise _refusal(f"config.dtype: got {config.dtype}, want {opened.manifest.precision}, as the bundle was built")
    else:
        loaded = load_bundle(bundle, profile, paths, device, cache)
    return accelerate(loaded, config.kernels, config.cuda_graphs, cache, partial(say, logging.INFO))


def read_request(text: str | bytes, pixels: Pixels | None, width: int, height: int) -> Request:
    """A request for a clip of that size, its image fitted. The pixels are copied; the caller may free them."""
    ask = _read(Ask, text, "request")
    if not 0 <= ask.seed < 1 << 63:
        raise _refusal(f"request.seed: got {ask.seed}, want 0 to 2**63 - 1")
    if (ask.image is None) == (pixels is None):
        got = "no image" if pixels is None else "a path and RGB bytes"
        raise CallError(Status.INVALID_IMAGE, f"request.image: got {got}, want one of path and RGB bytes; pass one")
    image = load_image(ask.image) if ask.image is not None else Image.fromarray(_copy(pixels))
    if ask.fit != "exact":
        return Request(fit_image(image, width, height, ask.fit), ask.prompt, ask.negative, ask.seed)
    if image.size != (width, height):
        got, want = f"{image.width}x{image.height}", f"{width}x{height}"
        raise CallError(Status.INVALID_IMAGE, f"image: got {got}, want {want}; or let it be fitted by 'crop' or 'pad'")
    return Request(np.array(image), ask.prompt, ask.negative, ask.seed)


def _copy(pixels: Pixels | None) -> np.ndarray:
    """uint8 [height, width, 3] of the caller's rows."""
    assert pixels is not None
    width, height = pixels.width, pixels.height
    row_bytes = pixels.row_bytes or 3 * width
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS or row_bytes < 3 * width:
        want = f"want sides of {MIN_SIDE} or more, at most {MAX_PIXELS:,} pixels, rows of 3 bytes a pixel or more"
        got = f"got {width}x{height}, {row_bytes} bytes a row"
        raise CallError(Status.INVALID_IMAGE, f"image: {got}, {want}; pass 8-bit RGB")
    flat = np.frombuffer(pixels.rows, np.uint8)
    least, most = row_bytes * (height - 1) + 3 * width, row_bytes * height
    if not least <= flat.size <= most:
        want = f"want {most} for {width}x{height} of RGB"
        raise CallError(Status.INVALID_IMAGE, f"image: got {flat.size} bytes, {want}; pass all rows, and no more")
    rows = np.lib.stride_tricks.as_strided(flat, (height, width, 3), (row_bytes, 3, 1), writeable=False)
    return rows.copy()


def _read(kind: type[T], text: str | bytes, place: str) -> T:
    """The dataclass in a JSON object; absent fields have their defaults, unknown ones are refused."""
    try:
        if not isinstance(text, (str, bytes)):
            raise PlainError(f"{place}: got {type(text).__name__}, want JSON text")
        data = text.encode() if isinstance(text, str) else text
        if len(data) > MAX_BYTES:
            raise _refusal(f"{place}: got {len(data):,} bytes, want at most {MAX_BYTES:,}")
        value = json.loads(data, object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
        _check_texts(value, place)
        if not isinstance(value, dict):
            raise PlainError(f"{place}: got {type(value).__name__}, want an object")
        read = from_plain(kind, {**to_plain(kind()), **value}, place)
    except PlainError as error:
        raise _refusal(str(error) if str(error).startswith(place) else f"{place}: {error}") from error
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8
        got = " ".join(str(error).split())
        raise _refusal(f"{place}: got no valid JSON ({got}), want one object in UTF-8") from error
    if value.get("version", API_VERSION) != API_VERSION:
        raise _refusal(f"{place}.version: got {value['version']}, want {API_VERSION}")
    return read


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise PlainError(f"object: got a field twice among {[name for name, _ in pairs][:20]}, want each once")
    return value


def _number(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise PlainError(f"number: got {text[:20]}, want one that is finite")
    return number


def _check_texts(value: Any, place: str) -> None:
    """Refuse texts that no path and no tokenizer takes: NUL, half of a surrogate pair."""
    if isinstance(value, str) and ("\0" in value or re.search("[\ud800-\udfff]", value)):
        raise PlainError(f"{place}: got a text with NUL or half a surrogate pair, want plain Unicode")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_texts(name, f"{place}, a field's name")
            _check_texts(item, f"{place}.{name}")
    elif isinstance(value, list):
        for item in value:
            _check_texts(item, place)


def _check_names(place: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise _refusal(f"{place}: got {', '.join(unknown)[:60]}, want {', '.join(known)}")


def _refusal(text: str) -> CallError:
    return CallError(Status.INVALID_JSON, text if "; " in text else f"{text}; see docs/EMBED.md")
