"""`swifti2v generate`: one image to one clip."""

import json
import time
from pathlib import Path
from typing import Any, Literal

import click
import torch
from PIL import Image
from rich.console import Console

from ..engine.errors import MediaError
from ..engine.profile import Profile, nearest_multiple, size_grid
from ..engine.segments import plan_segments
from .cli_bundle import backend_words, base_profile, bundle_device, bundle_paths, default_bundle, open_models
from .cli_options import (
    PATH,
    Device,
    cache_folder,
    make_paths,
    make_profile,
    model_options,
    pick_device,
    profile_options,
)
from .cli_progress import show_progress
from .contact_sheet import ContactSheet
from .fingerprints import fingerprints
from .image import IMAGE_SUFFIXES, check_target, fit_image, load_image
from .model_paths import ModelPaths, fit_profile
from .models import Loaded
from .session import OnProgress, Request, Session
from .sidecar import Run, describe, describe_profile, dtype_name, record_path, write_json
from .video import VIDEO_SUFFIXES, VideoWriter

PROFILE_KEYS = (
    "frames", "size", "noisy", "neighbours", "stage1_steps", "stage2_steps", "shift", "stage1_guidance",
    "stage2_guidance", "stage2_init", "strength",
)  # fmt: skip


@click.command()
@click.argument("image", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="The clip to write, OUT.mp4.")
@click.option("--prompt", default="", help="What moves, and how.")
@click.option("--negative", help="What to steer away from, where guidance is on.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--fit", type=click.Choice(["crop", "pad"]), default="crop", show_default=True, help="Fit of the image.")
@profile_options
@model_options
@click.option("--bundle", type=PATH, help="Run this compiled bundle; its profile is the default one then.")
@click.option("--device", type=Device(), default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), default="auto", show_default=True)
@click.option("--contact-sheet", type=PATH, help="Also write a PNG with frames of the whole clip.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.pass_context
def generate(
    context: click.Context,
    image: Path,
    output: Path,
    prompt: str,
    negative: str | None,
    seed: int,
    fit: Literal["crop", "pad"],
    profile_name: str,
    model_dir: Path | None,
    loras: tuple,
    bundle: Path | None,
    device: str,
    dtype: str,
    contact_sheet: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> None:
    """Make a clip from IMAGE: OUT.mp4, and OUT.mp4.json that says how it was made."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    _check_targets(image, output, contact_sheet)
    profile = make_profile(base_profile(context, profile_name, bundle), {key: rest.pop(key) for key in PROFILE_KEYS})
    paths = bundle_paths(profile, model_dir, make_paths(rest, loras), bundle)
    place, number = pick_device(bundle_device(bundle, device, dtype), dtype)
    picture = load_image(image)
    frame = fit_image(picture, profile.width, profile.height, fit)
    _note_shape(console, picture, profile, fit)
    if dry_run:
        _print_plan(profile, paths, place, number, bundle, as_json)
        return
    started = time.perf_counter()
    bundle = bundle or default_bundle(profile, paths, place, dtype, console)
    loaded = open_models(bundle, profile, paths, place, number)
    hashes = fingerprints(paths, loaded, cache_folder())
    _note_run(console, loaded)
    loading = time.perf_counter() - started
    request = Request(frame, prompt, negative, seed)
    sheet = ContactSheet(profile.frames) if contact_sheet is not None else None
    with Session.open(loaded) as session, show_progress(console, quiet) as on_progress:
        _write_clip(session, request, output, sheet, on_progress)
        seconds = {"loading": round(loading, 4), **session.timings.seconds()}
    record = describe(Run(output, image.name, fit, request, loaded, hashes, seconds))
    write_json(record_path(output), record)
    if sheet is not None and contact_sheet is not None:
        sheet.save(contact_sheet)
    if as_json:
        click.echo(json.dumps({"ok": True, "exit_code": 0, "result": record}, ensure_ascii=False))
    else:
        click.echo(str(output))


def _check_targets(image: Path, output: Path, contact_sheet: Path | None) -> None:
    """Refuse what cannot be written, or would replace the input, before any work is done."""
    targets: list[tuple[str, Path, tuple[str, ...]]] = [("video", output, VIDEO_SUFFIXES)]
    if contact_sheet is not None:
        targets.append(("contact sheet", contact_sheet, IMAGE_SUFFIXES))
    for kind, path, suffixes in targets:
        try:
            check_target(kind, path, suffixes)
        except MediaError as error:
            raise click.UsageError(str(error)) from error
        if path.resolve() == image.resolve():
            raise click.UsageError(f"{kind} {path}: got the input image, want another file; name a new one")


def _write_clip(
    session: Session, request: Request, output: Path, sheet: ContactSheet | None, on_progress: OnProgress | None
) -> None:
    profile = session.profile
    with VideoWriter(output, profile.width, profile.height, profile.fps) as writer:
        for chunk in session.generate(request, on_progress):
            writer.write(chunk.frames)
            if sheet is not None:
                sheet.add(chunk.frames, chunk.index)


def _note_shape(console: Console, picture: Image.Image, profile: Profile, fit: str) -> None:
    """Say so when fitting would cut or pad more than a third: an upright photo wants an upright clip."""
    kept = picture.width * profile.height / (picture.height * profile.width)
    if 2 / 3 < kept < 3 / 2:
        return
    grid = size_grid(profile)
    area = (profile.width * profile.height) ** 0.5
    ratio = (picture.width / picture.height) ** 0.5
    size = "x".join(str(nearest_multiple(round(side), grid)) for side in (area * ratio, area / ratio))
    done = "cuts away" if fit == "crop" else "pads"
    console.print(
        f"note: {done} much of this {picture.width}x{picture.height} image; --size {size} has its shape", style="yellow"
    )


def _note_run(console: Console, loaded: Loaded) -> None:
    profile = loaded.profile
    console.print(
        f"{profile.name}: {profile.frames} frames of {profile.width}x{profile.height}, {loaded.device}, "
        f"{dtype_name(loaded.dtype)}, {backend_words(loaded)}"
    )
    if not loaded.trained:
        console.print(
            "note: no trained weights are there for this profile; these are untrained ones from a seed. "
            "Every step runs as it will with trained weights, but all frames after the first are noise.",
            style="yellow",
        )


def _print_plan(
    profile: Profile, paths: ModelPaths, device: torch.device, dtype: torch.dtype, bundle: Path | None, as_json: bool
) -> None:
    if paths.trained or profile.text.kind == "words":
        profile = fit_profile(profile, paths)
    segments = plan_segments(profile.blocks, profile.noisy, profile.neighbours)
    missing = "untrained" if profile.text.kind == "words" else "none given"
    plan = {
        **describe_profile(profile),
        "segments": [{"context": [0, *s.context], "noisy": list(s.noisy)} for s in segments],
        "weights": {name: str(path) for name, path in paths.given.items()} or {"all": missing},
        "device": str(device),
        "dtype": dtype_name(dtype),
        **({} if bundle is None else {"bundle": str(bundle)}),
    }
    if as_json:
        click.echo(json.dumps({"ok": True, "exit_code": 0, "plan": plan}, ensure_ascii=False))
        return
    for key, value in plan.items():
        click.echo(f"{key:<12} {value}")
