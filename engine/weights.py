"""Checkpoints on disk: the only file of the engine that opens files.

safetensors at run time; pickles are converted once, explicitly. Tensors are mapped from the file, not copied, so
loading takes about one model of memory, and on the CPU without a change of dtype hardly any. A loaded file must
therefore not be overwritten in place; what is written here is written beside it and renamed.
"""

import hashlib
import json
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from .checkpoint import PICKLES, State, first_line, flat_tensors, foreign_file, shard_table
from .dit import DiT
from .errors import WeightsError
from .layouts import (
    check_dtypes,
    check_tensors,
    dit_config,
    dit_config_json,
    dit_names,
    is_rotary,
    stays_fp32,
    vae_config,
    vae_config_json,
    vae_names,
    vae_names_in_diffusers,
)
from .lora import merge_loras, with_alphas
from .profile import DiTConfig, VAEConfig
from .rope import half_split_order
from .text import WordEncoder
from .vae import VAE

AnyPath = str | os.PathLike[str]
Model = TypeVar("Model", bound=nn.Module)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX = ".safetensors.index.json"
FILE_NAME = "diffusion_pytorch_model.safetensors"  # the name that Wan and diffusers both use


class Kind(NamedTuple):
    """What tells a DiT's checkpoint from a VAE's."""

    build: type[nn.Module]
    names: Callable[[State, str], dict[str, str]]
    config: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any], str], Any]
    foreign: tuple[str, ...]  # a folder may hold the config.json of one model and a file of another


DIT = Kind(DiT, dit_names, dit_config, ("AutoencoderKLWan",))
VIDEO_VAE = Kind(VAE, vae_names, vae_config, ("WanModel", "WanTransformer3DModel"))


def read_state(path: AnyPath) -> State:
    """Open a .safetensors file, a *.safetensors.index.json, or a folder that holds exactly one of them.

    WeightsError for anything else, for a damaged file, and for an index that names files outside its folder.
    """
    source, path = str(path), Path(path)
    metadata: dict[str, str] = {}
    if path.is_dir():
        path = _only_checkpoint(path)
    if path.name.endswith(INDEX):
        files = _open_shards(path)
    elif path.suffix == ".safetensors":
        file = _open(path)
        files = dict.fromkeys(file.keys(), file)
        metadata = file.metadata() or {}
    else:
        raise WeightsError(foreign_file(path))
    config = path.parent / "config.json"
    return State(source, _read_json(config) if config.is_file() else {}, files, metadata)


def load_dit(
    path: AnyPath,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    in_channels: int | None = None,
    loras: Sequence[tuple[AnyPath, float]] = (),
) -> DiT:
    """A DiT from a checkpoint in the original, diffusers or ComfyUI layout, with LoRAs (path, strength) merged.

    `dtype` fp32, fp16 or bf16; None keeps what each tensor has. More `in_channels` than the checkpoint has follow its
    own (latents first, reference after) and get zero weights, so the model computes what it did; LoRAs are merged
    before that. Time embedding, modulation and norms stay fp32, as Wan has them. In eval mode, without gradients.
    WeightsError names what does not fit.
    """
    _check_dtype(dtype)
    checkpoint, names, config = _opened(path, DIT)
    state = {name: checkpoint[full] for name, full in names.items()}
    if loras:
        merge_loras(state, [(str(lora), with_alphas(read_state(lora)), strength) for lora, strength in loras])
    if in_channels is not None:
        state["patch_embedding.weight"] = _widen(state["patch_embedding.weight"], in_channels, checkpoint.source)
        config = replace(config, in_channels=in_channels)
    order = half_split_order(config.dim, config.heads).to(device)
    for name, tensor in state.items():
        placed = tensor.to(device=device, dtype=torch.float32 if dtype and stays_fp32(name) else dtype)
        state[name] = placed[order] if is_rotary(name) else placed
    return _assigned(_on_meta(DiT, config), state)


def read_dit_config(path: AnyPath) -> DiTConfig:
    """The sizes of the DiT in a checkpoint, all its tensors checked by their headers; none is read."""
    return _opened(path, DIT)[2]


def read_vae_config(path: AnyPath) -> VAEConfig:
    """The sizes of the VAE in a checkpoint, all its tensors checked by their headers; none is read."""
    return _opened(path, VIDEO_VAE)[2]


def load_vae(path: AnyPath, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> VAE:
    """A VAE from a checkpoint in the original, diffusers or ComfyUI layout, Wan2.1 or Wan2.2. In eval mode.

    `dtype` fp32, fp16 or bf16 of the weights, None keeps; the latent statistics stay fp32. WeightsError names what does
    not fit.
    """
    _check_dtype(dtype)
    checkpoint, names, config = _opened(path, VIDEO_VAE)
    model = _on_meta(VAE, config)
    state = {name: checkpoint[full].to(device=device, dtype=dtype) for name, full in names.items()}
    model.mean = torch.tensor(config.mean, device=device).view(1, -1, 1, 1, 1)  # [z] -> [1, z, 1, 1, 1]
    model.std = torch.tensor(config.std, device=device).view(1, -1, 1, 1, 1)  # [z] -> [1, z, 1, 1, 1]
    return _assigned(model, state)


def save_dit(model: DiT, folder: AnyPath) -> Path:
    """Write a DiT in the original Wan layout with its config.json; returns the weights' path."""
    inverse = half_split_order(model.config.dim, model.config.heads).argsort()
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    rows = {name: tensor[inverse] for name, tensor in state.items() if is_rotary(name)}
    return _save(Path(folder), state | rows, dit_config_json(model.config))


def save_vae(model: VAE, folder: AnyPath) -> Path:
    """Write a VAE in the diffusers layout (AutoencoderKLWan) with its config.json; returns the weights' path."""
    config = model.config
    state = model.state_dict()
    names = vae_names_in_diffusers(config, state)
    return _save(
        Path(folder), {names[n]: tensor.detach().cpu() for n, tensor in state.items()}, vae_config_json(config)
    )


def load_words(path: AnyPath, *, device: torch.device | str = "cpu") -> WordEncoder:
    """The small word encoder, fp32, from what `save_words` wrote; sizes come from the tensors. In eval mode."""
    checkpoint = read_state(path)
    shapes = {name: checkpoint.shape(name) for name in checkpoint}
    try:
        (vocabulary, text_dim), (text_len, _) = shapes["embedding.weight"], shapes["positions"]
        with torch.device("meta"):
            model = WordEncoder(vocabulary, text_dim, text_len)
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{checkpoint.source}: got {sorted(checkpoint)[:3]}, want a word encoder's tensors; pass its file"
        ) from error
    check_tensors({name: name for name in shapes}, shapes, _shapes(model), checkpoint.source)
    return _assigned(model, {name: checkpoint[name].to(device, torch.float32) for name in checkpoint})


def save_words(model: WordEncoder, folder: AnyPath) -> Path:
    """Write the small word encoder; returns the weights' path."""
    path = Path(folder) / "model.safetensors"
    _write_safetensors(path, {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    return path


def fingerprint(*paths: AnyPath) -> str:
    """SHA-256 (hex) of the tensors and config.json of checkpoints, in the order given.

    It depends on names, dtypes, shapes, bytes and the parsed config, and not on file names or how a file is cut up.
    """
    digest = hashlib.sha256()
    for path in paths:
        checkpoint = read_state(path)
        digest.update(f"config {json.dumps(checkpoint.config, sort_keys=True)}\n".encode())
        for name in sorted(checkpoint):
            tensor = checkpoint[name]
            digest.update(f"{name} {checkpoint.dtype(name)} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # [...] -> [bytes]
    return digest.hexdigest()


def convert(source: AnyPath, out: AnyPath) -> dict[str, Any]:
    """Rewrite a pickled state dict as safetensors, once; the tensors do not change.

    `out` is a .safetensors file or a folder. The dict may lie under "state_dict", "model" or "module". Nothing in the
    pickle is executed: only tensors and plain containers are read. Returns the manifest, which is also written to
    <out>.manifest.json. WeightsError for anything but a flat dict of tensors.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".safetensors":
        out = out / f"{source.stem}.safetensors"
    tensors = flat_tensors(_unpickle(source), source)
    _write_safetensors(out, tensors)
    manifest = {
        "format": 1,
        "source": source.name,
        "source_sha256": _sha256(source),
        "tensors": len(tensors),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "output": out.name,
        "output_sha256": _sha256(out),
        "swifti2v": __version__,
    }
    _write_json(out.with_name(out.name + ".manifest.json"), manifest)
    return manifest


def _only_checkpoint(folder: Path) -> Path:
    """The one checkpoint of a folder; the files that an index lists are part of it."""
    indexes = sorted(folder.glob("*" + INDEX))
    listed = {name for index in indexes for name in shard_table(_read_json(index), index).values()}
    found = indexes + [file for file in sorted(folder.glob("*.safetensors")) if file.name not in listed]
    main = [file for file in found if file.name.startswith("diffusion_pytorch_model")]
    if len(found) == 1 or len(main) == 1:  # Wan's folders hold a DiT of that name, and other models beside it
        return main[0] if main else found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise WeightsError(f"{folder}: got {len(found)} checkpoints ({names}), want one; pass one of these files")
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise WeightsError(foreign_file(pickles[0]))
    raise WeightsError(
        f"{folder}: got a folder without *.safetensors, want one; pass the folder that holds the weights"
    )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise WeightsError(f"{path}: got no such file, want a checkpoint; correct the path") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: got a file that does not open ({first_line(error)}), want safetensors; fetch it again"
        ) from error


def _open_shards(index: Path) -> dict[str, Any]:
    """Tensor name -> open file, where the index and its files agree."""
    shards = shard_table(_read_json(index), index)
    opened = {name: _open(index.parent / name) for name in sorted(set(shards.values()))}
    held = {(tensor, name) for name, file in opened.items() for tensor in file.keys()}  # noqa: SIM118
    if held != set(shards.items()):
        some = ", ".join(repr(tensor) for tensor, _ in sorted(held ^ set(shards.items()))[:5])
        raise WeightsError(f"{index}: got files that differ from it ({some}), want the same tensors; fetch both again")
    return {tensor: opened[name] for tensor, name in shards.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: got unreadable JSON ({first_line(error)}), want an object; fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: got {type(value).__name__}, want a JSON object; fetch it again")
    return value


def _opened(path: AnyPath, kind: Kind) -> tuple[State, dict[str, str], Any]:
    """An open checkpoint of that kind, its names (ours -> the file's), and its configuration; all shapes checked."""
    checkpoint = read_state(path)
    check_dtypes({name: checkpoint.dtype(name) for name in checkpoint}, checkpoint.source)
    names = kind.names(checkpoint, checkpoint.source)
    shapes = {name: checkpoint.shape(full) for name, full in names.items()}
    config = kind.config(shapes, _config_of(checkpoint, kind.foreign), checkpoint.source)
    check_tensors(names, shapes, _shapes(_on_meta(kind.build, config)), checkpoint.source)
    return checkpoint, names, config


def _config_of(checkpoint: State, foreign: tuple[str, ...]) -> Mapping[str, Any]:
    """The checkpoint's config.json, {} if it belongs to another kind of model."""
    return {} if checkpoint.config.get("_class_name") in foreign else checkpoint.config


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise WeightsError(f"dtype: got {dtype}, want float32, float16 or bfloat16; pass one of these")


def _widen(weight: Tensor, channels: int, source: str) -> Tensor:
    """weight [D, C, 1, 2, 2] with zeros for further input channels -> [D, channels, 1, 2, 2]."""
    extra = channels - weight.shape[1]
    if extra < 0:
        raise WeightsError(
            f"{source}: got {weight.shape[1]} input channels, want at most {channels}; use the DiT of this profile"
        )
    return torch.cat((weight, weight.new_zeros(weight.shape[0], extra, *weight.shape[2:])), dim=1)


def _on_meta(build: type[Model], config: Any) -> Model:
    """A model whose tensors have shapes and no memory."""
    with torch.device("meta"):
        return build(config)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _assigned(model: Model, state: Mapping[str, Tensor]) -> Model:
    """The model with these tensors as its parameters, not copied."""
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _save(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    path = folder / FILE_NAME
    _write_safetensors(path, {name: tensor.contiguous() for name, tensor in state.items()})
    _write_json(folder / "config.json", config)
    return path


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    _write(path, lambda part: save_file(dict(tensors), part, metadata={"format": "pt"}))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, then rename: whoever reads it sees the old one or the new one, whole."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except (SafetensorError, OSError, ValueError) as error:
        with suppress(OSError):
            part.unlink()
        raise WeightsError(
            f"{path}: got an error while writing ({first_line(error)}), want the whole file; "
            "free space or choose another place"
        ) from error


def _unpickle(path: Path) -> object:
    if not path.is_file():
        raise WeightsError(f"{path}: got no such file, want a pickled checkpoint; correct the path")
    try:
        mapped = zipfile.is_zipfile(path)  # files of old torch versions cannot be mapped
        with warnings.catch_warnings():  # on pickles that are refused here anyway
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # torch raises whatever the damaged or foreign pickle led to
        raise WeightsError(
            f"{path}: got a pickle that is not plain weights ({first_line(error)}), want a state dict of tensors; "
            "get the weights from a source that offers them"
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
