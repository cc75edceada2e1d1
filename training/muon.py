"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024).

For the weights of linear layers and convolutions; everything else is AdamW's. torch.optim.Muon takes matrices only,
and most of a VAE's weights are convolutions.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Of the quintic iteration that moves all singular values into 0.7 .. 1.2 within five rounds; Jordan et al.
A, B, C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised in `dtype`; a kernel [out, in, ...] counts as the matrix [out, in * ...]."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(tuple(parameter.shape), []).append(parameter)
            for parameters in alike.values():  # together: on a GPU a small matrix costs its launches
                self._step(parameters, group["lr"], group["momentum"])

    def _step(self, parameters: list[nn.Parameter], lr: float, momentum: float) -> None:
        """One update of parameters of one shape."""
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["average"] = torch.zeros_like(parameter)
            state["average"].lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(state["average"], momentum).flatten(1))  # -> [out, in * ...]
        rows, columns = updates[0].shape
        scale = max(1.0, rows / columns) ** 0.5  # so that outputs move as far, whatever the shape
        for parameter, turned in zip(parameters, orthogonal(torch.stack(updates).to(self.dtype)), strict=True):
            parameter.add_(turned.view_as(parameter).to(parameter.dtype), alpha=-lr * scale)


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, roughly: singular values end within 0.7 .. 1.2.

    [..., rows, columns], each by itself.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = A * x + (B * square + C * square @ square) @ x
    return x.mT if tall else x


def layer_weights(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The trained weights of linear layers and convolutions that are matrices of more than one row and column."""
    found = []
    for root in modules:
        for module in root.modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) or not module.weight.requires_grad:
                continue
            if min(module.weight.flatten(1).shape) > 1:
                found.append(module.weight)
    return found
