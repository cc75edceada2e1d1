"""Names and shapes of the public checkpoints: what a tensor is called in each layout, and which model they make.

Pure functions on names, shapes and a parsed config.json; nothing is opened here. Facts: Wan-Video and diffusers.
`source` is what an error calls the checkpoint. `names` maps our name of a tensor to its name in the checkpoint.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, isqrt
from typing import Any

from .errors import WeightsError
from .presets import WAN21_MEAN, WAN21_STD, WAN22_MEAN, WAN22_STD
from .profile import DiTConfig, VAEConfig

Shapes = Mapping[str, tuple[int, ...]]

WAN_HEAD_DIM = 128  # of every public Wan DiT; a checkpoint without a config.json does not say
STATISTICS = {16: (WAN21_MEAN, WAN21_STD), 48: (WAN22_MEAN, WAN22_STD)}  # likewise, by latent channels
FLOATS = ("F32", "F16", "BF16")  # as safetensors writes them
# What exporters put before every name: ComfyUI, and DiffSynth's `model.`.
DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "model.", "")
# Old diffusers exports carry a norm that nothing uses; `freqs` is the original's RoPE table, which is computed here.
EXTRAS = re.compile(r"(model\.)?(diffusion_model\.)?(blocks\.\d+\.attn2\.norm_added_q\.weight|freqs)")
ROTARY = re.compile(r"blocks\.\d+\.self_attn\.(q|k|norm_q|norm_k)\.(weight|bias)")
# The original computes these in fp32; they are small.
FP32 = re.compile(r"time_(embedding|projection)\.|(blocks\.\d+|head)\.modulation|blocks\.\d+\.(\w+\.)?norm")

# Modules of a DiT: diffusers -> original.
DIT_TOP = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "proj_out": "head.head",
}
DIT_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",  # each counts its norms in its own way; the other two have no weights
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def dit_name_from_diffusers(name: str) -> str | None:
    """The original Wan name of a diffusers DiT tensor, None if diffusers has no such name."""
    if name == "scale_shift_table":
        return "head.modulation"
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    if block and block[2] == "scale_shift_table":
        return f"{block[1]}modulation"
    prefix, rest, table = (block[1], block[2], DIT_BLOCK) if block else ("", name, DIT_TOP)
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{table[module]}.{leaf}" if module in table else None


def is_rotary(name: str) -> bool:
    """Whether the rows of a DiT tensor (original name) are in half-split order here."""
    return ROTARY.fullmatch(name) is not None


def stays_fp32(name: str) -> bool:
    """Whether a DiT tensor (original name) keeps fp32 in a model of lower precision."""
    return FP32.match(name) is not None


def dit_names(checkpoint: Iterable[str], source: str) -> dict[str, str]:
    """Original Wan name -> name in the checkpoint. Harmless extras are left out; WeightsError if it is no DiT."""
    kept = [name for name in checkpoint if not EXTRAS.fullmatch(name)]
    bare = _without_prefix(kept, DIT_PREFIXES, ("patch_embedding.weight",), "DiT", source)
    if "condition_embedder.time_proj.weight" not in bare:
        return bare
    unknown = [full for name, full in bare.items() if dit_name_from_diffusers(name) is None]
    _refuse(source, "unknown tensors", unknown, "those of a diffusers Wan DiT; this model has parts we lack")
    return {dit_name_from_diffusers(name) or name: full for name, full in bare.items()}


def vae_names(checkpoint: Iterable[str], source: str) -> dict[str, str]:
    """Our name -> name in the checkpoint. WeightsError if it is no Wan VAE."""
    markers = ("decoder.conv1.weight", "decoder.conv_in.weight")
    bare = _without_prefix(checkpoint, VAE_PREFIXES, markers, "VAE", source)
    nested = any(re.match(r"encoder\.down(samples\.\d+\.downsamples|_blocks\.\d+\.resnets)\.", n) for n in bare)
    column = 2 if "decoder.conv_in.weight" in bare else 1
    down = [name for name in bare if name.startswith("encoder.down")]
    stages = 1 + sum(name.endswith(".resample.1.weight") for name in down)
    # Rounded up, so that a file that lacks one is told which.
    res_blocks = -(-sum(name.endswith((".conv1.weight", ".residual.2.weight")) for name in down) // stages)
    modules = {row[column]: row[0] for row in vae_modules(stages, res_blocks, nested)}
    names, unknown = {}, []
    for name, full in bare.items():
        module, _, leaf = name.rpartition(".")
        if module in modules:
            names[f"{modules[module]}.{leaf}"] = full
        else:
            unknown.append(full)
    _refuse(source, "unknown tensors", unknown, "those of a Wan VAE; this model has parts we lack")
    return names


def vae_modules(stages: int, res_blocks: int, nested: bool) -> list[tuple[str, str, str]]:
    """Every module with weights as (ours, original, diffusers). Wan2.2 nests stages; Wan2.1 counts layers through."""
    rows = [("quant", "conv1", "quant_conv"), ("post_quant", "conv2", "post_quant_conv")]
    ours_alone = [f"{side}.linear.{part}" for side in ("encoder", "decoder") for part in ("first", "next")]
    rows += [(name, name, name) for name in ours_alone]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        rows += [(f"{side}.conv_in", f"{side}.conv1", f"{side}.conv_in")]
        rows += [(f"{side}.norm_out", f"{side}.head.0", f"{side}.norm_out")]
        rows += [(f"{side}.conv_out", f"{side}.head.2", f"{side}.conv_out")]
        middle, theirs = f"{side}.middle", f"{side}.mid_block"
        rows += _res_block(f"{middle}.block1", f"{middle}.0", f"{theirs}.resnets.0")
        rows += _res_block(f"{middle}.block2", f"{middle}.2", f"{theirs}.resnets.1")
        for part in ("norm", "to_qkv", "proj"):
            rows += [(f"{middle}.attention.{part}", f"{middle}.1.{part}", f"{theirs}.attentions.0.{part}")]
        layers = res_blocks + (side == "decoder")
        for b in range(stages):
            for j in range(layers + 1):  # the last one is the resampling
                flat = b * (layers + 1) + j
                list_name = f"{side}.{way}samples"
                original = f"{list_name}.{b}.{way}samples.{j}" if nested else f"{list_name}.{flat}"
                stage = f"{side}.{way}_blocks.{b}"
                if j < layers:
                    flat_encoder = not nested and side == "encoder"
                    theirs = f"{side}.{way}_blocks.{flat}" if flat_encoder else f"{stage}.resnets.{j}"
                    rows += _res_block(f"{side}.stages.{b}.blocks.{j}", original, theirs)
                elif b < stages - 1:
                    flat_name = f"{stage}.upsamplers.0" if side == "decoder" else f"{side}.{way}_blocks.{flat}"
                    theirs = f"{stage}.{way}sampler" if nested else flat_name
                    for ours, part in (("conv", "resample.1"), ("time_conv", "time_conv")):
                        rows += [(f"{side}.stages.{b}.resample.{ours}", f"{original}.{part}", f"{theirs}.{part}")]
    return rows


def vae_names_in_diffusers(config: VAEConfig, names: Iterable[str]) -> dict[str, str]:
    """Our name of a tensor -> its name in diffusers' AutoencoderKLWan."""
    modules = {ours: theirs for ours, _, theirs in vae_modules(len(config.mult), config.res_blocks, config.residual)}
    parts = ((name, *name.rpartition(".")) for name in names)
    return {name: f"{modules[module]}.{leaf}" for name, module, _, leaf in parts}


def _res_block(ours: str, original: str, diffusers: str) -> list[tuple[str, str, str]]:
    parts = (
        ("norm1", "residual.0", "norm1"),
        ("conv1", "residual.2", "conv1"),
        ("norm2", "residual.3", "norm2"),
        ("conv2", "residual.6", "conv2"),
        ("shortcut", "shortcut", "conv_shortcut"),
    )
    return [(f"{ours}.{a}", f"{original}.{b}", f"{diffusers}.{c}") for a, b, c in parts]


def dit_config(shapes: Shapes, config: Mapping[str, Any], source: str) -> DiTConfig:
    """The DiT that tensors of these shapes (original names) make; config.json adds what shapes do not say."""
    dim = _size(shapes, "patch_embedding.weight", 0, source)
    image = any(name.startswith("img_emb.") for name in shapes)
    heads = _heads(dim, config, source)
    found = DiTConfig(
        dim=dim,
        ffn_dim=_size(shapes, "blocks.0.ffn.0.weight", 0, source),
        heads=heads,
        layers=_count(shapes, "blocks.", source),
        in_channels=_size(shapes, "patch_embedding.weight", 1, source),
        out_channels=_size(shapes, "head.head.weight", 0, source) // 4,
        text_dim=_size(shapes, "text_embedding.0.weight", 1, source),
        text_len=_given(config, "text_len", int, 512, source),
        freq_dim=_size(shapes, "time_embedding.0.weight", 1, source),
        image_dim=_size(shapes, "img_emb.proj.1.weight", 1, source) if image else 0,
        image_tokens=_given(config, "image_tokens", int, 257, source),
        eps=float(_given(config, "eps", (int, float), 1e-6, source)),
    )
    original = dit_config_json(found)
    diffusers = {"in_channels": found.in_channels, "out_channels": found.out_channels}
    diffusers |= {"attention_head_dim": found.head_dim, "patch_size": [1, 2, 2], "window_size": [-1, -1]}
    _agree(config, original | diffusers, source)
    return found


def dit_config_json(config: DiTConfig) -> dict[str, Any]:
    """The config.json of a DiT in the original Wan's words, with the few it lacks."""
    return {
        "_class_name": "WanModel",
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "text_dim": config.text_dim,
        "text_len": config.text_len,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "image_tokens": config.image_tokens,
        "eps": config.eps,
    }


def vae_config(shapes: Shapes, config: Mapping[str, Any], source: str) -> VAEConfig:
    """The VAE that tensors of these shapes (our names) make; config.json adds the latent statistics."""
    z = _size(shapes, "post_quant.weight", 0, source)
    width = _size(shapes, "encoder.conv_in.weight", 0, source)
    stages = _count(shapes, "encoder.stages.", source)
    firsts = [f"encoder.stages.{i}.blocks.0.conv1.weight" for i in range(stages)]
    mult = tuple(_whole(_size(shapes, name, 0, source), width, name, source) for name in firsts)
    if not mult:
        raise WeightsError(f"{source}: got a VAE without stages, want at least one; the file is incomplete")
    widest = _size(shapes, "decoder.conv_in.weight", 0, source)
    downs = range(stages - 1)
    patch = isqrt(_size(shapes, "encoder.conv_in.weight", 1, source) // 3)
    up = shapes.get("decoder.stages.0.resample.conv.weight", (0, 1))  # Wan2.1 halves the channels here
    mean, std = _statistics(z, config, source)
    found = VAEConfig(
        latent_channels=z,
        encoder_dim=width,
        decoder_dim=_whole(widest, mult[-1], "decoder.conv_in.weight", source),
        mean=mean,
        std=std,
        mult=mult,
        res_blocks=_count(shapes, "encoder.stages.0.blocks.", source),
        temporal=tuple(any(n.startswith(f"encoder.stages.{i}.resample.time_conv.") for n in shapes) for i in downs),
        patch=patch,
        residual=up[0] == up[1],
        linear="encoder.linear.first.weight" in shapes,
    )
    # diffusers writes its default scale factors whatever the model; they follow from the rest.
    stated = {key: value for key, value in vae_config_json(found).items() if not key.startswith("scale_factor")}
    stated["linear"] = found.linear  # without its maps it would load as a plain one
    _agree(config, stated, source)
    return found


def vae_config_json(config: VAEConfig) -> dict[str, Any]:
    """The config.json of a VAE in the words of diffusers' AutoencoderKLWan."""
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.encoder_dim,
        "decoder_base_dim": config.decoder_dim,
        "z_dim": config.latent_channels,
        "dim_mult": list(config.mult),
        "num_res_blocks": config.res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal),
        "latents_mean": list(config.mean),
        "latents_std": list(config.std),
        "is_residual": config.residual,
        "in_channels": 3 * config.patch**2,
        "out_channels": 3 * config.patch**2,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_temporal": config.time,
        "scale_factor_spatial": config.spatial,
        **({"linear": True} if config.linear else {}),
    }


def check_dtypes(dtypes: Mapping[str, str], source: str) -> None:
    """Refuse anything but plain floats. `dtypes`: name in the checkpoint -> dtype in safetensors' words."""
    found = [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS and not EXTRAS.fullmatch(name)]
    _refuse(source, "quantised or foreign tensors", found, "fp32, fp16 or bf16; use the checkpoint before quantisation")


def check_tensors(names: Mapping[str, str], shapes: Shapes, want: Shapes, source: str) -> None:
    """Refuse tensors that the model lacks, misses, or has in another shape. `shapes` and `want` have our names."""
    unknown = [full for name, full in names.items() if name not in want]
    _refuse(source, "unknown tensors", unknown, "those of the model only; this model has parts we lack")
    missing = [name for name in want if name not in names]
    _refuse(source, "a checkpoint without tensors", missing, "all of the model; the file is incomplete")
    wrong = [f"{names[n]} {list(shapes[n])} for {list(want[n])}" for n in want if shapes[n] != want[n]]
    _refuse(source, "tensors of another shape", wrong, "one size throughout; the file mixes two models")


def _refuse(source: str, fault: str, found: Sequence[str], want: str) -> None:
    if found:
        shown = ", ".join(map(repr, found[:5])) + (", ..." if len(found) > 5 else "")
        raise WeightsError(f"{source}: got {fault}, {len(found)} of them ({shown}), want {want}")


def _without_prefix(
    checkpoint: Iterable[str], prefixes: Sequence[str], markers: Sequence[str], kind: str, source: str
) -> dict[str, str]:
    """Bare name -> name in the checkpoint, by the first prefix under which a marker of the model is found."""
    full = set(checkpoint)
    for prefix in prefixes:
        if any(prefix + marker in full for marker in markers):
            twice = [name for name in full if prefix and name.startswith(prefix) and name.removeprefix(prefix) in full]
            _refuse(source, "tensors with and without a prefix", sorted(twice), "each once; the file holds two models")
            return {name.removeprefix(prefix): name for name in sorted(full)}
    some = ", ".join(map(repr, sorted(full)[:3]))
    raise WeightsError(
        f"{source}: got {len(full)} tensors ({some}), want those of a Wan {kind}, {markers[0]!r} among them; "
        f"pass the {kind}'s file"
    )


def _size(shapes: Shapes, name: str, axis: int, source: str) -> int:
    if name not in shapes:
        raise WeightsError(f"{source}: got no tensor {name!r}, want all of the model; the file is incomplete")
    if len(shapes[name]) <= axis or not shapes[name][axis]:
        raise WeightsError(f"{source}: got {name!r} of shape {list(shapes[name])}, want more axes; pass another file")
    return shapes[name][axis]


def _whole(value: int, unit: int, name: str, source: str) -> int:
    if value % unit:
        raise WeightsError(f"{source}: got {value} channels in {name!r}, want a multiple of {unit}; pass another file")
    return value // unit


def _count(names: Iterable[str], before: str, source: str) -> int:
    """How many members a list has whose names begin with `before` and a number; they count from 0 without gaps."""
    pattern = re.compile(re.escape(before) + r"(\d+)\.")
    numbers = {int(match[1]) for name in names if (match := pattern.match(name))}
    gaps = set(range(len(numbers))) - numbers
    if gaps:
        raise WeightsError(f"{source}: got no '{before}{min(gaps)}', want it too; the file is incomplete")
    return len(numbers)


def _given(config: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any, source: str) -> Any:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
        raise WeightsError(f"{source} config.json {key}: got {value!r}, want a number above 0; correct config.json")
    return value


def _heads(dim: int, config: Mapping[str, Any], source: str) -> int:
    head_dim = _given(config, "attention_head_dim", int, WAN_HEAD_DIM, source)
    heads = _given(config, "num_heads", int, _given(config, "num_attention_heads", int, 0, source), source)
    if not heads and dim % head_dim == 0:
        heads = dim // head_dim
    if not heads:
        raise WeightsError(
            f"{source}: got width {dim}, which is no multiple of {head_dim}, want the number of heads; "
            "put config.json with num_heads beside it"
        )
    if dim % heads or dim // heads % 2:
        raise WeightsError(
            f"{source} config.json heads: got {heads} for width {dim}, want an even whole head size; "
            "correct config.json"
        )
    return heads


def _statistics(z: int, config: Mapping[str, Any], source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    given = config.get("latents_mean"), config.get("latents_std")
    if given == (None, None) and z in STATISTICS:
        return STATISTICS[z]
    mean, std = _numbers(given[0]), _numbers(given[1])
    if len(mean) != z or len(std) != z or min(std) <= 0:
        raise WeightsError(
            f"{source} latent statistics: got {given[0]!r} and {given[1]!r} for {z} latent channels, want a number for "
            "each in latents_mean and, above 0, in latents_std; complete config.json"
        )
    return mean, std


def _numbers(values: object) -> tuple[float, ...]:
    """A list of finite numbers as floats; empty if it is anything else."""
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and isfinite(v) for v in values):
        return ()
    return tuple(map(float, values))


def _agree(config: Mapping[str, Any], found: Mapping[str, Any], source: str) -> None:
    """Refuse a config.json that contradicts what the tensors' shapes say; null and unknown keys say nothing."""
    for key, want in found.items():
        got = config.get(key)
        if got is not None and not key.startswith("_") and got != (1 if want is None else want):
            raise WeightsError(
                f"{source} config.json {key}: got {got!r}, want {want!r} as the tensors say; "
                "put the config.json of this checkpoint beside it"
            )
