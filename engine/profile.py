"""Everything static about a run: grids, frames, windows, schedules and model configurations.

A Profile is plain numbers. Whatever depends on model, resolution or length is derived here, so that the
rest of the engine reads it and never computes it again.
"""

from dataclasses import dataclass, field, replace
from math import isfinite, lcm
from typing import Literal, get_args

from .errors import ProfileError
from .segments import plan_segments

MOST_FRAMES = 1_000_001  # over half a day at 16 frames a second: more is a slip, and its plan would fill the memory
Context = Literal["both", "one-way"]
Positions = Literal["absolute", "window"]
Stage2Init = Literal["noise", "reference"]


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a Wan-family diffusion transformer; the patch is always 1x2x2 (time, height, width)."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    in_channels: int
    out_channels: int
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    image_dim: int = 0  # width of the CLIP features; 0 = no image cross-attention
    image_tokens: int = 257
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.head_dim % 2:
            raise ProfileError(
                f"DiT heads: got {self.heads} for dim {self.dim}, want an even whole head size; change heads"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a Wan-family causal video VAE. `residual` is the Wan2.2 form (shortcuts around whole stages)."""

    latent_channels: int
    encoder_dim: int
    decoder_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)  # which down-samplings of the encoder also halve time
    patch: int = 1
    residual: bool = False
    linear: bool = False  # a linear map between the pixels and the channels of a cell, beside the network

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.latent_channels:
            raise ProfileError(
                f"VAE latent statistics: got {len(self.mean)} means and {len(self.std)} deviations, "
                f"want {self.latent_channels} of each; complete config.json"
            )

    @property
    def spatial(self) -> int:
        """Pixels per latent cell along height and width."""
        return self.patch * 2 ** len(self.temporal)

    @property
    def time(self) -> int:
        """Frames per latent block, after the first."""
        return 2 ** sum(self.temporal)


@dataclass(frozen=True)
class TextConfig:
    """The prompt encoder: `umt5` (transformers) or `words` (the small one of `nano`)."""

    kind: Literal["umt5", "words"] = "umt5"
    vocabulary: int = 256384
    negative: str = ""


@dataclass(frozen=True)
class StageConfig:
    """One stage: its pixel grid, models and schedule. Sizes in pixels."""

    width: int
    height: int
    dit: DiTConfig
    vae: VAEConfig
    steps: int = 4
    shift: float = 5.0
    sigmas: tuple[float, ...] | None = None  # explicit schedule; None = `steps` shifted, evenly spaced ones
    guidance: float = 1.0  # classifier-free guidance; 1 = off, one forward a step
    boundary: float | None = None  # two experts: sigma from which the high-noise one works

    @property
    def latent_height(self) -> int:
        return self.height // self.vae.spatial

    @property
    def latent_width(self) -> int:
        return self.width // self.vae.spatial

    @property
    def block_tokens(self) -> int:
        """Tokens of one latent block after 2x2 patching."""
        return (self.latent_height // 2) * (self.latent_width // 2)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the DiTs of this stage, in order of use."""
        return ("high", "low") if self.boundary is not None else ("",)


@dataclass(frozen=True)
class Profile:
    """A whole run: two stages, the length, and how Stage II is cut into segments."""

    name: str
    frames: int
    stage1: StageConfig
    stage2: StageConfig
    text: TextConfig = field(default_factory=TextConfig)
    fps: int = 16
    noisy: int = 3  # M: blocks made at once
    neighbours: int = 1  # N: clean blocks before them
    context: Context = "both"  # `one-way`: clean blocks do not see the noisy ones
    reuse_context: bool = False  # later steps read the clean blocks' keys and values of a segment's first step
    positions: Positions = "absolute"  # `window`: block positions count from 0 in every window
    reference: bool = True  # False: the reference channels are zero (an ablation)
    stage2_init: Stage2Init = "noise"  # `reference`: start from the noised reference (SDEdit)
    strength: float = 1.0  # the sigma at which `stage2_init = "reference"` starts

    def __post_init__(self) -> None:
        check_profile(self)

    @property
    def width(self) -> int:
        return self.stage2.width

    @property
    def height(self) -> int:
        return self.stage2.height

    @property
    def block_frames(self) -> int:
        """Frames of every latent block but the first, which is one frame."""
        return self.stage2.vae.time

    @property
    def blocks(self) -> int:
        """Latent blocks of the clip."""
        return (self.frames - 1) // self.block_frames + 1

    @property
    def concatenated(self) -> bool:
        """Whether Stage II reads the reference as extra input channels."""
        return self.stage2.dit.in_channels == 2 * self.stage2.vae.latent_channels

    @property
    def image_channels(self) -> bool:
        """Whether Stage I reads mask and image latents as extra channels (else its first block is the image)."""
        return self.stage1.dit.in_channels > self.stage1.dit.out_channels

    @property
    def guided(self) -> bool:
        """Whether any stage uses classifier-free guidance, and so reads the negative prompt."""
        return not self.stage1.guidance == self.stage2.guidance == 1.0

    @property
    def stage2_start(self) -> float | None:
        """The sigma that Stage II starts at, None for its schedule's own."""
        return self.strength if self.stage2_init == "reference" else None

    @property
    def windows(self) -> tuple[int, ...]:
        """The window lengths, in blocks, that Stage II needs graphs for."""
        first, later = 1 + self.noisy, 1 + self.neighbours + self.noisy
        return (first,) if self.blocks == first else (first, later)

    def override(
        self,
        *,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        noisy: int | None = None,
        neighbours: int | None = None,
        stage1_steps: int | None = None,
        stage2_steps: int | None = None,
        shift: float | None = None,
        stage1_guidance: float | None = None,
        stage2_guidance: float | None = None,
        reuse_context: bool | None = None,
    ) -> "Profile":
        """This profile with other numbers; None keeps. `size` is the final (width, height) in pixels."""
        stage1, stage2 = self.stage1, self.stage2
        if size is not None:
            check_size(size, self)
            scale = stage2.width // stage1.width
            stage1 = replace(stage1, width=size[0] // scale, height=size[1] // scale)
            stage2 = replace(stage2, width=size[0], height=size[1])
        stage1 = _with_schedule(stage1, stage1_steps, shift, stage1_guidance)
        stage2 = _with_schedule(stage2, stage2_steps, shift, stage2_guidance)
        changes = {"frames": frames, "noisy": noisy, "neighbours": neighbours, "reuse_context": reuse_context}
        kept = {name: value for name, value in changes.items() if value is not None}
        return replace(self, stage1=stage1, stage2=stage2, **kept)


def _with_schedule(stage: StageConfig, steps: int | None, shift: float | None, guidance: float | None) -> StageConfig:
    if steps is not None or shift is not None:  # explicit sigmas belong to the numbers they were made for
        stage = replace(stage, sigmas=None)
    return replace(
        stage,
        steps=stage.steps if steps is None else steps,
        shift=stage.shift if shift is None else shift,
        guidance=stage.guidance if guidance is None else guidance,
    )


def nearest_multiple(value: int, step: int) -> int:
    """The multiple of `step` nearest to `value`, at least one step."""
    return max(step, round(value / step) * step)


def size_grid(profile: Profile) -> int:
    """Final width and height are multiples of this many pixels, so that both stages have whole tokens."""
    scale = profile.stage2.width // profile.stage1.width
    return lcm(2 * profile.stage2.vae.spatial, 2 * profile.stage1.vae.spatial * scale)


def check_size(size: tuple[int, int], profile: Profile) -> None:
    """Refuse a final (width, height) in pixels that is off the grid."""
    grid = size_grid(profile)
    if any(side < grid or side % grid for side in size):
        near = "x".join(str(nearest_multiple(side, grid)) for side in size)
        raise ProfileError(f"size: got {size[0]}x{size[1]}, want multiples of {grid}; the nearest is {near}")


def check_profile(profile: Profile) -> None:
    """Refuse what cannot work, naming the nearest value that can."""
    stage1, stage2, step = profile.stage1, profile.stage2, profile.block_frames
    if stage1.vae.time != step:
        raise ProfileError(
            f"VAEs: got {stage1.vae.time} and {step} frames per latent block, want the same; change one VAE"
        )
    fewest = profile.noisy * step + 1
    if profile.noisy < 1:
        raise ProfileError(f"noisy blocks per segment: got {profile.noisy}, want 1 or more; the nearest is 1")
    if profile.neighbours < 0:
        raise ProfileError(f"neighbour blocks: got {profile.neighbours}, want 0 or more; the nearest is 0")
    if not fewest <= profile.frames <= MOST_FRAMES or (profile.frames - 1) % step:
        near = max(fewest, nearest_multiple(max(min(profile.frames, MOST_FRAMES) - 1, 1), step) + 1)
        bounds = f"at least {fewest}" if profile.frames <= MOST_FRAMES else f"at most {MOST_FRAMES:,}"
        raise ProfileError(f"frames: got {profile.frames}, want {step}k+1 and {bounds}; the nearest is {near}")
    plan_segments(profile.blocks, profile.noisy, profile.neighbours)
    if stage2.width % stage1.width or stage2.width * stage1.height != stage1.width * stage2.height:
        raise ProfileError(
            f"sizes: got {stage1.width}x{stage1.height} -> {stage2.width}x{stage2.height}, "
            "want one whole factor for both sides; change a size"
        )
    check_size((stage2.width, stage2.height), profile)
    for stage in (stage1, stage2):
        check_stage(stage)
    check_modes(profile)


def check_modes(profile: Profile) -> None:
    """Refuse a Stage II that does not fit the way it is asked to work."""
    dit, z = profile.stage2.dit, profile.stage2.vae.latent_channels
    if dit.in_channels not in (z, 2 * z) or dit.out_channels != z:
        raise ProfileError(
            f"Stage II channels: got {dit.in_channels} -> {dit.out_channels}, "
            f"want {2 * z} -> {z} (latents and reference) or {z} -> {z}; use a DiT that fits the VAE"
        )
    if not profile.concatenated and profile.stage2_init != "reference":
        raise ProfileError(
            f"Stage II: got a DiT of {z} input channels, which does not see the reference, "
            'want stage2_init "reference" with it; pass --stage2-init reference'
        )
    if not 0 < profile.strength <= 1:
        raise ProfileError(f"strength: got {profile.strength}, want more than 0 and at most 1; 0.7 is usual")
    if profile.strength != 1 and profile.stage2_init != "reference":
        raise ProfileError(
            f'strength: got {profile.strength} with stage2_init "{profile.stage2_init}", want "reference" with it; '
            "pass --stage2-init reference"
        )
    if not (isfinite(profile.fps) and profile.fps > 0):
        raise ProfileError(f"fps: got {profile.fps}, want more than 0; Wan's values are 16 and 24")
    choices = {"context": Context, "positions": Positions, "stage2_init": Stage2Init}
    for name, choice in choices.items():
        if getattr(profile, name) not in get_args(choice):
            raise ProfileError(f"{name}: got {getattr(profile, name)!r}, want one of {', '.join(get_args(choice))}")


def check_stage(stage: StageConfig) -> None:
    """Refuse a stage whose schedule or channels cannot work."""
    if stage.steps < 1:
        raise ProfileError(f"steps: got {stage.steps}, want 1 or more; the nearest is 1")
    if not isfinite(stage.guidance):
        raise ProfileError(f"guidance: got {stage.guidance}, want a number; 1 is off, Wan's values are 3.5 to 5")
    if not 1e-3 <= stage.shift <= 1e3:  # beyond, steps fall together
        raise ProfileError(f"shift: got {stage.shift}, want 0.001 to 1000; Wan's values are 3 and 5")
    if stage.sigmas is not None:
        falling = all(a > b for a, b in zip(stage.sigmas, stage.sigmas[1:], strict=False))
        if len(stage.sigmas) != stage.steps or not falling or not all(0 < s <= 1 for s in stage.sigmas):
            raise ProfileError(
                f"sigmas: got {stage.sigmas}, want {stage.steps} falling values above 0 and at most 1; "
                "leave out the final 0"
            )
    z = stage.vae.latent_channels
    if stage.dit.out_channels != z:
        raise ProfileError(
            f"DiT output channels: got {stage.dit.out_channels}, want the VAE's {z}; use the VAE the DiT was made for"
        )
