"""AOTInductor packages: torch.export, attention in its fastest form, weights frozen into the code."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import EnvironmentMismatch
from ..runtime.backend_inductor import memory_format
from .job import Job

# Without the first, weights are not prepacked; without the second, the thread count of the build would be built in.
CONFIG = {"freezing": True, "cpp.dynamic_threads": True}


def build(job: Job, folder: Path) -> None:
    """Write model.pt2."""
    _require_compiler()
    spec = job.graph.spec
    inputs = tuple(
        value.contiguous(memory_format=memory_format(spec, tensor))
        for value, tensor in zip(job.inputs(), spec.inputs, strict=True)
    )
    with torch.no_grad(), warnings.catch_warnings():  # inference mode does not go through the compiler
        warnings.simplefilter("ignore")  # torch's remarks on itself
        program = torch.export.export(job.module(), inputs, strict=False)
        table = decompositions(torch.cpu.get_capabilities().get("amx_tile") is True)
        torch._inductor.aoti_compile_and_package(
            program.run_decompositions(table), package_path=str(folder / "model.pt2"), inductor_configs=CONFIG
        )


def built_with() -> dict[str, str]:
    """Packages that have a hand in the artifact, and need not be there where it runs."""
    return {}


def decompositions(amx: bool) -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """How operations are taken apart for Inductor, on a CPU with or without AMX.

    With it torch's own attention is 1.1 to 4 times as fast as what Inductor makes of the formula; without, it was
    several times slower in bf16.
    """
    table = torch.export.default_decompositions()
    if amx:
        table.pop(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    else:
        table[torch.ops.aten.scaled_dot_product_attention.default] = plain_attention
    return table


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,  # noqa: ARG001
    *,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001
) -> Tensor:
    """Attention of q [B, heads, Lq, D] as two products around an exponential, by which Inductor does not know it."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)  # [B, heads, Lq, Lk]
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return (weights @ v) / weights.sum(dim=-1, keepdim=True)


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except Exception as error:  # torch has an error of its own for it
        raise EnvironmentMismatch(
            f"C++ compiler: got none ({' '.join(str(error).split())[:100]}), want one for Inductor; install g++"
        ) from error
    if shutil.which(compiler) is None:
        raise EnvironmentMismatch(f"C++ compiler: got {compiler}, which is not there, want one; install g++")
