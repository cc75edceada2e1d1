"""swifti2v-train: photographs in, trained models out. Every phase is one command, and goes on where it stopped."""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

from ..engine.errors import SwiftError
from ..engine.presets import PROFILES, get_profile
from ..engine.profile import Profile
from .adapt import AdaptConfig, adapt_task
from .checkpoint import load_ema
from .drawing import Drawer
from .dry_run import step_cost
from .log import Record, TrainingError
from .lora import TARGETS, save_lora
from .nano import PHASES, DitPhase, VaePhase, finish, fit, train_task, with_batch
from .photos import LOADED_SIDE, SPLITS, load_packed, load_split, pack
from .stage1 import ImageEncoder, Stage1Config
from .stage2 import Stage2Config
from .trainer import Task, TrainConfig, train

TEXELS = 1.5  # of a photograph for a pixel of a clip that shows all of it: cameras see less


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 0, with 1 for an error, 2 for wrong usage, 130 where it was interrupted."""
    options = _parser().parse_args(arguments)
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    try:
        options.run(options)
    except (SwiftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; the last save point stands, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("swifti2v-train", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    packing = commands.add_parser("pack", help="write the photographs to one file, for a machine without them")
    packing.add_argument("out", type=Path)
    _photo_options(packing)
    packing.set_defaults(run=_pack)

    phase = commands.add_parser("nano", help="train one phase of the nano models and write its finished weights")
    phase.add_argument("phase", choices=PHASES)
    phase.add_argument("-o", "--out", type=Path, required=True, help="folder of the training, one subfolder per phase")
    phase.add_argument("--models", type=Path, help="folder of finished models (default: OUT/models)")
    phase.add_argument("--start", type=Path, help="begin with the weights of this folder of finished models")
    phase.add_argument(
        "--linear", action="store_true", help="VAEs: linear maps fitted to principal components, in place of a training"
    )
    phase.add_argument(
        "--like", type=Path, help="turn those to resemble the latents of this folder's VAE, which DiTs know"
    )
    phase.add_argument("--workers", type=int, default=0, help="processes that draw clips ahead (default: none)")
    phase.add_argument(
        "--finish",
        action="store_true",
        help="end at --minutes: the rate falls to 0 until then, and the weights are written",
    )
    phase.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, faster after")
    _transition_option(phase)
    phase.add_argument(
        "--matching",
        type=float,
        metavar="WEIGHT",
        help="DiTs: of showing attention where in frame 0 to look (default 0.05; 0 = off)",
    )
    _run_options(phase)
    phase.set_defaults(run=_nano)

    lora = commands.add_parser("lora", help="train a LoRA for one stage of any profile")
    lora.add_argument("stage", choices=("stage1", "stage2"))
    lora.add_argument("-o", "--out", type=Path, help="folder of the training; lora.safetensors is written there")
    lora.add_argument("--profile", default="nano", choices=PROFILES)
    lora.add_argument("--model-dir", type=Path, help="folder of the models, as `swifti2v generate` reads it")
    lora.add_argument("--expert", choices=("high", "low"), help="Stage I of two experts: the one to train")
    lora.add_argument(
        "--lora", action="append", default=[], type=_merged_lora, metavar="STAGE=PATH[@STRENGTH]",
        help="merge one before training, such as a few-step one; STAGE is stage1, stage1_low or stage2; repeatable",
    )  # fmt: skip
    lora.add_argument("--embeddings", type=Path, help="file with the tensor `prompt`, in place of the text encoder")
    lora.add_argument("--rank", type=int, default=32)
    lora.add_argument("--alpha", type=float, default=32.0)
    lora.add_argument("--targets", default=TARGETS, help="pattern of the layers' names")
    for stage in ("stage1", "stage2"):
        lora.add_argument(f"--{stage}-steps", type=int, help="as you will generate with (default: the profile's)")
    _transition_option(lora)
    lora.add_argument("--no-checkpointing", action="store_true", help="keep all activations: more memory, less time")
    lora.add_argument("--dry-run", action="store_true", help="print memory and operations of a step, and stop")
    _run_options(lora)
    lora.set_defaults(run=_lora)
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--packed", type=Path, help="photographs written by `pack`")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=_count, help="threads of the training step (default: torch's)")
    parser.add_argument("--minutes", type=float, help="stop and save after this long; the same command goes on")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of TrainConfig")
    _photo_options(parser)


def _transition_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transition", type=float, metavar="SHARE", help="Stage II: share that Stage I has a hand in")


def _photo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--photos-dir", action="append", default=[], type=Path, help="folder of photographs; repeatable"
    )
    parser.add_argument("--allow-missing", action="store_true", help="go on without those that are not here")


def _count(text: str) -> int:
    """A whole number from 1 up. ValueError for anything else."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _pack(options: argparse.Namespace) -> None:
    counts = pack(SPLITS, options.out, options.photos_dir, allow_missing=options.allow_missing)
    print(", ".join(f"{count} {split}" for split, count in counts.items()))


def _nano(options: argparse.Namespace) -> None:
    name, phase = options.phase, PHASES[options.phase]
    train_config = _train_config(options, phase.train)
    phase = with_batch(phase, train_config.batch)
    phase = replace(phase, train=replace(train_config, timed=train_config.timed or options.finish))
    if options.transition is not None:
        if not (isinstance(phase, DitPhase) and isinstance(phase.config, Stage2Config)):
            raise TrainingError(f"{name}: got --transition, want the phase stage2, which alone has one; leave it out")
        phase = replace(phase, config=with_transition(phase.config, options.transition))
    if options.matching is not None:
        if not isinstance(phase, DitPhase):
            raise TrainingError(f"{name}: got --matching, want stage1 or stage2, which attend; leave it out")
        phase = replace(phase, config=with_matching(phase.config, options.matching))
    if options.like is not None and not options.linear:
        raise TrainingError(f"{name}: got --like without --linear, want it for linear maps alone; add --linear")
    if options.finish and options.minutes is None:
        raise TrainingError(f"{name}: got --finish without --minutes, want the time to end at; add --minutes")
    if options.linear and not isinstance(phase, VaePhase):
        raise TrainingError(f"{name}: got --linear, want it for vae1 or vae2 alone; leave it out")
    idle = [item for item in ("start", "minutes", "compile") if getattr(options, item) not in (None, False)]
    if options.linear and idle:
        raise TrainingError(f"{name}: got --linear and --{idle[0]}, want one, as a fit is no training; leave one out")
    models = options.models or options.out / "models"
    drawer = Drawer(_photos(options), options.workers, options.device)
    try:
        if options.linear and isinstance(phase, VaePhase):
            fit(name, drawer, phase, models, options.like)
            print(models / name)
            return
        task = train_task(name, drawer, models, phase, compiled=options.compile, start=options.start)
        if _train(task, phase.train, options.out / name) or options.finish:
            finish(name, task, drawer, options.out, phase, models)
            print(models / name)
    finally:
        drawer.close()


def _lora(options: argparse.Namespace) -> None:
    profile, checkpointing = get_profile(options.profile), not options.no_checkpointing
    profile = profile.override(stage1_steps=options.stage1_steps, stage2_steps=options.stage2_steps)
    if options.dry_run:
        _print_cost(profile, options.stage, options.rank, options.targets, checkpointing)
        return
    missing = [name for name in ("out", "model_dir") if getattr(options, name) is None]
    if missing:
        raise TrainingError(f"lora: got no {' and no '.join(missing)}, want both to train; pass -o and --model-dir")
    if options.expert is not None and options.stage == "stage2":
        raise TrainingError(f"lora: got --expert {options.expert} for stage2, want it for stage1 alone; leave it out")
    if options.transition is not None and options.stage == "stage1":
        raise TrainingError("lora: got --transition for stage1, want it for stage2 alone; leave it out")
    merged = {name: [lora for other, lora in options.lora if other == name] for name, _ in options.lora}
    config = AdaptConfig(
        _train_config(options, TrainConfig(1000, bf16=options.device != "cpu")), options.rank, options.alpha,
        options.targets, checkpointing=checkpointing, expert=options.expert, merged=merged,
    )  # fmt: skip
    if options.transition is not None:
        config = replace(config, stage2=with_transition(config.stage2, options.transition))
    photos = _photos(options, round(TEXELS * profile.width))

    def open_images(path: Path) -> ImageEncoder:
        from ..runtime.encoders import ClipVisionEncoder

        return ClipVisionEncoder.open(path, options.device)

    task = adapt_task(profile, options.stage, options.model_dir, photos, config, options.embeddings, open_images)
    if _train(task, config.train, options.out):
        load_ema(options.out, task.modules)
        print(save_lora(task.lora, options.out / "lora.safetensors"))


def _merged_lora(text: str) -> tuple[str, tuple[Path, float]]:
    """STAGE=PATH or STAGE=PATH@STRENGTH, as `swifti2v generate --lora`. ValueError for anything else."""
    stage, _, rest = text.partition("=")
    path, at, strength = rest.rpartition("@")
    if stage not in ("stage1", "stage1_low", "stage2") or not rest:
        raise ValueError(text)
    return stage, (Path(path), float(strength)) if at else (Path(rest), 1.0)


def _train_config(options: argparse.Namespace, config: TrainConfig) -> TrainConfig:
    return with_changes(config, options.set, device=options.device, minutes=options.minutes)


def _train(task: Task, config: TrainConfig, folder: Path) -> bool:
    """Train with a line for each record; whether it is done."""
    started = time.monotonic()

    def show(record: Record) -> None:
        shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
        minutes = (time.monotonic() - started) / 60
        line = f"{folder.name} {shown.pop('step')}/{config.steps} {json.dumps(shown)} {minutes:.1f} min"
        print(line, file=sys.stderr, flush=True)

    done = train(task, config, folder, show)
    if done < config.steps:
        after = "the time is up" if config.timed else "the same command goes on"
        print(f"{folder}: {done} of {config.steps} steps done; {after}", file=sys.stderr)
    return done == config.steps


def _photos(options: argparse.Namespace, side: int = 0) -> list[np.ndarray]:
    """The photographs for training, their longer sides up to `side` pixels where that is more than usual."""
    if options.packed is not None:
        if options.photos_dir:
            raise TrainingError("photographs: got --packed and --photos-dir, want one of them; leave one out")
        return load_packed(options.packed, "train")
    side = max(side, LOADED_SIDE)
    return load_split("train", options.photos_dir, allow_missing=options.allow_missing, side=side)


def with_transition(config: Stage2Config, share: float) -> Stage2Config:
    """The configuration with Stage I having a hand in that share of the samples' references."""
    if not 0 <= share <= 1:
        raise TrainingError(f"--transition: got {share}, want a share of the samples from 0 to 1; correct it")
    return replace(config, transition=replace(config.transition, probability=share))


def with_matching(config: Stage1Config | Stage2Config, weight: float) -> Stage1Config | Stage2Config:
    """The configuration with that weight of the attention's loss."""
    if not 0 <= weight < math.inf:
        raise TrainingError(f"--matching: got {weight}, want 0 or a weight above it; correct it")
    return replace(config, matching=replace(config.matching, weight=weight))


def with_changes(config: TrainConfig, changes: Sequence[str], **more: Any) -> TrainConfig:
    """The configuration with NAME=VALUE changes, each read as its field's type."""
    hints, values = get_type_hints(TrainConfig), dict(more)
    for change in changes:
        name, _, text = change.partition("=")
        if name not in {item.name for item in fields(config)}:
            raise TrainingError(f"--set: got {change!r}, want a field of TrainConfig, as steps=500; see its docstring")
        try:
            values[name] = _parse(text, hints[name])
        except ValueError as error:
            raise TrainingError(f"--set: got {change!r}, want {name} as {hints[name]}; write it so") from error
    return replace(config, **values)


def _parse(text: str, hint: Any) -> Any:
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if hint in (int, float, str):
        return hint(text)
    value = json.loads(text)  # lists, and null
    return tuple(value) if isinstance(value, list) else value


def _print_cost(profile: Profile, name: str, rank: int, targets: str, checkpointing: bool) -> None:
    """A table of what one step of the LoRA, and of all weights, costs."""
    stage = profile.stage1 if name == "stage1" else profile.stage2
    blocks = profile.blocks if name == "stage1" else 1 + profile.neighbours + profile.noisy
    window = (blocks, stage.latent_height, stage.latent_width)
    costs = [step_cost(stage.dit, window, r, checkpointed=checkpointing, targets=targets) for r in (rank, None)]
    print(f"{profile.name} {name}, {blocks} latent blocks, {costs[0].tokens:,} tokens, batch 1, bf16")
    print(f"{'':<22}{f'LoRA rank {rank}':>16}{'all weights':>16}")
    rows = {"TFLOP a step": "tflop", "GB weights": "weights", "GB trained, fp32": "trained",
            "GB activations kept": "kept", "GB together": "total"}  # fmt: skip
    for label, field in rows.items():
        print(f"{label:<22}" + "".join(f"{getattr(cost, field):>16.1f}" for cost in costs))


if __name__ == "__main__":
    main()
