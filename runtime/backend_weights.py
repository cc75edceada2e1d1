"""What backends are built from and checked against: the modules of a profile, and a record of which weights they have.

The record is made from the files, without loading a model, wherever there are files.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..engine.manifest import PRECISIONS, Origin, Precision, WeightsRecord
from ..engine.profile import Profile
from ..engine.weights import fingerprint
from .fingerprints import known_fingerprint
from .model_paths import SHIPPED, ModelPaths, find_models, fit_profile, path_of
from .models import load_modules, untrained_models, weight_entries


@dataclass(frozen=True)
class Source:
    """What a bundle is built from: modules of one precision on one device, and the profile with their sizes."""

    profile: Profile
    modules: dict[str, nn.Module]
    record: WeightsRecord
    precision: Precision
    device: torch.device


def open_source(
    profile: Profile,
    folder: Path | None = None,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    single: ModelPaths | None = None,
) -> Source:
    """The modules in a model folder; without one the shipped weights, or untrained ones where none are shipped.

    `single` paths go before the folder's, and its LoRAs are merged. `cache` is a folder where fingerprints of
    checkpoints are kept.
    """
    device, dtype = torch.device(device), PRECISIONS[precision]
    paths = find_models(profile, folder, single)
    profile = fit_profile(profile, paths)
    made = load_modules(paths, device, dtype) if paths.trained else untrained_models(profile, dtype, device).modules
    return Source(profile, made, weights_record(profile, paths, cache), precision, device)


def weights_record(profile: Profile, paths: ModelPaths, cache: Path | None = None) -> WeightsRecord:
    """SHA-256 of the weights of every graph, merged LoRAs included."""
    if not paths.trained:
        untrained = untrained_models(profile, torch.float32, torch.device("cpu"))
        return WeightsRecord("untrained", {name: _module_sha256(module) for name, module in untrained.modules.items()})
    known = {name: _checkpoint_sha256(paths, entry, cache) for name, entry in weight_entries(paths).items()}
    return WeightsRecord(origin_of(paths), known)


def origin_of(paths: ModelPaths) -> Origin:
    """Whose weights these are, as far as a command line has to say it."""
    if not paths.trained:
        return "untrained"
    shipped = all(path.is_relative_to(SHIPPED) for path in paths.given.values())
    return "shipped" if shipped and not any(paths.loras.values()) else "given"


def _checkpoint_sha256(paths: ModelPaths, entry: str, cache: Path | None) -> str:
    def known(path: Path) -> str:
        return fingerprint(path) if cache is None else known_fingerprint(path, cache)

    base = known(path_of(paths, entry))
    loras = [(known(path), strength) for path, strength in paths.loras.get(entry, ()) if strength]
    return hashlib.sha256(json.dumps([base, loras]).encode()).hexdigest() if loras else base


def _module_sha256(module: nn.Module) -> str:
    """Of weights that no file holds: names, dtypes, shapes, bytes and configuration."""
    digest = hashlib.sha256(f"{module.config!r}\n".encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)  # [...] -> [bytes]
    return digest.hexdigest()
