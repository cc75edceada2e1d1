"""Options of the command line that become profile, model paths and device."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from ..engine.errors import EnvironmentMismatch
from ..engine.presets import PROFILES, get_profile
from ..engine.profile import Profile
from . import backend_cache
from .devices import best_dtype
from .model_paths import Lora, ModelPaths

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATH = click.Path(path_type=Path)
MODEL_OPTIONS = {
    "stage1": "Stage I DiT (a folder with both experts of Wan2.2-I2V-A14B is fine).",
    "stage1_low": "Second expert of Stage I, for low noise.",
    "stage2": "Stage II DiT.",
    "vae1": "Stage I VAE (8x8x4).",
    "vae2": "Stage II VAE (16x16x4).",
    "text": "Prompt encoder: a folder with text_encoder/ and tokenizer/.",
    "image_encoder": "CLIP vision encoder, for Wan2.1-I2V.",
    "embeddings": "Ready embeddings (safetensors) in place of the encoders.",
}
ALIASES = {"vae2": ("--vae",)}  # the one whose frames are seen


class Size(click.ParamType):
    """WIDTHxHEIGHT."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        width, _, height = str(value).lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            self.fail(f"got {value!r}, want WIDTHxHEIGHT such as 512x320", param, ctx)
        return int(width), int(height)


class Device(click.ParamType):
    """auto, cpu, cuda or cuda:N."""

    name = "DEVICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", str(value)):
            self.fail(f"got {value!r}, want auto, cpu, cuda or cuda:N", param, ctx)
        return str(value)


class LoraOption(click.ParamType):
    """STAGE=PATH or STAGE=PATH@STRENGTH."""

    name = "STAGE=PATH[@STRENGTH]"
    stages = ("stage1", "stage1_low", "stage2")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Lora]:
        if isinstance(value, tuple):
            return value
        stage, _, rest = str(value).partition("=")
        path, at, strength = rest.rpartition("@")
        if not at:
            path, strength = rest, "1"
        try:
            number = float(strength)
        except ValueError:
            self.fail(f"got strength {strength!r} in {value!r}, want a number", param, ctx)
        if stage not in self.stages or not path:
            self.fail(
                f"got {value!r}, want STAGE=PATH[@STRENGTH] with STAGE one of {', '.join(self.stages)}", param, ctx
            )
        return stage, (Path(path), number)


REUSE_HELP = (
    "Later steps of a segment reuse the keys and values that clean blocks had in its first: with 4 steps over a "
    "quarter less work in denoising. An approximation; what it costs is in docs/BENCHMARKS.md."
)


def profile_options(command: Callable) -> Callable:
    """The options that choose and change a profile."""
    options = [
        click.option("--profile", "profile_name", default="nano", show_default=True, help=f"{', '.join(PROFILES)}."),
        click.option("--frames", type=int, help="Length, 4k+1 frames."),
        click.option("--size", type=Size(), help="Final size in pixels, such as 160x256 for an upright photo."),
        click.option("--noisy", type=int, help="M: latent blocks made at once."),
        click.option("--neighbours", type=int, help="N: clean blocks before them."),
        click.option("--stage1-steps", type=int, help="Steps of Stage I."),
        click.option("--stage2-steps", type=int, help="Steps of Stage II."),
        click.option("--shift", type=float, help="Shift of both schedules."),
        click.option("--stage1-guidance", type=float, help="Classifier-free guidance of Stage I; 1 is off."),
        click.option("--stage2-guidance", type=float, help="Classifier-free guidance of Stage II; 1 is off."),
        click.option(
            "--stage2-init",
            type=click.Choice(["noise", "reference"]),
            help="Start Stage II from noise, or from the noised reference (for a plain 48-channel TI2V-5B).",
        ),
        click.option("--reuse-context", is_flag=True, default=None, help=REUSE_HELP),
        click.option("--strength", type=float, help="Noise level at which --stage2-init reference starts, 0 to 1."),
    ]
    return _apply(options, command)


def model_options(command: Callable) -> Callable:
    """The options that say where the weights are."""
    options = [
        click.option("--model-dir", type=PATH, help="Folder with stage1, stage2, vae1, vae2 and text."),
        *(
            click.option(f"--{name.replace('_', '-')}", *ALIASES.get(name, ()), name, type=PATH, help=text)
            for name, text in MODEL_OPTIONS.items()
        ),
        click.option("--lora", "loras", type=LoraOption(), multiple=True, help="Merge a LoRA; may be repeated."),
    ]
    return _apply(options, command)


def _apply(options: list, command: Callable) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command


# What options and the C API change of a profile.
PROFILE_KEYS = (
    "frames", "size", "noisy", "neighbours", "stage1_steps", "stage2_steps", "shift", "stage1_guidance",
    "stage2_guidance", "reuse_context", "stage2_init", "strength",
)  # fmt: skip


def make_profile(name: str | Profile, overrides: dict[str, Any]) -> Profile:
    """The profile, by its name or itself, with the overrides that are not None."""
    later = {key: overrides.pop(key) for key in ("stage2_init", "strength")}
    profile = (get_profile(name) if isinstance(name, str) else name).override(**overrides)
    return replace(profile, **{key: value for key, value in later.items() if value is not None})


def make_paths(options: dict[str, Any], loras: tuple[tuple[str, Lora], ...]) -> ModelPaths:
    """Model paths from the single options; LoRAs are grouped by stage, in the order given."""
    grouped = {stage: tuple(lora for name, lora in loras if name == stage) for stage in dict(loras)}
    return ModelPaths(**{name: options[name] for name in MODEL_OPTIONS}, loras=grouped)


def pick_device(name: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype; `auto` takes CUDA where there is one, and bf16 where the device computes in it."""
    kind, _, number = (("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name).partition(":")
    # Compared as it is written: torch keeps the number in 8 bits, in which 256 is 0.
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise EnvironmentMismatch(f"device: got {name}, want one this machine has; use --device cpu")
    device = torch.device(kind, int(number)) if number else torch.device(kind)
    return device, best_dtype(device) if dtype == "auto" else DTYPES[dtype]


def cache_folder() -> Path:
    """Where caches go: $SWIFTI2V_CACHE, else swifti2v in the user's cache folder."""
    return backend_cache.cache_folder(os.environ)
