"""The attention case: softmax attention on the shapes of both stages' windows, by every kernel torch has here."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..engine.errors import EnvironmentMismatch
from ..kernels.attention import attention
from ..kernels.dispatch import Shape, candidates, installed, refusal, run_backend
from ..kernels.launch import capability
from .clock import Work
from .flops import count_flops
from .items import Item, random, step_names, window_of
from .models import Models
from .variants import SHORT

CPU = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def attention_items(models: Models, dtypes: list[torch.dtype], say: Callable[[str], None]) -> list[Item]:
    """Self-attention of one layer, on the window of every step graph.

    Kernels that refuse a shape are not timed: `say` hears why, and so does the item's first note.
    """
    profile = models.profile
    names = ["stage1_step"] if profile.stage1.boundary is None else ["stage1_high_step"]
    names += step_names(profile)
    items = []
    for name in names:
        stage = profile.stage2 if name.startswith("stage2") else profile.stage1
        blocks, _ = window_of(profile, name)
        asking = profile.noisy if name.endswith("_later") else blocks  # with a reused context not all tokens ask
        shapes = [(1, stage.dit.heads, n * stage.block_tokens, stage.dit.head_dim) for n in (asking, blocks, blocks)]
        meta = [torch.empty(shape, device="meta") for shape in shapes]
        works: dict[str, Work] = {}
        dtype_of: dict[str, torch.dtype] = {}
        refusals: list[str] = []
        for dtype in dtypes:
            q, k, v = (random(shape, dtype, models.device, seed) for seed, shape in enumerate(shapes))
            for kernel, call in _calls(q, k, v).items():
                refused = refusal(call)
                if refused:
                    refusals.append(f"{kernel} {SHORT[dtype]} refuses and is not timed ({refused})")
                    say(f"{name}: {refusals[-1]}")
                else:
                    works[f"{kernel} {SHORT[dtype]}"], dtype_of[f"{kernel} {SHORT[dtype]}"] = Work(call), dtype
        if not works:
            raise EnvironmentMismatch(
                f"attention {name}: got {'; '.join(refusals)}, want one that runs; update PyTorch"
            )
        notes = {next(iter(works)): "; ".join(refusals)} if refusals else {}
        items.append(Item(f"attention {name}", count_flops(attention, *meta), works, dtype_of, notes))
    return items


def _calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Calls by name: what torch chooses, then what can be asked for; on CUDA also our kernels and flash-attn's."""

    def run(function: Callable[..., Tensor], *arguments: object) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.inference_mode():
                return function(*arguments)

        return call

    if q.device.type == "cuda":
        batch, heads, tokens, dim = q.shape
        shape = Shape(batch, heads, tokens, k.shape[2], 0, dim, SHORT[q.dtype])
        names = candidates(shape, capability(q.device), installed())
        return {name: run(run_backend, name, q, k, v, None, None) for name in names}
    return {"sdpa": run(attention, q, k, v)} | {name: run(_forced, kind, q, k, v) for name, kind in CPU.items()}


def _forced(kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        return attention(q, k, v)
