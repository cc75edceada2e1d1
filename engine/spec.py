"""What a graph takes and gives, and the one interface behind which every backend stands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import SpecError

Feed = Mapping[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a graph: static shape, dtype, and the meaning of each axis.

    A `donated` input is invalid after the call: the backend may update it in place.
    """

    name: str
    axes: str  # one letter or word per axis, separated by spaces: "B C T H W"
    shape: tuple[int, ...]
    dtype: torch.dtype
    donated: bool = False

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class GraphSpec:
    """Names, shapes and dtypes of a graph's inputs and outputs, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def donated_bytes(self) -> int:
        """What the caches take that a call renews."""
        return sum(tensor.bytes for tensor in self.inputs if tensor.donated)


class Executable(Protocol):
    """A graph that can be called; eager or compiled, the caller cannot tell.

    The feed has exactly the spec's names, shapes and dtypes. Equal inputs give equal outputs. Outputs belong to the
    caller. Work goes on the current stream and the call does not synchronise. `close` frees everything.
    """

    spec: GraphSpec

    def __call__(self, feed: Feed) -> dict[str, Tensor]: ...

    def close(self) -> None: ...


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor was donated to a call that has given its memory back."""
    return tensor.device.type != "meta" and tensor.untyped_storage().nbytes() == 0 < tensor.numel()


def check_feed(spec: GraphSpec, feed: Feed) -> None:
    """Refuse a feed that differs from the spec in names, shapes or dtypes."""
    want = {tensor.name: tensor for tensor in spec.inputs}
    if feed.keys() != want.keys():
        missing, extra = sorted(want.keys() - feed.keys()), sorted(feed.keys() - want.keys())
        raise SpecError(
            f"{spec.name} feed: got extra {extra}, missing {missing}, want exactly {list(want)}; fix the feed"
        )
    for name, tensor in want.items():
        got = feed[name]
        if tuple(got.shape) != tensor.shape or got.dtype != tensor.dtype:
            raise SpecError(
                f"{spec.name}.{name} [{tensor.axes}]: got {tuple(got.shape)} {got.dtype}, "
                f"want {tensor.shape} {tensor.dtype}; feed what the profile says"
            )
        if is_freed(got):
            raise SpecError(
                f"{spec.name}.{name}: got a tensor that was donated to an earlier call and freed, "
                "want what that call returned; feed that, or clone what is needed twice"
            )
