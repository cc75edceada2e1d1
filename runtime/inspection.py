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
from ..engine.weights import read_state

LORA_MARKS = (".lora_", ".diff", ".alpha")


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
    if any(mark in name for name in state for mark in LORA_MARKS):
        return "LoRA", {"first": sorted(state)[0]}
    readers: dict[str, tuple[Callable, Callable]] = {"DiT": (dit_names, dit_config), "VAE": (vae_names, vae_config)}
    reasons = []
    for kind, (names_of, config_of) in readers.items():
        try:
            names = names_of(state, state.source)
            shapes = {name: state.shape(full) for name, full in names.items()}
            return kind, asdict(config_of(shapes, state.config, state.source))
        except WeightsError as error:
            reasons.append(str(error))
    return "unknown", {"first": sorted(state)[:3], "why": reasons}
