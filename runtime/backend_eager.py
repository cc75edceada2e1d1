"""The eager backend: a graph's PyTorch module behind the Executable interface."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..engine.graphs import Graph, profile_graphs
from ..engine.manifest import Precision
from ..engine.profile import Profile
from ..engine.spec import Executable, Feed, GraphSpec, check_feed
from .devices import computes_bf16


class EagerExecutable:
    """One graph run by PyTorch. Donated inputs are updated in place, as the spec allows."""

    def __init__(self, graph: Graph, weights: nn.Module) -> None:
        self.spec: GraphSpec = graph.spec
        self._module: nn.Module | None = graph.build(weights, True)

    def __call__(self, feed: Feed) -> dict[str, Tensor]:
        check_feed(self.spec, feed)
        if self._module is None:
            raise RuntimeError(f"{self.spec.name}: called after close()")
        with torch.inference_mode():
            outputs = self._module(*(feed[tensor.name] for tensor in self.spec.inputs))
        return {tensor.name: output for tensor, output in zip(self.spec.outputs, outputs, strict=True)}

    def close(self) -> None:
        self._module = None


def open_eager(profile: Profile, weights: Mapping[str, nn.Module], dtype: torch.dtype) -> dict[str, Executable]:
    """An eager executable for every graph of the profile; `weights` are on their device already."""
    return {
        name: EagerExecutable(graph, weights[graph.weights]) for name, graph in profile_graphs(profile, dtype).items()
    }


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """What eager runs in, the best first."""
    return ("bf16", "fp32", "fp16") if computes_bf16(device) else ("fp32", "bf16", "fp16")


def versions() -> dict[str, str]:
    return {"torch": str(torch.__version__)}


def arch(device: torch.device) -> str:
    """Eager is compiled for nothing: any device of a kind will do."""
    return device.type


def open_graph(graph: Graph, module: nn.Module | None, files: tuple[Path, ...], device: torch.device) -> Executable:  # noqa: ARG001
    """The module itself: an eager bundle holds no code, only what it belongs to."""
    assert module is not None
    return EagerExecutable(graph, module)
