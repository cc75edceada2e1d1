"""How much work a run is: floating-point operations counted on the meta device, and how often each graph is called."""

from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..engine.graphs import Graph, new_module, profile_graphs
from ..engine.profile import Profile
from ..engine.sampler import stage_sigmas
from ..engine.segments import plan_segments
from ..engine.stage1 import expert_of

Stages = dict[str, Counter[str]]  # stage -> graph -> calls


def count_flops(run: Callable[..., object], *inputs: Tensor) -> int:
    """Operations of one call, 2 for a multiplication and addition; only products and convolutions count."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run(*inputs)
    return counter.get_total_flops()


@lru_cache(maxsize=256)
def graph_flops(profile: Profile, name: str) -> int:
    """Operations of one call of a graph, as its eager module does them on meta tensors."""
    graph = profile_graphs(profile, torch.float32)[name]
    with torch.device("meta"):
        module = graph.build(meta_weights(profile, graph), False)
        inputs = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in graph.spec.inputs]
        return count_flops(module, *inputs)


def meta_weights(profile: Profile, graph: Graph) -> nn.Module:
    """The weights' module of a graph, without memory."""
    with torch.device("meta"):
        return new_module(profile, graph.weights)


def clip_calls(profile: Profile) -> Stages:
    """How often a clip calls each graph, by the stage whose time it is part of.

    Prompt encoders are no graphs: their work is not counted.
    """
    blocks, stage1, stage2 = profile.blocks, profile.stage1, profile.stage2
    first = Counter[str]()
    sigmas = stage_sigmas(stage1)
    experts = Counter(expert_of(profile, sigma) for sigma in sigmas)
    for expert, steps in experts.items():
        first[f"{expert}_time"] += len(sigmas)
        first[f"{expert}_text"] += _passes(stage1.guidance)
        first[f"{expert}_step"] += steps * _passes(stage1.guidance)
    first["image_first"] += 1
    first["image_next"] += blocks - 1 if profile.image_channels else 0
    steps = len(stage_sigmas(stage2, profile.stage2_start))
    segments = len(plan_segments(blocks, profile.noisy, profile.neighbours))
    stages = {
        "prompt": Counter({"stage2_time": steps, "stage2_text": _passes(stage2.guidance)}),
        "stage1": first,
        "reference": Counter(
            {"motion_first": 1, "reference_first": 1, "motion_next": blocks - 1, "reference_next": blocks - 1}
        ),
        "denoise": _denoise_calls(profile, steps, segments, _passes(stage2.guidance)),
        "decode": Counter({"decode_first": 1, "decode_next": blocks - 1}),
    }
    return {stage: +calls for stage, calls in stages.items()}


def _denoise_calls(profile: Profile, steps: int, segments: int, passes: int) -> Counter[str]:
    first, later = (1, steps - 1) if profile.reuse_context else (steps, 0)
    calls = {"stage2_first": first, "stage2_first_later": later}
    calls |= {"stage2_next": first * (segments - 1), "stage2_next_later": later * (segments - 1)}
    return Counter({name: count * passes for name, count in calls.items()})


def clip_flops(profile: Profile) -> dict[str, int]:
    """Operations of a clip by stage."""
    return {
        stage: sum(graph_flops(profile, name) * count for name, count in calls.items())
        for stage, calls in clip_calls(profile).items()
    }


def _passes(guidance: float) -> int:
    return 1 if guidance == 1.0 else 2
