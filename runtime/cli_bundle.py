"""Which bundle a run uses, and what is said about it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import quote

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from ..engine.manifest import Recipe, read_bundle
from ..engine.plain import to_plain
from ..engine.profile import Profile
from ..engine.spec import TensorSpec
from .backend_cache import keep_folder
from .backend_fit import device_of
from .backend_registry import find_backend
from .backend_weights import origin_of
from .bundle import find_bundle, load_bundle
from .cli_kernels import show_kernels
from .cli_options import DTYPES, cache_folder
from .devices import best_dtype
from .fused import TABLE as KERNELS
from .inspection import describe_kernels
from .model_paths import NEEDED, SHIPPED, ModelPaths, find_models, fit_profile
from .models import Loaded, load_models

COMPILERS = ("c++", "g++", "clang++")


def base_profile(context: click.Context, name: str, bundle: Path | None) -> str | Profile:
    """The profile that options change: the named one, or the bundle's where none was named."""
    if bundle is None or context.get_parameter_source("profile_name") != ParameterSource.DEFAULT:
        return name
    return read_bundle(bundle).manifest.profile


def bundle_device(bundle: Path | None, device: str, dtype: str) -> str:
    """The device option, where `auto` is the bundle's own kind. Refuses a dtype that the bundle does not have."""
    if bundle is None:
        return device
    opened = read_bundle(bundle)
    if dtype not in ("auto", opened.manifest.precision):
        raise click.UsageError(
            f"--dtype: got {dtype}, want {opened.manifest.precision}, which {bundle} was built in; leave it out"
        )
    return device_of(opened).type if device == "auto" else device


def bundle_paths(profile: Profile, folder: Path | None, single: ModelPaths, bundle: Path | None) -> ModelPaths:
    """Where the models are. A bundle needs the encoders alone, so those may be given without DiTs and VAEs."""
    alone = folder is None and not any(name in single.given for name in NEEDED)
    if bundle is not None and alone and not (SHIPPED / profile.name).is_dir():
        return single
    return find_models(profile, folder, single)


def default_bundle(
    profile: Profile, paths: ModelPaths, device: torch.device, dtype: str, console: Console
) -> Path | None:
    """The bundle in the user's cache that fits. Where none does, says that eager runs and how to compile."""
    fitted = fit_profile(profile, paths)
    wanted = None if dtype == "auto" else DTYPES[dtype]
    found, reason = find_bundle(cache_folder(), fitted, paths, device, wanted)
    if found is None:
        console.print(_eager_note(fitted, paths, device, dtype, reason), style="yellow")
    return found


def open_models(
    bundle: Path | None, profile: Profile, paths: ModelPaths, device: torch.device, dtype: torch.dtype
) -> Loaded:
    """The models of a run: those of the bundle, or eager ones."""
    if bundle is None:
        return load_models(profile, paths, device, dtype, cache_folder())
    return load_bundle(bundle, profile, paths, device, cache_folder())


def backend_words(loaded: Loaded) -> str:
    if loaded.bundle is None:
        return "eager PyTorch"
    return f"{loaded.backend}, {loaded.bundle.folder}"


def show_bundle(path: Path, as_json: bool) -> None:
    """Print a bundle's manifest on stdout, as a table or as JSON. The artifacts are not looked at."""
    manifest, kernels = read_bundle(path).manifest, keep_folder(path) / KERNELS
    if as_json:
        result = {"kind": "bundle", "digest": manifest.digest, **to_plain(manifest)}
        result["kernels"] = describe_kernels(kernels)
        click.echo(json.dumps({"ok": True, "exit_code": 0, "result": {path.absolute().name: result}}))
        return
    click.echo(f"{path}: {manifest.profile.name}, {manifest.backend}, {manifest.precision}, built for {manifest.arch}")
    said = {"weights": manifest.weights.source, **manifest.versions, **manifest.built_with}
    click.echo(", ".join(f"{name} {value}" for name, value in said.items()))
    table = Table("graph", "shape", "dtype", "size", "arch", "parity error")
    for name, record in manifest.graphs.items():
        given, made = record.spec.inputs[0], record.spec.outputs[0]
        shape = f"{_shape(given)} -> {_shape(made)}"
        dtype = str(made.dtype).removeprefix("torch.")
        parity = "not run here" if record.parity is None else f"{record.parity:.1e}"
        table.add_row(name, shape, dtype, f"{record.bytes:,}", manifest.arch, parity)
    console = Console()
    wide = console.options.update(width=1000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)  # no pipe is too narrow for it
    console.print(table)
    show_kernels(kernels)


def _shape(tensor: TensorSpec) -> str:
    return f"{tensor.name} {'x'.join(map(str, tensor.shape))}"


def _eager_note(profile: Profile, paths: ModelPaths, device: torch.device, dtype: str, reason: str) -> str:
    """One line: why eager runs, and the command that compiles."""
    if reason:
        return f"note: eager PyTorch, as the last bundle does not fit: {reason}"
    narrow = dtype == "bf16" or (dtype == "auto" and best_dtype(device) == torch.bfloat16)
    backend = "inductor" if narrow and any(map(shutil.which, COMPILERS)) else "onnxruntime"
    has = find_backend(backend).precisions(device)
    if not has or dtype not in ("auto", *has):
        return f"note: eager PyTorch, as there is no bundle of {profile.name} like this for {device.type}"
    precision = has[0] if dtype == "auto" else dtype
    arch = find_backend(backend).arch(device) if device.type == "cuda" else ""
    command = Recipe(profile, backend, precision, origin_of(replace(paths, loras={})), arch).command()
    loras = [(name, file, strength) for name in paths.loras for file, strength in paths.loras[name]]
    command += "".join(f" --lora {quote(f'{name}={file}@{strength:g}')}" for name, file, strength in loras)
    return f"note: eager PyTorch; {command} compiles this once, and later runs use it"
