"""The ways to run one profile that are timed beside each other, and proof that each graph ran the way it says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..engine.errors import BundleError, ProfileError
from ..engine.graphs import Graph, profile_graphs
from ..engine.manifest import EAGER_PRECISIONS, read_bundle
from ..engine.profile import Profile
from ..engine.spec import Executable, Feed, GraphSpec
from ..runtime.backend_eager import EagerExecutable
from ..runtime.bundle import load_bundle, open_graphs
from ..runtime.frame_copy import FrameCopier
from ..runtime.sidecar import dtype_name
from .backend_compile import CompiledExecutable
from .models import Models

OpenGraph = Callable[[Graph], Executable]
Around = Callable[[Executable], Executable]
SHORT = {dtype: name for name, dtype in EAGER_PRECISIONS.items()}


class Witness:
    """An executable that counts its calls and refuses results of another device than was asked for."""

    def __init__(self, executable: Executable, device: torch.device) -> None:
        self.spec: GraphSpec = executable.spec
        self.backend = backend_of(executable)
        self.calls = 0
        self._executable, self._device = executable, device

    def __call__(self, feed: Feed) -> dict[str, Tensor]:
        outputs = self._executable(feed)
        self.calls += 1
        for name, tensor in outputs.items():
            if tensor.device.type != self._device.type:
                raise BundleError(
                    f"{self.spec.name}.{name}: got a result on {tensor.device.type}, want {self._device.type}; "
                    "the graph did not run where it was asked to, build the bundle for this device"
                )
        return outputs

    def close(self) -> None:
        self._executable.close()


class Graphs(Mapping[str, Executable]):
    """Executables by name, each opened when it is first asked for: a case reads a few of them.

    `around` is put around every one, outside its witness, which so sees what is captured and not what is replayed.
    """

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        open_one: OpenGraph,
        device: torch.device,
        around: Around | None = None,
    ) -> None:
        self._graphs, self._open, self._device = graphs, open_one, device
        self._around = around or (lambda graph: graph)
        self._witnesses: dict[str, Witness] = {}
        self._opened: dict[str, Executable] = {}

    def __getitem__(self, name: str) -> Executable:
        if name not in self._opened:
            self._witnesses[name] = Witness(self._open(self._graphs[name]), self._device)
            self._opened[name] = self._around(self._witnesses[name])
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def opened(self) -> dict[str, Witness]:
        return dict(self._witnesses)

    def close(self) -> None:
        """Close what was opened, with what is around it."""
        for graph in self._opened.values():
            graph.close()


@dataclass
class Variant:
    """One way to run a profile: `backend` is what its graphs are asked to run on."""

    name: str
    backend: str
    dtype: torch.dtype
    profile: Profile
    graphs: Graphs
    digest: str = ""  # of a bundle
    copier: FrameCopier | None = None  # that takes frames to the host, None for the plain one

    def check(self) -> dict[str, str]:
        """The backend of every graph that ran. BundleError for one that ran on another than was asked for."""
        ran = {name: graph for name, graph in self.graphs.opened().items() if graph.calls}
        check_backends(ran, self.backend)
        return {name: graph.backend for name, graph in ran.items()}

    def close(self) -> None:
        self.graphs.close()


def backend_of(executable: Executable) -> str:
    """What an executable is: the backend whose module its class stands in (`runtime/backend_NAME.py`)."""
    return type(executable).__module__.rpartition(".backend_")[2]


def check_backends(graphs: Mapping[str, Witness], backend: str) -> None:
    """Refuse executables of another backend."""
    for name, graph in graphs.items():
        if graph.backend != backend:
            raise BundleError(
                f"{name}: got a graph that ran on {graph.backend or 'an unknown backend'}, want {backend}; "
                "a time of it would be another backend's, build the bundle again"
            )


def eager_variant(
    models: Models, dtype: torch.dtype, profile: Profile | None = None, around: Around | None = None
) -> Variant:
    """PyTorch as it is, in one dtype; `profile` may differ from the models' in length and window.

    `around` is what Graphs puts around each of its executables.
    """
    profile = profile or models.profile

    def open_one(graph: Graph) -> Executable:
        return EagerExecutable(graph, models.module(graph.weights, dtype))

    graphs = Graphs(profile_graphs(profile, dtype), open_one, models.device, around)
    return Variant(f"eager_{SHORT[dtype]}", "eager", dtype, profile, graphs)


def compiled_variant(models: Models, dtype: torch.dtype, mode: str | None = None) -> Variant:
    """torch.compile in one dtype; compiling is part of the first call."""

    def open_one(graph: Graph) -> Executable:
        return CompiledExecutable(graph, models.module(graph.weights, dtype), mode)

    graphs = Graphs(profile_graphs(models.profile, dtype), open_one, models.device)
    suffix = "" if mode is None else f"_{mode.replace('-', '_')}"
    return Variant(f"compile_{SHORT[dtype]}{suffix}", "compile", dtype, models.profile, graphs)


def bundle_variant(models: Models, folder: Path, backend: str | None, cache: Path) -> Variant:
    """A compiled bundle. BundleError where it is not of the backend asked for, or of other weights than the models."""
    manifest = read_bundle(folder).manifest
    if backend is not None and manifest.backend != backend:
        raise BundleError(
            f"{folder}: got a bundle of {manifest.backend}, want {backend}; "
            f"pass a bundle that is built with --backend {backend}"
        )
    loaded = load_bundle(folder, models.profile, models.paths, models.device, cache)
    opened = open_graphs(loaded)
    graphs = Graphs(profile_graphs(loaded.profile, loaded.dtype), lambda graph: opened[graph.spec.name], models.device)
    name = f"{manifest.backend}_{manifest.precision}"
    return Variant(name, manifest.backend, loaded.dtype, loaded.profile, graphs, manifest.digest)


def distinct(variants: Sequence[Variant]) -> dict[str, Variant]:
    """Variants by name, at least one and none twice."""
    names = [variant.name for variant in variants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise ProfileError(
            f"variants: got {', '.join(twice) or 'none'}{' twice' if twice else ''}, want each once; "
            "change --dtype or --bundle"
        )
    return dict(zip(names, variants, strict=True))


def describe_variant(variant: Variant) -> dict[str, object]:
    """What a variant is, and what its graphs ran on."""
    return {
        "backend": variant.backend,
        "dtype": dtype_name(variant.dtype),
        "bundle": variant.digest or None,
        "ran_on": variant.check(),
    }
