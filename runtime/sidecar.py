"""The record beside a clip: what was asked, with what it was made, how long it took. JSON, versioned."""

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..engine.errors import MediaError
from ..engine.profile import Profile
from ..engine.sampler import stage_sigmas
from .image import part_of
from .models import Loaded
from .session import Request

FORMAT = 1
PACKAGES = ("swifti2v", "torch", "numpy", "safetensors", "pillow", "av", "transformers")


@dataclass(frozen=True)
class Run:
    """A finished run, as the record needs it."""

    output: Path
    source: str
    fit: str
    request: Request
    loaded: Loaded
    weights: dict[str, str]  # fingerprint by model, or one entry that says they are untrained
    seconds: dict[str, float]


def record_path(output: Path) -> Path:
    """The record of a clip: clip.mp4.json beside clip.mp4."""
    return output.with_name(output.name + ".json")


def describe(run: Run) -> dict[str, Any]:
    """The record as plain JSON values."""
    request, loaded = run.request, run.loaded
    profile, device = loaded.profile, loaded.device
    negative = profile.text.negative if request.negative is None else request.negative
    return {
        "format": FORMAT,
        "output": printable(run.output.name),
        "request": {
            "source": printable(run.source),
            "fit": run.fit,
            "image_sha256": hashlib.sha256(request.image.tobytes()).hexdigest(),
            "prompt": request.prompt,
            "negative": negative if profile.guided else None,  # not read otherwise
            "seed": request.seed,
        },
        "profile": describe_profile(profile),
        "backend": loaded.backend,
        "bundle": None if loaded.bundle is None else loaded.bundle.manifest.digest,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": dtype_name(loaded.dtype),
        "weights": {printable(name): value for name, value in run.weights.items()},
        "versions": versions(),
        "seconds": {**run.seconds, "total": round(sum(run.seconds.values()), 4)},
    }


def printable(name: str) -> str:
    """A file's name as text, with what is no UTF-8 in it replaced; Python holds those bytes as lone surrogates."""
    return os.fsencode(name).decode("utf-8", "replace")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_profile(profile: Profile) -> dict[str, Any]:
    """The numbers of a profile that a reader compares runs by."""
    return {
        "name": profile.name,
        "size": [profile.width, profile.height],
        "stage1_size": [profile.stage1.width, profile.stage1.height],
        "frames": profile.frames,
        "fps": profile.fps,
        "blocks": profile.blocks,
        "noisy": profile.noisy,
        "neighbours": profile.neighbours,
        "context": profile.context,
        "reuse_context": profile.reuse_context,
        "positions": profile.positions,
        "reference": profile.reference,
        "stage2_init": profile.stage2_init,
        "strength": profile.strength,
        "sigmas": {
            "stage1": [round(sigma, 6) for sigma in stage_sigmas(profile.stage1)],
            "stage2": [round(sigma, 6) for sigma in stage_sigmas(profile.stage2, profile.stage2_start)],
        },
        "guidance": {"stage1": profile.stage1.guidance, "stage2": profile.stage2.guidance},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result; absent packages are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # a package's own version does not say for which CUDA it was built
    return found


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record so that it appears whole or not at all."""
    part = part_of(path)
    try:
        part.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise MediaError(f"record {path}: got '{error.strerror}', want a writable file; check the folder") from error
    finally:
        part.unlink(missing_ok=True)
