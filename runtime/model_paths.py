"""Where the weights of a profile are, and which profile they make: all that can be refused before anything is read.

A model folder holds `stage1`, `stage2`, `vae1`, `vae2`, `text` (and `stage1_low`, `image_encoder` where the models
have them), each a file or folder in any layout that engine/weights.py reads. Single paths override its entries.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from ..engine.checkpoint import find_entry, find_experts
from ..engine.errors import WeightsError
from ..engine.presets import A14B_BOUNDARY
from ..engine.profile import Profile
from ..engine.weights import read_dit_config, read_vae_config

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
NEEDED = ("stage1", "stage2", "vae1", "vae2")
Lora = tuple[Path, float]  # file and strength


@dataclass(frozen=True)
class ModelPaths:
    """Files or folders of a profile's models; all None means untrained weights from a seed."""

    stage1: Path | None = None
    stage1_low: Path | None = None  # the second expert of a Wan2.2-I2V-A14B
    stage2: Path | None = None
    vae1: Path | None = None
    vae2: Path | None = None
    text: Path | None = None
    image_encoder: Path | None = None
    embeddings: Path | None = None  # ready ones, in place of `text` and `image_encoder`
    loras: dict[str, tuple[Lora, ...]] = field(default_factory=dict)  # by stage1, stage1_low, stage2

    @property
    def given(self) -> dict[str, Path]:
        """The paths that are set, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "loras"}
        return {name: path for name, path in values.items() if path is not None}

    @property
    def trained(self) -> bool:
        """Whether these are checkpoints at all."""
        return self.stage1 is not None


def find_models(profile: Profile, folder: Path | None = None, single: ModelPaths | None = None) -> ModelPaths:
    """Resolve a model folder and single paths; with neither, the weights shipped for the profile, if there are any.

    WeightsError for what is missing, does not exist, or would go unused.
    """
    single = single or ModelPaths()
    shipped = SHIPPED / profile.name
    if folder is None and not any(name in single.given for name in NEEDED) and shipped.is_dir():
        folder = shipped
    found = {name: path for name in ModelPaths().__dataclass_fields__ if (path := _entry(folder, name)) is not None}
    paths = _split_experts(ModelPaths(**{**found, **single.given}, loras=single.loras))
    files = list(paths.given.items()) + [
        (f"{name} LoRA", lora) for name in paths.loras for lora, _ in paths.loras[name]
    ]
    for name, path in files:
        if not path.exists():
            raise WeightsError(f"{name}: got {path}, want a file or folder that exists; check the path")
    _check_loras(paths)
    missing = [name for name in NEEDED if getattr(paths, name) is None]
    if missing and (files or folder is not None):
        raise WeightsError(
            f"models of {profile.name}: got no {', '.join(missing)}, want all of {', '.join(NEEDED)}; "
            "pass --model-dir with those entries, or each by its option"
        )
    return paths


def _entry(folder: Path | None, name: str) -> Path | None:
    """What the model folder has under that name; LoRAs are never looked for there."""
    if folder is None or name == "loras":
        return None
    if not folder.is_dir():
        raise WeightsError(f"model folder: got {folder}, want a folder; check the path")
    return find_entry(folder, name)


def _split_experts(paths: ModelPaths) -> ModelPaths:
    """A stage1 folder that holds two experts is taken as both."""
    if paths.stage1 is None or paths.stage1_low is not None:
        return paths
    experts = find_experts(paths.stage1)
    return paths if experts is None else replace(paths, stage1=experts[0], stage1_low=experts[1])


def _check_loras(paths: ModelPaths) -> None:
    """Refuse LoRAs for models that are not there, and one expert of two left without."""
    stages = [name for name in ("stage1", "stage1_low", "stage2") if getattr(paths, name) is not None]
    unused = [name for name, loras in paths.loras.items() if loras and name not in stages]
    if unused:
        raise WeightsError(
            f"LoRAs: got some for {', '.join(unused)}, "
            f"want only {', '.join(stages) or 'none, with untrained weights'}; pass them for a model that is there"
        )
    if paths.stage1_low is not None and bool(paths.loras.get("stage1")) != bool(paths.loras.get("stage1_low")):
        raise WeightsError(
            "LoRAs of Stage I: got one for one expert of two, want one for each; "
            "pass --lora stage1=HIGH and --lora stage1_low=LOW, with @0 for none"
        )


def fit_profile(profile: Profile, paths: ModelPaths) -> Profile:
    """The profile with the sizes that these checkpoints have, read from their headers.

    Refuses what cannot run together, before any weight is read.
    """
    if not paths.trained:
        if profile.text.kind != "words":
            raise WeightsError(
                f"models of {profile.name}: got none, want checkpoints of that size; pass --model-dir, see README"
            )
        return profile
    stage1, stage2 = read_dit_config(path_of(paths, "stage1")), read_dit_config(path_of(paths, "stage2"))
    if paths.stage1_low is not None and read_dit_config(paths.stage1_low) != stage1:
        raise WeightsError("stage1_low: got a DiT unlike stage1's, want the two experts of one model; pass those")
    if (stage1.text_dim, stage1.text_len) != (stage2.text_dim, stage2.text_len):
        raise WeightsError(
            f"text: got {stage1.text_len}x{stage1.text_dim} for Stage I and {stage2.text_len}x{stage2.text_dim} for "
            "Stage II, want the same; use DiTs made for one text encoder"
        )
    if paths.text is None and paths.embeddings is None:
        raise WeightsError(
            f"text encoder of {profile.name}: got none, want its folder or ready embeddings; "
            "pass --text or --embeddings"
        )
    if stage1.image_dim and paths.image_encoder is None and paths.embeddings is None:
        raise WeightsError(
            "image encoder: got none, want one, as this Stage I reads CLIP image tokens; "
            "pass --image-encoder, or --embeddings with a tensor `image`"
        )
    boundary = None if paths.stage1_low is None else A14B_BOUNDARY
    vae1, vae2 = read_vae_config(path_of(paths, "vae1")), read_vae_config(path_of(paths, "vae2"))
    return replace(
        profile,
        stage1=replace(profile.stage1, dit=stage1, vae=vae1, boundary=boundary),
        stage2=replace(profile.stage2, dit=stage2, vae=vae2),
    )


def path_of(paths: ModelPaths, name: str) -> Path:
    """The path of that name, which must be set."""
    path: Path | None = getattr(paths, name)
    if path is None:
        raise WeightsError(f"{name}: got no path, want one; use find_models")
    return path
