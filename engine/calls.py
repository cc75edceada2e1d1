"""Calling executables: tables and text of a DiT, its velocity with guidance, one call of a VAE stream."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .rope import rope_tables
from .sampler import TIMESTEPS
from .spec import Executable, Feed
from .state import Conditions
from .vae_layers import VaeCache

Executables = Mapping[str, Executable]


def dit_conditions(
    graphs: Executables,
    weights: str,
    sigmas: Sequence[float],
    text: Tensor,
    negative: Tensor | None = None,
    image_tokens: Tensor | None = None,
    guidance: float = 1.0,
) -> Conditions:
    """Run the time and text graphs of one DiT: text and negative [1, L, text_dim], image_tokens [1, n, image_dim].

    Without guidance the negative prompt is not computed, as it would not be read.
    """
    tables = tuple(
        graphs[f"{weights}_time"]({"timesteps": torch.tensor([0.0, TIMESTEPS * sigma], device=text.device)})
        for sigma in sigmas
    )
    image: Feed = {} if image_tokens is None else {"image_tokens": image_tokens}
    conditions = Conditions(tables, graphs[f"{weights}_text"]({"text": text, **image}), guidance=guidance)
    if guidance == 1.0 or negative is None:
        return conditions
    return replace(conditions, negative=graphs[f"{weights}_text"]({"text": negative, **image}))


def window_feed(
    graph: Executable, positions: Sequence[int], clean: int, head_dim: int, device: torch.device
) -> dict[str, Tensor]:
    """What a step graph reads that is constant for one window: block rows, RoPE tables, and the mask if it has one.

    `positions` are the blocks' time positions, the first `clean` of them conditioning blocks. A graph that reads the
    context's keys and values takes the window's last blocks alone.
    """
    shape = {tensor.name: tensor.shape for tensor in graph.spec.inputs}
    taken, height, width = shape["latents"][2], shape["latents"][3] // 2, shape["latents"][4] // 2
    cos, sin = rope_tables(head_dim, positions[-taken:], height, width)
    rows = torch.tensor([int(index >= clean) for index in range(len(positions))])  # [T]
    feed = {"rows": rows[None, -taken:].to(device), "cos": cos.to(device), "sin": sin.to(device)}
    if "mask" in shape:
        token_rows = rows.repeat_interleave(height * width)  # [T] -> [L]
        # Clean tokens do not see noisy ones.
        mask = token_rows[-taken * height * width :, None] >= token_rows[None, :]
        feed["mask"] = mask.to(device)
    return feed


Kept = tuple[Feed, Feed]  # what a step hands to later ones, for the prompt and for the negative prompt
NOTHING: Kept = ({}, {})


def guided_velocity(
    graph: Executable, conditions: Conditions, step: int, feed: Feed, kept: Kept = NOTHING
) -> tuple[Tensor, Kept]:
    """Velocity fp32 [1, C, T, H, W] at a step, with classifier-free guidance where the conditions ask for it.

    `kept` are more inputs of the graph, a set for each prompt; what it makes beside the velocity comes back so too.
    """
    constant = {**feed, **conditions.tables[step]}
    velocity, made = _velocity(graph, {**constant, **kept[0], **conditions.text})
    if conditions.negative is None:
        return velocity, (made, {})
    negative, made_negative = _velocity(graph, {**constant, **kept[1], **conditions.negative})
    return negative + conditions.guidance * (velocity - negative), (made, made_negative)


def _velocity(graph: Executable, feed: Feed) -> tuple[Tensor, Feed]:
    made = graph(feed)
    return made["velocity"].float(), {name: tensor for name, tensor in made.items() if name != "velocity"}


def stream_call(graphs: Executables, name: str, x: Tensor, cache: VaeCache) -> tuple[Tensor, VaeCache]:
    """One call of the VAE stream `name`; an empty cache makes it the clip's first. The cache is donated.

    x is pixels [1, 3, T, H, W] or latents [1, z, 1, h, w]; the other comes back, with the new cache.
    """
    graph = graphs[f"{name}_next" if cache else f"{name}_first"]
    given, made = graph.spec.inputs[0], graph.spec.outputs[0]
    feed = {tensor.name: old for tensor, old in zip(graph.spec.inputs[1:], cache, strict=True)} if cache else {}
    outputs = graph({given.name: x.to(given.dtype), **feed})
    return outputs[made.name], tuple(outputs[tensor.name] for tensor in graph.spec.outputs[1:])
