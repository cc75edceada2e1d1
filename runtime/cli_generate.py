"""`swifti2v generate`: one image to one clip."""

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import click
from PIL import Image
from rich.console import Console

from ..engine.errors import MediaError
from ..engine.profile import Profile, nearest_multiple, size_grid
from ..engine.segments import plan_segments
from .cli_frames import PIPE, Target, frame_options
from .cli_models import Choice, choose, run_options
from .cli_options import PATH
from .cli_progress import show_progress
from .contact_sheet import ContactSheet
from .frame_pipe import Chroma
from .image import IMAGE_SUFFIXES, check_target, fit_image, load_image
from .session import OnProgress, Request, Session
from .sidecar import Run, describe, printable, write_json


@click.command()
@click.argument("image", type=PATH)
@click.option(
    "-o", "--output", type=PATH, required=True,
    help="The clip OUT.mp4, frames such as OUT.####.png or .exr, or - for y4m on stdout.",
)  # fmt: skip
@click.option("--prompt", default="", help="What moves, and how.")
@click.option("--negative", help="What to steer away from, where guidance is on.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--fit", type=click.Choice(["crop", "pad"]), default="crop", show_default=True, help="Fit of the image.")
@run_options
@frame_options
@click.option("--chroma", type=click.Choice(["420", "444"]), default="420", show_default=True, help="Colour of -o -.")
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
    colour: str | None,
    first_frame: int,
    chroma: Chroma,
    contact_sheet: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> None:
    """Make a clip from IMAGE, and a JSON file beside it that says how it was made."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    if as_json and output == PIPE and not dry_run:
        raise click.UsageError("--json: got -o - too, want stdout for one of them; leave one out")
    target = _check_targets(output, colour, first_frame, chroma, contact_sheet)
    choice = choose(context, rest)
    profile = choice.profile
    _keep_input(image, target, profile, contact_sheet)
    picture = load_image(image)
    frame = fit_image(picture, profile.width, profile.height, fit)
    _note_shape(console, picture, profile, fit)
    if dry_run:
        _print_plan(choice, as_json)
        return
    started = time.perf_counter()
    loaded, hashes = choice.open(console)
    loading = time.perf_counter() - started
    request = Request(frame, prompt, negative, seed, target.deep)
    sheet = ContactSheet(profile.frames) if contact_sheet is not None else None
    with Session.open(loaded) as session, show_progress(console, quiet) as on_progress:
        _write_clip(session, request, target, sheet, on_progress)
        seconds = {"loading": round(loading, 4), **session.timings.seconds()}
    record = describe(Run(output, image.name, fit, request, loaded, hashes, seconds))
    if target.record is not None:
        write_json(target.record, record)
    if sheet is not None and contact_sheet is not None:
        sheet.save(contact_sheet)
    if as_json:
        click.echo(json.dumps({"ok": True, "exit_code": 0, "result": record}, ensure_ascii=False))
    elif output != PIPE:
        click.echo(printable(str(output)))


def _check_targets(output: Path, colour: str | None, first: int, chroma: Chroma, contact_sheet: Path | None) -> Target:
    """Refuse what cannot be written before any work is done."""
    try:
        target = Target.check(output, colour, first, chroma)
        if contact_sheet is not None:
            check_target("contact sheet", contact_sheet, IMAGE_SUFFIXES)
    except MediaError as error:
        raise click.UsageError(str(error)) from error
    return target


def _keep_input(image: Path, target: Target, profile: Profile, contact_sheet: Path | None) -> None:
    """Refuse files that would replace the input."""
    sheets = set() if contact_sheet is None else {contact_sheet.resolve()}
    if image.resolve() in target.files(profile.frames) | sheets:
        raise click.UsageError(f"output {image}: got the input image, want another file; name a new one")


def _write_clip(
    session: Session, request: Request, target: Target, sheet: ContactSheet | None, on_progress: OnProgress | None
) -> None:
    said = {"seed": str(request.seed), "profile": session.profile.name}
    # On a GPU the next segment is made while one is encoded; on a CPU both would want the same cores.
    coming = session.generate(request, on_progress, ahead=session.device.type == "cuda")
    with target.open(session.profile, said) as write, closing(coming) as chunks:
        for chunk in chunks:
            write(chunk)
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


def _print_plan(choice: Choice, as_json: bool) -> None:
    plan = choice.plan()
    segments = plan_segments(plan["blocks"], plan["noisy"], plan["neighbours"])
    plan["segments"] = [{"context": [0, *s.context], "noisy": list(s.noisy)} for s in segments]
    if as_json:
        click.echo(json.dumps({"ok": True, "exit_code": 0, "plan": plan}, ensure_ascii=False))
        return
    for key, value in plan.items():
        click.echo(f"{key:<12} {value}")
