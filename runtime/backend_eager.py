"""The eager backend: a graph's PyTorch module behind the Executable interface."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..engine.graphs import Graph, profile_graphs
from ..engine.profile import Profile
from ..engine.spec import Executable, Feed, GraphSpec, check_feed


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
