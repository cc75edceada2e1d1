"""From the options that `generate` and `render` share to open models."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from ..engine.profile import Profile
from .acceleration import KERNEL_CHOICES, KernelChoice, check_acceleration
from .cli_bundle import backend_words, base_profile, bundle_device, bundle_paths, default_bundle, open_models
from .cli_options import (
    PATH,
    PROFILE_KEYS,
    Device,
    cache_folder,
    make_paths,
    make_profile,
    model_options,
    pick_device,
    profile_options,
)
from .fingerprints import fingerprints
from .fused import accelerate
from .model_paths import ModelPaths, fit_profile
from .models import Loaded
from .sidecar import describe_profile, dtype_name


@dataclass(frozen=True)
class Choice:
    """What a command runs with; nothing is opened yet."""

    profile: Profile
    paths: ModelPaths
    device: torch.device
    dtype: torch.dtype
    dtype_option: str
    bundle: Path | None
    kernels: KernelChoice = "auto"
    cuda_graphs: bool = False

    def open(self, console: Console) -> tuple[Loaded, dict[str, str]]:
        """Open models, say what runs, and return them with their fingerprints."""
        bundle = self.bundle
        if bundle is None and self.kernels == "auto":  # who names kernels wants PyTorch to run them
            bundle = default_bundle(self.profile, self.paths, self.device, self.dtype_option, console)
        loaded = open_models(bundle, self.profile, self.paths, self.device, self.dtype)
        loaded = accelerate(loaded, self.kernels, self.cuda_graphs, cache_folder(), console.print)
        hashes = fingerprints(self.paths, loaded, cache_folder())
        _note_run(console, loaded)
        return loaded, hashes

    @property
    def fitted(self) -> Profile:
        """The profile with the sizes that the models have."""
        known = self.paths.trained or self.profile.text.kind == "words"
        return fit_profile(self.profile, self.paths) if known else self.profile

    def plan(self) -> dict[str, Any]:
        """What a dry run says of it."""
        missing = "untrained" if self.profile.text.kind == "words" else "none given"
        return {
            **describe_profile(self.fitted),
            "weights": {name: str(path) for name, path in self.paths.given.items()} or {"all": missing},
            "device": str(self.device),
            "dtype": dtype_name(self.dtype),
            "kernels": self.kernels if self.device.type == "cuda" else "eager",
            "cuda_graphs": self.cuda_graphs,
            **({} if self.bundle is None else {"bundle": str(self.bundle)}),
        }


def run_options(command: Callable) -> Callable:
    """Every option that `choose` reads."""
    for option in (
        click.option("--dtype", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), default="auto", show_default=True),
        click.option("--device", type=Device(), default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ..."),
        click.option(
            "--kernels", type=click.Choice(KERNEL_CHOICES), default="auto", show_default=True,
            help="Kernels of PyTorch's modules. auto: on a GPU each fused one that is no slower there, measured once.",
        ),
        click.option(
            "--cuda-graphs/--no-cuda-graphs", default=False, show_default=True,
            help="On a GPU, replay denoising steps instead of launching their kernels one by one.",
        ),
        click.option("--bundle", type=PATH, help="Run this compiled bundle; its profile is the default one then."),
        model_options,
        profile_options,
    ):  # fmt: skip
        command = option(command)
    return command


def choose(context: click.Context, options: dict[str, Any]) -> Choice:
    """The profile, paths, device and bundle that the options of `run_options` name."""
    bundle, device, dtype = options["bundle"], options["device"], options["dtype"]
    base = base_profile(context, options["profile_name"], bundle)
    profile = make_profile(base, {key: options[key] for key in PROFILE_KEYS})
    paths = bundle_paths(profile, options["model_dir"], make_paths(options, options["loras"]), bundle)
    place, number = pick_device(bundle_device(bundle, device, dtype), dtype)
    kernels, cuda_graphs = options["kernels"], options["cuda_graphs"]
    check_acceleration(kernels, cuda_graphs, place)
    return Choice(profile, paths, place, number, dtype, bundle, kernels, cuda_graphs)


def _note_run(console: Console, loaded: Loaded) -> None:
    profile = loaded.profile
    how = ", ".join(filter(None, (backend_words(loaded), loaded.acceleration.words)))
    console.print(
        f"{profile.name}: {profile.frames} frames of {profile.width}x{profile.height}, {loaded.device}, "
        f"{dtype_name(loaded.dtype)}, {how}"
    )
    if not loaded.trained:
        console.print(
            "note: no trained weights are there for this profile; these are untrained ones from a seed. "
            "Every step runs as it will with trained weights, but all frames after the first are noise.",
            style="yellow",
        )
