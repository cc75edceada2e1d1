"""What a training step costs at real size, counted on the meta device: no weights, no GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..engine.dit import DiT, TextKV
from ..engine.profile import DiTConfig
from .lora import TARGETS, Lora, checkpoint_blocks

GB = 1e9


@dataclass(frozen=True)
class StepCost:
    """One step at batch 1: floating-point operations, and memory in GB (1e9 bytes) by what holds it.

    `kept` is what the forward pass keeps for the backward pass, attention scores left out, as fused attention does;
    the activations of the block at work come on top.
    """

    tokens: int
    tflop: float
    weights: float
    trained: float  # fp32 master weights, gradients, two moments and the running average
    kept: float

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.kept


def step_cost(
    config: DiTConfig,
    window: tuple[int, int, int],
    rank: int | None = None,
    checkpointed: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    targets: str = TARGETS,
) -> StepCost:
    """The cost of one forward and backward pass of a DiT on latents of `window` = (blocks, height, width).

    With `rank` a LoRA beside the layers `targets` is trained on frozen weights of `dtype`; without, all weights are.
    """
    blocks, height, width = window
    with torch.device("meta"):
        dit = DiT(config).to(dtype)
        lora = None if rank is None else Lora(dit, rank, targets=targets)
        if checkpointed:
            checkpoint_blocks(dit)
        latents = torch.empty(1, config.in_channels, blocks, height, width, dtype=dtype)
        lengths = (config.text_len, *((config.image_tokens,) if config.image_dim else ()))
        shapes = [(config.layers, 1, config.heads, length, config.head_dim) for length in lengths]
        context = [torch.empty(shape, dtype=dtype) for shape in shapes for _ in ("keys", "values")]
        tokens = blocks * (height // 2) * (width // 2)
        rope = (torch.empty(tokens, config.head_dim // 2), torch.empty(tokens, config.head_dim // 2))
        rows = torch.zeros(1, blocks, dtype=torch.int64)
        tables = torch.empty(config.layers, 2, 6, config.dim), torch.empty(2, 2, config.dim)
    kept = _Kept(tokens, (tokens, *lengths))
    for tensor in context:
        kept.count(tensor)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(kept.count, lambda tensor: tensor):
            velocity = dit(latents, *tables, rows, rope, TextKV(*context))
        velocity.float().square().mean().backward()
    learned = list((dit if lora is None else lora).parameters())
    return StepCost(
        tokens=tokens,
        tflop=counter.get_total_flops() / 1e12,
        weights=sum(p.numel() * p.itemsize for p in dit.parameters()) / GB,
        trained=sum(p.numel() for p in learned) * 4 * 5 / GB,
        kept=kept.bytes / GB,
    )


class _Kept:
    """Adds up the tensors that autograd saves, each storage once, without weights and attention scores."""

    def __init__(self, tokens: int, keys: tuple[int, ...]) -> None:
        self.tokens, self.keys, self.bytes = tokens, keys, 0
        self._seen: set[int] = set()
        self._alive: list[Tensor] = []  # so that no storage's number is used again

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        scores = tensor.ndim >= 2 and tensor.shape[-2] == self.tokens and tensor.shape[-1] in self.keys
        if not scores and not isinstance(tensor, torch.nn.Parameter) and storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor
