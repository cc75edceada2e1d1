"""The scales of FP8 layers: how large their inputs are while the weights make clips.

An image that is drawn, and prompts; the clip is shorter and smaller than the profile's where that is large, so that a
CPU does it in minutes.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..engine.calls import Executables, dit_conditions
from ..engine.dit import DiT
from ..engine.errors import BundleError, NumericsError, WeightsError
from ..engine.manifest import PRECISIONS, Bundle, write_text
from ..engine.plain import to_plain
from ..engine.profile import Profile, nearest_multiple, size_grid
from ..engine.reference import reference_blocks
from ..engine.sampler import block_noise, stage_sigmas
from ..engine.segments import plan_segments
from ..engine.stage1 import expert_of, image_condition, run_stage1
from ..engine.stage2 import denoise_segment, start_state, window_graphs
from ..engine.weights import load_words
from ..runtime.backend_eager import open_eager
from ..runtime.backend_weights import ModelPaths, Source, find_models
from .fp8 import LARGEST, SCALES, SMALLEST, block_linears, input_scales, quantise

PROMPTS = ("the camera pans left, the light turns warmer", "a red ball crosses from left to right")
MARGIN = 2.0  # room for inputs larger than those seen: a float loses no precision by it, only its smallest numbers
PIXELS = 1_000_000  # of a frame, about

Scales = dict[str, dict[str, float]]  # of the DiTs' inputs: weights name -> layer -> scale


@dataclass(frozen=True)
class Conditioning:
    """What clips are made of: text rows [1, L, D] of each, and image tokens [1, n, D] where the model has them."""

    texts: tuple[Tensor, ...]
    image_tokens: Tensor | None = None


def quantise_source(source: Source, paths: ModelPaths | None = None, cache: Path | None = None) -> None:
    """Turn the block layers of a source's DiTs to FP8, in place. `paths` are those that the source was opened from.

    Scales that are in the folder `cache` already are taken from there.
    """
    given = open_conditioning(source, paths or find_models(source.profile))
    kept = None if cache is None else cache / "calibration" / f"{_key(source, given)}.json"
    if kept is not None and kept.is_file():
        scales = {name: read_scales(layers, kept) for name, layers in json.loads(kept.read_text("utf-8")).items()}
    else:
        scales = calibrate(source, given)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(scales))
    for name, of_layers in scales.items():
        quantise(cast(DiT, source.modules[name]), of_layers)


def quantise_as(source: Source, bundle: Bundle) -> None:
    """Turn the block layers of a source's DiTs to FP8 with the scales in a bundle, in place."""
    for name, record in bundle.manifest.graphs.items():
        module = source.modules[record.weights]
        file = next((path for path in bundle.files(name) if path.name == SCALES), None)
        if file is not None and not input_scales(module):
            quantise(cast(DiT, module), read_scales(json.loads(file.read_text("utf-8")), file))


def read_scales(plain: Any, file: Path) -> dict[str, float]:
    """Scales by layer, as JSON has them. BundleError for anything else."""
    if not isinstance(plain, dict) or not all(isinstance(value, float) and value > 0 for value in plain.values()):
        raise BundleError(f"{file}: got something else, want scales above 0 by layer; delete it, and build again")
    return plain


def calibrate(source: Source, given: Conditioning) -> Scales:
    """Make a clip with every text, and see how large the inputs of layers get. NumericsError for what is no number."""
    profile = calibration_profile(source.profile)
    graphs = open_eager(profile, source.modules, PRECISIONS[source.precision])
    with _watched(source.modules) as seen:
        for index, text in enumerate(given.texts):
            run_clip(graphs, profile, draw_image(profile, index).to(source.device), text, given.image_tokens, index)
    peaks = {
        name: {layer: float(torch.stack(of).max()) for layer, of in layers.items()} for name, layers in seen.items()
    }
    bad = [f"{name} {layer}" for name, layers in peaks.items() for layer, peak in layers.items() if not isfinite(peak)]
    if bad:
        raise NumericsError(f"calibration: got an input of {bad[0]} that is no number, want one; check the weights")
    return {
        name: {layer: MARGIN * max(peak, SMALLEST) / LARGEST for layer, peak in layers.items()}
        for name, layers in peaks.items()
    }


def calibration_profile(profile: Profile) -> Profile:
    """The profile for clips of two segments at most, of about a million pixels a frame at most, without guidance."""
    frames = min(profile.frames, 2 * profile.noisy * profile.block_frames + 1)
    shrink = min(1.0, (PIXELS / (profile.width * profile.height)) ** 0.5)
    grid = size_grid(profile)
    size = (nearest_multiple(int(shrink * profile.width), grid), nearest_multiple(int(shrink * profile.height), grid))
    kept = shrink == 1
    return profile.override(frames=frames, size=None if kept else size, stage1_guidance=1.0, stage2_guidance=1.0)


def run_clip(
    graphs: Executables, profile: Profile, image: Tensor, text: Tensor, image_tokens: Tensor | None, seed: int
) -> None:
    """Make a clip of the image [1, 3, 1, H, W] in [-1, 1] and the text [1, L, D], as latents, and drop it."""
    stage = profile.stage1
    sigmas = stage_sigmas(stage)
    experts = [expert_of(profile, sigma) for sigma in sigmas]
    by_expert = {name: dit_conditions(graphs, name, sigmas, text, image_tokens=image_tokens) for name in set(experts)}
    small = F.interpolate(image[:, :, 0], size=(stage.height, stage.width), mode="bicubic", antialias=True)
    condition = image_condition(graphs, profile, small.clamp(-1, 1).unsqueeze(2))  # [1, 3, h, w] -> [1, 3, 1, h, w]
    shape = (stage.dit.out_channels, stage.latent_height, stage.latent_width)
    noise = block_noise(seed, 1, range(profile.blocks), shape).to(image.device)
    motion = run_stage1(graphs, profile, condition, [by_expert[name] for name in experts], noise, sigmas)
    sigmas = stage_sigmas(profile.stage2, profile.stage2_start)
    conditions = dit_conditions(graphs, "stage2", sigmas, text)
    state = start_state(graphs, image, motion)
    for segment in plan_segments(profile.blocks, profile.noisy, profile.neighbours):
        reference, motion_cache, reference_cache = reference_blocks(
            graphs, motion, segment.noisy, (profile.height, profile.width), state.motion_cache, state.reference_cache
        )
        state = replace(state, motion_cache=motion_cache, reference_cache=reference_cache)
        noise = block_noise(seed, 2, segment.noisy, (reference.shape[1], *reference.shape[3:])).to(image.device)
        steps = window_graphs(graphs, segment)
        _, state = denoise_segment(steps, profile, segment, state, conditions, reference, noise, sigmas)


def draw_image(profile: Profile, seed: int) -> Tensor:
    """A picture [1, 3, 1, H, W] in [-1, 1]: clouds of all sizes, the large ones stronger, and one sharp edge."""
    generator = torch.Generator().manual_seed(seed)
    height, width = profile.height, profile.width
    image = torch.zeros(1, 3, height, width)
    for octave in range(1, 7):
        cells = torch.randn(1, 3, 2**octave, 2 ** (octave + 1), generator=generator) * 0.8**octave
        image += F.interpolate(cells, size=(height, width), mode="bicubic")
    image[..., width // 2 :] *= -1
    return image.tanh().unsqueeze(2)  # [1, 3, H, W] -> [1, 3, 1, H, W]


def open_conditioning(source: Source, paths: ModelPaths) -> Conditioning:
    """Texts for the source's DiTs, from its prompt encoder where that is small, else from ready embeddings.

    WeightsError where there are none: a large encoder is not run here.
    """
    dit, dtype = source.profile.stage1.dit, PRECISIONS[source.precision]
    if not paths.trained:
        texts = torch.randn(len(PROMPTS), 1, dit.text_len, dit.text_dim, generator=torch.Generator().manual_seed(0))
        return Conditioning(tuple(texts.to(source.device, dtype)))
    if paths.text is not None and source.profile.text.kind == "words":
        words = load_words(paths.text)
        return Conditioning(tuple(words.encode(prompt).to(source.device, dtype) for prompt in PROMPTS))
    try:
        ready = {} if paths.embeddings is None else load_file(paths.embeddings)
        text = ready["prompt"].reshape(1, -1, dit.text_dim)  # [L, D] or [1, L, D] -> [1, L, D]
        tokens = ready["image"].to(source.device, dtype) if dit.image_dim else None
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"calibration of {source.profile.name}: got ready embeddings without {error}, want tensors prompt"
            f"{' and image' if dit.image_dim else ''} of a clip; pass --embeddings"
        ) from error
    text = F.pad(text, (0, 0, 0, dit.text_len - text.shape[1]))  # zero rows up to text_len
    return Conditioning((text.to(source.device, dtype),), tokens)


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, dict[str, list[Tensor]]]]:
    """The largest magnitude of every layer's input, each time that it runs while this is open."""
    seen: dict[str, dict[str, list[Tensor]]] = {}
    hooks = []
    for name, module in modules.items():
        if isinstance(module, DiT):
            seen[name] = defaultdict(list)
            for layer, linear in block_linears(module).items():

                def see(_: nn.Module, inputs: tuple[Tensor], name: str = name, layer: str = layer) -> None:
                    seen[name][layer].append(inputs[0].abs().amax())

                hooks.append(linear.register_forward_pre_hook(see))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _key(source: Source, given: Conditioning) -> str:
    """SHA-256 (hex) of all that decides the scales."""
    rows = [*given.texts, *([] if given.image_tokens is None else [given.image_tokens])]
    seen = [hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest() for tensor in rows]
    said = [to_plain(calibration_profile(source.profile)), source.record.sha256, source.precision, MARGIN, seen]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
