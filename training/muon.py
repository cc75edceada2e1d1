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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                state["average"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["average"], group["momentum"]).flatten(1)  # -> [out, in * ...]
                rows, columns = update.shape
                scale = max(1.0, rows / columns) ** 0.5  # so that outputs move as far, whatever the shape
                turned = orthogonal(update.to(self.dtype)).view_as(parameter)
                parameter.add_(turned.to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: singular values end within 0.7 .. 1.2."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(rounds):
        square = x @ x.T
        x = A * x + (B * square + C * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


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
