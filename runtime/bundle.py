"""Bundles at run time: which one fits this machine, profile and weights, and its executables.

Nothing here falls back: a bundle that was asked for runs or is refused, with what differs and what repairs it.
"""

from pathlib import Path

import torch

from ..engine.errors import BundleError, EnvironmentMismatch, SwiftError
from ..engine.graphs import profile_graphs
from ..engine.manifest import check_artifacts, read_bundle
from ..engine.profile import Profile
from ..engine.spec import Executable
from .backend_cache import bundle_folders
from .backend_fit import check_machine, check_profile, check_weights, device_of
from .backend_registry import find_backend
from .backend_weights import weights_record
from .model_paths import ModelPaths, find_models, fit_profile
from .models import Loaded, load_encoders, load_modules, untrained_models


def load_bundle(
    folder: Path | str,
    profile: Profile | None = None,
    paths: ModelPaths | None = None,
    device: torch.device | str | None = None,
    cache: Path | None = None,
) -> Loaded:
    """A bundle that fits, and the encoders beside it; the weights of compiled graphs are not loaded.

    `profile` None is the bundle's own; another one may differ in what does not enter the graphs, such as steps.
    `paths` None are the weights shipped for it. Paths of DiTs and VAEs are compared with what the bundle was built
    from. BundleError or EnvironmentMismatch for a bundle that cannot be run as asked.
    """
    bundle = read_bundle(Path(folder))
    manifest = bundle.manifest
    device = device_of(bundle) if device is None else torch.device(device)
    check_machine(bundle, device)
    profile = profile or manifest.profile
    paths = find_models(profile) if paths is None else paths
    if paths.trained:
        profile = fit_profile(profile, paths)
    check_profile(bundle, profile)
    needs_modules = find_backend(manifest.backend).runs_modules
    untrained = manifest.weights.source == "untrained"
    if not (paths.trained or untrained) and (needs_modules or not (paths.text or paths.embeddings)):
        what = "weights" if needs_modules else "prompt encoder"
        raise BundleError(f"{what} of {bundle.folder}: got none, want those it was built with; pass --model-dir")
    if any(paths.loras.values()) and not paths.trained:
        raise BundleError(
            f"LoRAs for {bundle.folder}: got some, and no DiTs to merge them into, want both, as they tell whether the "
            "bundle was built so; pass --model-dir, or leave --lora out"
        )
    if paths.trained or untrained:
        check_weights(bundle, weights_record(profile, paths, cache))
    check_artifacts(bundle)
    if untrained:
        loaded = untrained_models(profile, manifest.dtype, device)
        modules = loaded.modules if needs_modules else {}
        return Loaded(profile, modules, loaded.prompts, device, manifest.dtype, trained=False, bundle=bundle)
    prompts, image_encoder = load_encoders(profile, paths, device, manifest.dtype, cache)
    modules = load_modules(paths, device, manifest.dtype) if needs_modules else {}
    return Loaded(profile, modules, prompts, device, manifest.dtype, image_encoder, bundle=bundle)


def open_graphs(loaded: Loaded) -> dict[str, Executable]:
    """An executable for every graph of the profile, from the artifacts of the loaded bundle."""
    bundle = loaded.bundle
    assert bundle is not None
    backend = find_backend(bundle.manifest.backend)
    opened: dict[str, Executable] = {}
    try:
        for name, graph in profile_graphs(loaded.profile, loaded.dtype).items():
            module = loaded.modules.get(graph.weights)
            opened[name] = backend.open_graph(graph, module, bundle.files(name), loaded.device)
    except BaseException:
        for executable in opened.values():
            executable.close()
        raise
    return opened


def find_bundle(
    cache: Path, profile: Profile, paths: ModelPaths, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[Path | None, str]:
    """The bundle last built for this profile, weights and machine in the user's cache, or None and why there is none.

    `dtype` None takes any but fp8. Only manifests are read; `load_bundle` looks at the rest.
    """
    if not paths.trained and profile.text.kind != "words":  # too large to be built untrained, for a fingerprint
        return None, ""
    reason, record = "", None
    for folder in bundle_folders(cache, profile.name):
        try:
            bundle = read_bundle(folder)
            check_profile(bundle, profile)
            record = record or weights_record(profile, paths, cache)
            check_weights(bundle, record)
        except SwiftError:  # another length, other weights: not the one that is looked for
            continue
        if dtype not in (None, bundle.manifest.dtype) or device_of(bundle).type != device.type:
            continue
        if bundle.manifest.precision == "fp8":  # gives other pictures: runs only where it is named
            continue
        try:
            check_machine(bundle, device)
        except EnvironmentMismatch as error:
            reason = reason or str(error)
        else:
            return folder, ""
    return None, reason
