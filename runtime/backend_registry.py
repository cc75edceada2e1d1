"""The backends that run a bundle's artifacts, one line each. export/builders.py has those that build them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import __version__
from ..engine.errors import EnvironmentMismatch
from ..engine.graphs import Graph
from ..engine.manifest import Precision
from ..engine.spec import Executable
from . import backend_eager, backend_inductor, backend_onnxruntime
from .backend_tensorrt import TensorRTBackend

ROOT = Path(__file__).resolve().parent.parent
# What makes a graph out of weights: an artifact is stale when these files change.
CODE = ("engine/dit.py", "engine/graphs.py", "engine/vae.py", "engine/vae_layers.py", "kernels/*.py")

# (graph, its weights' module where the backend runs it, the artifacts, device)
OpenGraph = Callable[[Graph, nn.Module | None, tuple[Path, ...], torch.device], Executable]


@dataclass(frozen=True)
class Backend:
    """What a backend can run here, and how.

    `precisions` of a device, the usual one first, are none where the backend does not run there. `versions` and `arch`
    are what a bundle must have been built with, equal to the letter.
    """

    precisions: Callable[[torch.device], tuple[Precision, ...]]
    versions: Callable[[], dict[str, str]]
    arch: Callable[[torch.device], str]
    open_graph: OpenGraph
    runs_modules: bool = False  # whether it needs the weights beside its artifacts


RTX, TENSORRT = TensorRTBackend("tensorrt_rtx"), TensorRTBackend("tensorrt")

BACKENDS = {
    "eager": Backend(
        backend_eager.precisions, backend_eager.versions, backend_eager.arch, backend_eager.open_graph, True
    ),
    "inductor": Backend(
        backend_inductor.precisions, backend_inductor.versions, backend_inductor.arch, backend_inductor.open_graph
    ),
    "onnxruntime": Backend(
        backend_onnxruntime.precisions,
        backend_onnxruntime.versions,
        backend_onnxruntime.arch,
        backend_onnxruntime.open_graph,
    ),
    "tensorrt": Backend(TENSORRT.precisions, TENSORRT.versions, TENSORRT.arch, TENSORRT.open_graph),
    "torch-tensorrt": Backend(TENSORRT.precisions, TENSORRT.versions, TENSORRT.arch, TENSORRT.open_graph),
    "tensorrt-rtx": Backend(RTX.precisions, RTX.versions, RTX.arch, RTX.open_graph),
}


def find_backend(name: str) -> Backend:
    """The backend of that name."""
    if name not in BACKENDS:
        raise EnvironmentMismatch(f"backend: got {name!r}, want one of {', '.join(BACKENDS)}; update swifti2v")
    return BACKENDS[name]


def versions_here(name: str) -> dict[str, str]:
    """What must be equal where a bundle of this backend is built and where it runs."""
    return {"swifti2v": __version__, "model code": code_digest(), **find_backend(name).versions()}


def code_digest() -> str:
    """Twelve hex digits of the source that graphs are made by."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
