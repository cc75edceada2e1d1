"""Whether a bundle fits: this machine, a profile, weights. Each check says what differs and what repairs it."""

from collections.abc import Sequence
from itertools import zip_longest

import torch

from ..engine.errors import BundleError, EnvironmentMismatch
from ..engine.graphs import profile_graphs
from ..engine.manifest import Bundle, WeightsRecord
from ..engine.profile import Profile
from ..engine.spec import GraphSpec, TensorSpec
from .backend_gpu import arch_device
from .backend_registry import find_backend, versions_here


def device_of(bundle: Bundle) -> torch.device:
    """The kind of device that a bundle was built for."""
    return arch_device(bundle.manifest.arch)


def check_machine(bundle: Bundle, device: torch.device) -> None:
    """Refuse a bundle built for another architecture, or by other versions."""
    manifest = bundle.manifest
    arch = find_backend(manifest.backend).arch(device)
    if arch not in manifest.archs:
        said = manifest.recipe._replace(arch=arch).repair(bundle.folder)
        raise EnvironmentMismatch(
            f"{bundle.folder} arch: got a bundle for {manifest.arch}, want one for {arch}; {said}"
        )
    here = versions_here(manifest.backend)
    for name in sorted(here.keys() | manifest.versions.keys()):
        if manifest.versions.get(name) != here.get(name):
            raise EnvironmentMismatch(
                f"{bundle.folder} {name}: got a bundle built with {manifest.versions.get(name)}, "
                f"want {here.get(name)}, which is here; {bundle.repair}"
            )


def check_profile(bundle: Bundle, profile: Profile, names: Sequence[str] | None = None) -> None:
    """Refuse a bundle without the graphs of this profile, all of them or those named, or with other ones."""
    records = bundle.manifest.graphs
    graphs = profile_graphs(profile, bundle.manifest.dtype)
    missing = [name for name in graphs if name not in records and (names is None or name in names)]
    recipe = bundle.manifest.recipe._replace(profile=profile)
    if missing:
        said = recipe.repair(bundle.folder)
        raise BundleError(f"{bundle.folder}: got {len(records)} graphs, want {', '.join(missing)} too; {said}")
    for name, graph in graphs.items():
        if name in records and records[name].spec != graph.spec:
            got, want = _difference(records[name].spec, graph.spec)
            said = recipe.repair(bundle.folder)
            raise BundleError(f"{bundle.folder} {name}: got {got}, want {want} for this profile; {said}")


def check_weights(bundle: Bundle, record: WeightsRecord) -> None:
    """Refuse a bundle built from other weights than these."""
    built = bundle.manifest.weights
    for name in sorted(built.sha256.keys() | record.sha256.keys()):
        got, want = built.sha256.get(name), record.sha256.get(name)
        if got != want:
            said = bundle.manifest.recipe._replace(source=record.source).repair(bundle.folder)
            raise BundleError(
                f"{bundle.folder} weights of {name}: got a bundle of {built.source} ones, SHA-256 {got}, "
                f"want the {record.source} ones, {want}; use the weights and LoRAs it was built from, or {said}"
            )


def _difference(got: GraphSpec, want: GraphSpec) -> tuple[str, str]:
    """The first tensor in which two specs differ, in both."""
    pairs = zip_longest((*got.inputs, *got.outputs), (*want.inputs, *want.outputs))
    one, other = next(pair for pair in pairs if pair[0] != pair[1])
    return _words(one), _words(other)


def _words(tensor: TensorSpec | None) -> str:
    return "no tensor" if tensor is None else f"{tensor.name} {list(tensor.shape)} {tensor.dtype}"
