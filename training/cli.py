"""swifti2v-train: photographs in, trained models out. Every phase is one command, and goes on where it stopped."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

from ..engine.errors import SwiftError
from ..engine.presets import get_profile
from .dry_run import step_cost
from .nano import PHASES, finish, train_task
from .photos import SPLITS, load_packed, load_split, pack
from .trainer import Record, TrainConfig, TrainingError, train


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 0, with 1 for an error, 2 for wrong usage, 130 where it was interrupted."""
    options = _parser().parse_args(arguments)
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
    phase.add_argument("--packed", type=Path, help="photographs written by `pack`")
    phase.add_argument("--device", default="cpu")
    phase.add_argument("--threads", type=int, help="threads of the training step (default: torch's)")
    phase.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, faster after")
    phase.add_argument("--minutes", type=float, help="stop and save after this long; the same command goes on")
    phase.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of TrainConfig")
    _photo_options(phase)
    phase.set_defaults(run=_nano)

    cost = commands.add_parser("cost", help="memory and operations of one training step, without running it")
    cost.add_argument("--profile", default="wan-2k")
    cost.add_argument("--lora", type=int, metavar="RANK", help="of a LoRA (default: all weights)")
    cost.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    cost.set_defaults(run=_cost)
    return parser


def _photo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--photos-dir", action="append", default=[], type=Path, help="folder of photographs; repeatable"
    )
    parser.add_argument("--allow-missing", action="store_true", help="go on without those that are not here")


def _pack(options: argparse.Namespace) -> None:
    counts = pack(SPLITS, options.out, options.photos_dir, allow_missing=options.allow_missing)
    print(", ".join(f"{count} {split}" for split, count in counts.items()))


def _nano(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    name, phase = options.phase, PHASES[options.phase]
    phase = replace(phase, train=with_changes(phase.train, options.set, device=options.device, minutes=options.minutes))
    photos = _photos(options)
    models = options.models or options.out / "models"
    task = train_task(name, photos, models, phase, compiled=options.compile, start=options.start)
    started = time.monotonic()

    def show(record: Record) -> None:
        shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
        left = (time.monotonic() - started) / 60
        print(f"{name} {shown.pop('step')}/{phase.train.steps} {json.dumps(shown)} {left:.1f} min", file=sys.stderr)

    done = train(task, phase.train, options.out / name, show)
    if done == phase.train.steps:
        finish(name, photos, options.out, phase, models)
        print(models / name)
    else:
        print(f"{name}: {done} of {phase.train.steps} steps done; the same command goes on", file=sys.stderr)


def _photos(options: argparse.Namespace) -> list[np.ndarray]:
    if options.packed is not None:
        return load_packed(options.packed, "train")
    return load_split("train", options.photos_dir, allow_missing=options.allow_missing)


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


def _cost(options: argparse.Namespace) -> None:
    profile = get_profile(options.profile)
    stage = profile.stage2
    window = (1 + profile.neighbours + profile.noisy, stage.latent_height, stage.latent_width)
    cost = step_cost(stage.dit, window, options.lora, checkpointed=not options.no_checkpointing)
    what = f"LoRA of rank {options.lora}" if options.lora else "all weights"
    print(f"{profile.name} Stage II, window of {window[0]} blocks, {cost.tokens:,} tokens, batch 1, {what}")
    print(f"operations  {cost.tflop:8.1f} TFLOP")
    for label in ("weights", "trained", "kept", "total"):
        print(f"{label:<11} {getattr(cost, label):8.1f} GB")


if __name__ == "__main__":
    main()
