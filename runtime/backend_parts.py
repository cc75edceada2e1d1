"""A graph compiled in parts, run one after another, without a second copy of its caches."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..engine.spec import GraphSpec

Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


class Part(Protocol):
    """A part of a graph: the names that it reads and makes, and what each is."""

    @property
    def inputs(self) -> Sequence[str]: ...
    @property
    def outputs(self) -> Sequence[str]: ...
    @property
    def tensors(self) -> Mapping[str, Kind]: ...

    def run(self, given: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
        """Compute `made`, which is new memory, from `given`."""
        ...


def run_parts(
    parts: Sequence[Part], spec: GraphSpec, feed: dict[str, Tensor], names: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """The tensors of these names, from the feed, which is emptied as it is used up.

    What no later part reads goes back to PyTorch at once, donated inputs too, which are empty after the call: their
    holder knows that they are invalid. So caches cost their own memory and what one part makes of them, not twice it.
    """
    donated = {tensor.name for tensor in spec.inputs if tensor.donated}
    last = {name: index for index, part in enumerate(parts) for name in part.inputs}
    last |= {name: len(parts) for name in names}
    for index, part in enumerate(parts):
        made = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in part.tensors.items()
            if name in part.outputs
        }
        part.run({name: feed[name] for name in part.inputs}, made)
        feed |= made
        for name in [name for name in feed if last.get(name, -1) <= index]:
            tensor = feed.pop(name)
            _release(tensor, name in donated and all(other is not tensor for other in feed.values()))
    return {name: feed[name] for name in names}


def _release(tensor: Tensor, donated: bool) -> None:
    """Free the memory of a donated tensor, whoever else holds it, unless it is part of something larger."""
    storage = tensor.untyped_storage()
    if donated and storage.nbytes() == tensor.nbytes and storage.resizable():
        storage.resize_(0)


def check_parts(parts: Sequence[Part], spec: GraphSpec, names: Sequence[str]) -> str | None:
    """What is wrong with parts that should take what the graph takes and make these names; None if nothing is."""
    want: dict[str, Kind] = {tensor.name: (tensor.shape, tensor.dtype) for tensor in spec.inputs}
    want |= {name: (t.shape, t.dtype) for name, t in zip(names, spec.outputs, strict=True)}
    got: dict[str, Kind] = {}
    for part in parts:
        got |= part.tensors
    made = {name for part in parts for name in part.outputs}
    wrong = [name for name, kind in want.items() if got.get(name) != kind]
    wrong += [name for part in parts for name in part.inputs if name not in want and name not in made]
    return f"{wrong[0]} {got.get(wrong[0])}, want {want.get(wrong[0])}" if wrong else None
