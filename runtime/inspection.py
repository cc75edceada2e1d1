"""What a checkpoint is, from its headers: kind, layout, sizes, dtypes. Reads no tensor."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from ..engine.checkpoint import State
from ..engine.errors import WeightsError
from ..engine.layouts import dit_config, dit_names, vae_config, vae_names
from ..engine.lora import ENDINGS
from ..engine.weights import read_state


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
