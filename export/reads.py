"""Which parameters a graph reads, seen by running it on meta tensors: nothing is loaded and nothing computed."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..engine.graphs import Graph, new_module, profile_graphs
from ..engine.profile import Profile


def meta_modules(profile: Profile, graphs: Iterable[Graph], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Modules without memory for these graphs, by the graphs' weights names."""
    with torch.device("meta"):
        modules = {name: new_module(profile, name) for name in {graph.weights: None for graph in graphs}}
    for module in modules.values():
        for parameter in module.parameters():  # buffers stay fp32
            parameter.data = parameter.data.to(dtype)
    return modules


def read_parameters(graph: Graph, weights: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module on meta that operations of the graph take, by name."""
    module = graph.build(weights, False)
    feed = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in graph.spec.inputs]
    with torch.inference_mode(), _Watch(weights) as watch:
        module(*feed)
    return watch.read


@lru_cache(maxsize=8)
def read_names(profile: Profile, dtype: torch.dtype) -> dict[str, frozenset[str]]:
    """By graph, the names of the parameters that it reads."""
    graphs = profile_graphs(profile, dtype)
    modules = meta_modules(profile, graphs.values(), dtype)
    return {name: frozenset(read_parameters(graph, modules[graph.weights])) for name, graph in graphs.items()}


class _Watch(TorchDispatchMode):
    """Notes which parameters of a module operations take."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._known = {id(parameter): (name, parameter) for name, parameter in module.named_parameters()}
        self.read: dict[str, nn.Parameter] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read.update(self._known[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._known)
        return func(*args, **(kwargs or {}))
