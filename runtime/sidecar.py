"""The record beside a clip: what was asked, with what it was made, how long it took. JSON, versioned."""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import MediaError
from ..engine.profile import Profile
from ..engine.sampler import stage_sigmas

FORMAT = 1
PACKAGES = ("swifti2v", "torch", "numpy", "safetensors", "pillow", "av", "transformers")


@dataclass(frozen=True)
class Made:
    """What a run has to say for itself."""

    output: Path
    source: str
    fit: str
    prompt: str
    negative: str | None
    seed: int
    device: str
    dtype: str
    weights: dict[str, str]  # fingerprint by model, or one entry that says they are untrained
    loras: dict[str, list[tuple[str, float]]]


def describe(made: Made, profile: Profile, image: np.ndarray, seconds: dict[str, float], wall: float) -> dict[str, Any]:
    """The record as plain JSON values; image is the fitted one, uint8 [H, W, 3]."""
    record = {key: value for key, value in asdict(made).items() if key not in ("output", "weights", "loras")}
    return {
        "format": FORMAT,
        "output": made.output.name,
        "request": {**record, "image_sha256": hashlib.sha256(image.tobytes()).hexdigest()},
        "profile": describe_profile(profile),
        "weights": made.weights,
        "loras": made.loras,
        "versions": versions(),
        "seconds": {**seconds, "wall": round(wall, 3)},
    }


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
        "positions": profile.positions,
        "reference": profile.reference,
        "stage2_init": profile.stage2_init,
        "strength": profile.strength,
        "sigmas": {
            "stage1": [round(sigma, 6) for sigma in stage_sigmas(profile.stage1)],
            "stage2": [round(sigma, 6) for sigma in stage_sigmas(profile.stage2, stage2_start(profile))],
        },
        "guidance": {"stage1": profile.stage1.guidance, "stage2": profile.stage2.guidance},
    }


def stage2_start(profile: Profile) -> float:
    """The sigma Stage II starts from."""
    return profile.strength if profile.stage2_init == "reference" else 1.0


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result; absent packages are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record so that it appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise MediaError(f"record {path}: got '{error.strerror}', want a writable file; check the folder") from error
    finally:
        part.unlink(missing_ok=True)
