"""Low-rank adaptation of a DiT: pairs beside its Linear layers, saved in a layout that engine/lora.py merges."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..engine.dit import DiT
from ..engine.errors import WeightsError
from ..engine.layouts import is_rotary
from ..engine.rope import half_split_order

# Attention and feed-forward of every block: what DiffSynth and LightX2V adapt.
TARGETS = r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])"


class Pair(nn.Module):
    """scale * up(down(x)); `up` starts at zero, so training starts from the model itself."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, rank, bias=False, device=layer.weight.device)
        self.up = nn.Linear(rank, layer.out_features, bias=False, device=layer.weight.device)
        nn.init.zeros_(self.up.weight)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.down(x.to(self.down.weight.dtype)))


class Lora(nn.Module):
    """Pairs for the Linear layers of a DiT whose names match `targets`; while it lives, the DiT computes with them.

    The pairs are fp32 whatever the DiT's dtype. The DiT itself is frozen. `remove` takes them off again.
    """

    def __init__(self, dit: DiT, rank: int = 32, alpha: float = 32.0, targets: str = TARGETS) -> None:
        super().__init__()
        self.config, self.alpha = dit.config, alpha
        layers = {n: m for n, m in dit.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(targets, n)}
        if not layers:
            raise WeightsError(f"LoRA targets: got {targets!r}, want a pattern of layer names; try {TARGETS!r}")
        dit.requires_grad_(False)
        # A module's name may hold no dot.
        self.pairs = nn.ModuleDict({name.replace(".", "/"): Pair(m, rank, alpha) for name, m in layers.items()})
        self._hooks = [
            layer.register_forward_hook(partial(_add, self.pairs[name.replace(".", "/")]))
            for name, layer in layers.items()
        ]

    def remove(self) -> None:
        """Let the DiT compute without the pairs again."""
        for hook in self._hooks:
            hook.remove()

    def tensors(self) -> dict[str, Tensor]:
        """What a LoRA file holds: original Wan names and row order, `lora_down`, `lora_up` and `alpha`."""
        inverse = half_split_order(self.config.dim, self.config.heads).argsort()
        found = {}
        for key, pair in self.pairs.items():
            assert isinstance(pair, Pair)
            name = key.replace("/", ".")
            up = pair.up.weight.detach().cpu()
            # The rows of q and k are in another order here than in a checkpoint, and LoRAs merge into checkpoints.
            found[f"diffusion_model.{name}.lora_up.weight"] = up[inverse] if is_rotary(f"{name}.weight") else up
            found[f"diffusion_model.{name}.lora_down.weight"] = pair.down.weight.detach().cpu()
            found[f"diffusion_model.{name}.alpha"] = torch.tensor(self.alpha)
        return found


def save_lora(lora: Lora, path: Path) -> Path:
    """Write the pairs to a safetensors file, beside it first and then renamed."""
    part = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in lora.tensors().items()}, part)
    return part.replace(path)


def _add(pair: nn.Module, _: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + pair(arguments[0]).to(output.dtype)


def checkpoint_blocks(dit: DiT) -> None:
    """Keep only each block's input for the backward pass and compute the rest again: memory for time."""
    for block in dit.layers:
        run: Callable[..., Tensor] = block.forward
        block.forward = partial(checkpoint, run, use_reentrant=False)
