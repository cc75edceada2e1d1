"""Graphs run through torch.compile in this process: for comparison only, nothing of it can be kept in a bundle."""

import torch
from torch import Tensor, nn

from ..engine.errors import EnvironmentMismatch
from ..engine.graphs import Graph
from ..engine.spec import Feed, GraphSpec, check_feed


class CompiledExecutable:
    """One graph compiled whole: a part that does not compile is an error, not a slower run."""

    def __init__(self, graph: Graph, weights: nn.Module, mode: str | None = None) -> None:
        self.spec: GraphSpec = graph.spec
        self._module = torch.compile(graph.build(weights, False), fullgraph=True, dynamic=False, mode=mode)

    def __call__(self, feed: Feed) -> dict[str, Tensor]:
        from torch._dynamo.exc import TorchDynamoException  # a second to import, for whoever compiles

        check_feed(self.spec, feed)
        with torch.inference_mode():
            try:
                outputs = self._module(*(feed[tensor.name] for tensor in self.spec.inputs))
            except TorchDynamoException as error:
                reason = " ".join(str(error).split())[:200]
                raise EnvironmentMismatch(
                    f"torch.compile of {self.spec.name}: got '{reason}', want a compiled graph; "
                    "install g++ (on a GPU: triton), or leave out --compile"
                ) from error
        return {tensor.name: output for tensor, output in zip(self.spec.outputs, outputs, strict=True)}

    def close(self) -> None:
        torch._dynamo.reset()
