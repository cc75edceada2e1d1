"""Merging LoRAs into the weights of a DiT: in fp32, rounded once, before any permutation or quantisation.

Four public layouts are read, told apart key by key: lightx2v (`diffusion_model.`, `.lora_down/.lora_up`, `.diff*`),
DiffSynth (bare names, `.lora_A.default`), PEFT (`transformer.`, diffusers names) and kohya (`lora_unet_`, underscores).
Every key is used or refused by name: a LoRA that fits in part is a LoRA of another model.
"""

import json
import math
import re
from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from .checkpoint import State
from .errors import WeightsError
from .layouts import dit_name_from_diffusers

# The end of a key: what it holds of a change, and which parameter of the named layer changes.
ENDINGS = {
    ".lora_down.weight": ("down", "weight"),
    ".lora_A.weight": ("down", "weight"),
    ".lora_A.default.weight": ("down", "weight"),
    ".lora_up.weight": ("up", "weight"),
    ".lora_B.weight": ("up", "weight"),
    ".lora_B.default.weight": ("up", "weight"),
    ".alpha": ("alpha", "weight"),
    ".diff": ("diff", "weight"),
    ".diff_b": ("diff", "bias"),
    ".diff_m": ("diff", "modulation"),
}
ENDING_OF_DOWN = re.compile(r"\.lora_(down|A)(\.default)?\.weight$")
PREFIXES = ("base_model.model.", "diffusion_model.", "pipe.dit.", "transformer.")  # removed in this order
KOHYA = "lora_unet_"
OTHER_METHODS = {
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALPHAS = (*FLOATS, torch.float64, torch.int32, torch.int64)  # trainers save the number as they had it

Parts = dict[str, Tensor]  # of `down`, `up`, `alpha`, `diff`: what one LoRA does to one tensor


@torch.no_grad()
def merge_loras(state: MutableMapping[str, Tensor], loras: Sequence[tuple[str, Mapping[str, Tensor], float]]) -> None:
    """Add LoRAs to the weights of a DiT, replacing the changed tensors of `state`.

    `state` has the original Wan names and row order; a LoRA is (name to show, tensors, strength). A weight [out, in]
    or [out, in, 1, 2, 2] becomes W + sum of strength * alpha/rank * up [out, rank] @ down [rank, in]; without an alpha,
    alpha/rank is 1. A `.diff` has the shape of what it changes. At most one tensor is held in fp32 at a time.
    WeightsError for a key that is unknown, half a pair, of another shape or not finite; then `state` is as it was.
    Source: the files that LightX2V, DiffSynth-Studio, PEFT and musubi-tuner write.
    """
    plan: dict[str, list[tuple[float, Parts]]] = {}
    for label, tensors, strength in loras:
        if not math.isfinite(strength):
            raise WeightsError(f"LoRA {label!r}: got strength {strength}, want a finite number; 1 is usual")
        for target, parts in _read(label, tensors, state).items():
            plan.setdefault(target, []).append((strength, parts))
    for target, changes in plan.items():
        state[target] = _merged(state[target], changes)


def with_alphas(lora: State) -> Mapping[str, Tensor]:
    """The LoRA's tensors, with an alpha for each pair where PEFT wrote one number for all into the file's header.

    WeightsError for a header that scales layers differently, which the tensors cannot say.
    """
    header = lora.metadata.get("lora_adapter_metadata")
    if header is None:
        return lora
    try:
        settings = {key.rpartition(".")[2]: value for key, value in json.loads(header).items()}
    except (ValueError, AttributeError) as error:
        raise WeightsError(
            f"LoRA {lora.source!r}: got an unreadable lora_adapter_metadata, want JSON; save the adapter again"
        ) from error
    uneven = [key for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") if settings.get(key)]
    _refuse(lora.source, uneven, "settings beyond one rank and alpha", "a plain LoRA; merge it with PEFT first")
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, (int, float)):
        return lora
    downs = [key for key in lora if ENDING_OF_DOWN.search(key)]
    return {**lora, **{ENDING_OF_DOWN.sub(".alpha", key): torch.tensor(float(alpha)) for key in downs}}


def _merged(weight: Tensor, changes: Sequence[tuple[float, Parts]]) -> Tensor:
    """The weight with the changes of all LoRAs, rounded to its dtype once."""
    total = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for strength, parts in changes:
        if "diff" in parts:
            total.add_(parts["diff"].to(total), alpha=strength)
        if "down" in parts:
            down = parts["down"].to(total).flatten(1)  # [rank, in, 1, 2, 2] -> [rank, in*4]; a matrix stays
            up = parts["up"].to(total).flatten(1)  # [out, rank, 1, 1, 1] -> [out, rank]
            scale = float(parts["alpha"]) / len(down) if "alpha" in parts else 1.0
            total.view(len(total), -1).addmm_(up, down, alpha=strength * scale)  # [out, in, 1, 2, 2] -> [out, in*4]
    return total.to(weight.dtype)


def _read(label: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Parts]:
    """The changes of one LoRA by the name of the tensor they change, all checked."""
    if not tensors:
        raise WeightsError(f"LoRA {label!r}: got no tensors, want at least one; pass another file")
    for mark, method in OTHER_METHODS.items():
        found = [key for key in tensors if mark in key]
        _refuse(label, found, f"keys of a {method}", "a plain LoRA; merge it with its own tool first")
    found = [key for key in tensors if "transformer_2." in key]
    _refuse(label, found, "keys of the low-noise expert", "one expert a file; split it and give each expert its own")
    flat = _by_underscores(state)
    changes: dict[str, Parts] = {}
    unknown, twice = [], []
    for key, tensor in tensors.items():
        part, target = _resolve(key, state, flat)
        if target is None:
            unknown.append(key)
        elif part in changes.setdefault(target, {}):
            twice.append(key)
        else:
            changes[target][part] = tensor
    _refuse(label, unknown, "unknown keys", "names of this DiT; use a LoRA made for this model")
    _refuse(label, twice, "keys that repeat another", "one for each weight; keep one adapter in the file")
    _check_values(label, tensors)
    _check_targets(label, changes, state)
    return changes


def _resolve(key: str, state: Mapping[str, Tensor], flat: Mapping[str, str]) -> tuple[str, str | None]:
    """Which part of a change a key holds, and the name of the tensor it changes; None if there is none."""
    ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
    if ending is None:
        return "", None
    part, parameter = ENDINGS[ending]
    base = key.removesuffix(ending)
    if base.startswith(KOHYA):
        return part, flat.get(f"{base.removeprefix(KOHYA).lstrip('_')}_{parameter}")
    for prefix in PREFIXES:
        base = base.removeprefix(prefix)
    name = f"{base}.{parameter}"
    return part, next((n for n in (name, dit_name_from_diffusers(name)) if n in state), None)


def _by_underscores(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of `state` by their kohya form, which writes dots as underscores; what could be two names is left out."""
    found: dict[str, list[str]] = {}
    for name in state:
        found.setdefault(name.replace(".", "_"), []).append(name)
    return {flat: names[0] for flat, names in found.items() if len(names) == 1}


def _check_values(label: str, tensors: Mapping[str, Tensor]) -> None:
    def wanted(key: str) -> tuple[torch.dtype, ...]:
        return ALPHAS if key.endswith(".alpha") else FLOATS

    found = [f"{key} {tensor.dtype}" for key, tensor in tensors.items() if tensor.dtype not in wanted(key)]
    _refuse(label, found, "tensors of a foreign dtype", "fp32, bf16 or fp16; use the file before it was quantised")
    found = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    _refuse(label, found, "tensors with values that are not finite", "numbers; the file is damaged, fetch it again")


def _check_targets(label: str, changes: Mapping[str, Parts], state: Mapping[str, Tensor]) -> None:
    def half(parts: Parts) -> bool:
        return ("down" in parts) != ("up" in parts) or ("alpha" in parts and "down" not in parts)

    found = [f"{target} with {'+'.join(parts)}" for target, parts in changes.items() if half(parts)]
    _refuse(label, found, "incomplete changes", "down and up together; the file is cut short, fetch it again")
    found = [f"{target} {state[target].dtype}" for target in changes if state[target].dtype not in FLOATS]
    _refuse(label, found, "quantised weights to change", "fp32, bf16 or fp16; merge into the checkpoint, then quantise")
    found = [
        f"{target} {list(state[target].shape)} with " + ", ".join(f"{p} {list(t.shape)}" for p, t in parts.items())
        for target, parts in changes.items()
        if not _fits(state[target], parts)
    ]
    _refuse(label, found, "changes of another shape", "the sizes of this DiT; use a LoRA made for this model")


def _fits(weight: Tensor, parts: Parts) -> bool:
    if "diff" in parts and parts["diff"].shape != weight.shape:
        return False
    if "alpha" in parts and parts["alpha"].numel() != 1:
        return False
    if "down" not in parts:
        return True
    down, up = parts["down"], parts["up"]
    if min(weight.ndim, down.ndim, up.ndim) < 2 or not down.numel():
        return False
    rank, rows = len(down), len(weight)
    columns = weight.shape[1:]
    downs = ((rank, *columns), (rank, math.prod(columns)))  # as a convolution, or flattened to a matrix
    return tuple(down.shape) in downs and tuple(up.shape[:2]) == (rows, rank) and up.numel() == rows * rank


def _refuse(label: str, found: Sequence[str], fault: str, want: str) -> None:
    """Raise for the entries found, if any; names are quoted, so that one with a line break stays on the line."""
    if found:
        shown = ", ".join(repr(entry) for entry in found[:5]) + (", ..." if len(found) > 5 else "")
        raise WeightsError(f"LoRA {label!r}: got {len(found)} {fault} ({shown}), want {want}")
