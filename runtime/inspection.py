"""What a checkpoint is, from its headers: kind, layout, sizes, dtypes; and what a table of kernels says. No tensors."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from ..engine.checkpoint import State
from ..engine.errors import WeightsError
from ..engine.layouts import dit_config, dit_names, vae_config, vae_names
from ..engine.lora import ENDINGS
from ..engine.weights import read_state
from .fused import read_table


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Facts of a checkpoint as plain values; `kind` is DiT, VAE, LoRA or unknown. WeightsError if it does not open."""
    state = read_state(path)
    kind, facts = _kind(state)
    return {
        "kind": kind,
        "tensors": len(state),
        "parameters": sum(prod(state.shape(name)) for name in state),
        "dtypes": dict(Counter(state.dtype(name) for name in state)),
        **facts,
    }


def describe_kernels(path: Path) -> list[dict[str, Any]]:
    """What a kernels.json holds, a row for each kernel and shape: `runs` is what is used there, `ms` its median time,
    `plain_ms` that of plain PyTorch, and `refused` why others do not count.
    """
    table = read_table(path)
    rows: list[dict[str, Any]] = []
    for choice in table.attention.choices:
        shape, by_name = choice.shape, {timing.backend: timing for timing in choice.timings}
        keys = f"{shape.tokens + shape.context} keys"
        words = f"{shape.dtype} {shape.batch}x{shape.heads} heads of {shape.head_dim}, {shape.queries} queries, {keys}"
        refused = {name: timing.refused for name, timing in by_name.items() if timing.refused}
        rows.append(
            _row("attend", words, choice.gpu, choice.best.backend, choice.best.samples, by_name["sdpa"].samples)
        )
        rows[-1]["refused"] = refused
    for timing in table.ops:
        runs, samples = ("fused", timing.fused) if timing.wins else ("eager", timing.eager)
        rows.append(_row(timing.op, timing.call, timing.gpu, runs, samples, timing.eager))
        rows[-1]["refused"] = {"fused": timing.refused} if timing.refused else {}
    return rows


def _row(
    kernel: str, call: str, gpu: str, runs: str, samples: tuple[float, ...], plain: tuple[float, ...]
) -> dict[str, Any]:
    ms, plain_ms = (round(median(times), 4) if times else None for times in (samples, plain))
    return {"kernel": kernel, "call": call, "gpu": gpu, "runs": runs, "ms": ms, "plain_ms": plain_ms}


def _kind(state: State) -> tuple[str, dict[str, Any]]:
    downs = [name for name in state if name.endswith(tuple(e for e, (part, _) in ENDINGS.items() if part == "down"))]
    if downs or all(name.endswith(tuple(ENDINGS)) for name in state):
        ranks = sorted({state.shape(name)[0] for name in downs})
        return "LoRA", {"ranks": ranks, "pairs": len(downs), "first": sorted(state)[0]}
    readers: dict[str, tuple[Callable, Callable]] = {"DiT": (dit_names, dit_config), "VAE": (vae_names, vae_config)}
    reasons = []
    for kind, (names_of, config_of) in readers.items():
        try:
            names = names_of(state, state.source)
            shapes = {name: state.shape(full) for name, full in names.items()}
            return kind, {"layout": _layout(state), **asdict(config_of(shapes, state.config, state.source))}
        except WeightsError as error:
            reasons.append(str(error))
    return "unknown", {"first": sorted(state)[:3], "why": reasons}


def _layout(state: State) -> str:
    """Which project's names the tensors have."""
    if any("condition_embedder." in name or "quant_conv." in name for name in state):
        return "diffusers"
    if any("diffusion_model." in name or name.startswith(("first_stage_model.", "vae.")) for name in state):
        return "ComfyUI"
    return "original"
