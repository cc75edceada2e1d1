"""`swifti2v render`: a list of shots to a folder, as a farm runs it."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..engine.errors import MediaError
from ..engine.profile import Profile
from ..engine.segments import plan_segments
from .cli_frames import frame_options, pick_colour
from .cli_main import OK
from .cli_models import Choice, choose, run_options
from .cli_options import PATH
from .cli_progress import NewsStyle, show_news
from .farm import FINISHED, Farm, Result, asked_for, look_at, read_request
from .farm_errors import FarmError
from .farm_folder import JOB, Output, ShotFolder, check_job
from .farm_lock import is_held
from .farm_shots import Shot, pick_shots, read_shots
from .session import Session

SOME_FAILED, TRY_AGAIN = 4, 75


class Shard(click.ParamType):
    """i/n, counted from 1."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        share, _, count = str(value).partition("/")
        if not (share.isdecimal() and count.isdecimal() and 1 <= int(share) <= int(count)):
            self.fail(f"got {value!r}, want I/N such as 1/4, from 1/N to N/N", param, ctx)
        return int(share), int(count)


@click.command()
@click.argument("shots", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="The job's folder; run again, it goes on there.")
@click.option("--format", "suffix", type=click.Choice(["mp4", "png", "exr"]), default="mp4", show_default=True)
@frame_options
@click.option("--select", metavar="NAME,...", help="Only these shots.")
@click.option("--index", metavar="RANGE", help="Only these shots, counted from 0, such as 0-3,7.")
@click.option("--shard", type=Shard(), help="Every N-th of them, from the I-th on: one share of N workers.")
@click.option("--allow-different", is_flag=True, help="Go on with a job that another kind of worker began.")
@click.option(
    "--state-every", type=click.IntRange(1), default=1, show_default=True,
    help="Segments after which what resumes the shot is saved; at 2K that is 13 GB.",
)  # fmt: skip
@run_options
@click.option("--progress", type=click.Choice(["bar", "json", "openjd", "none"]), default="bar", show_default=True)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes.")
@click.pass_context
def render(
    context: click.Context,
    shots: Path,
    output: Path,
    suffix: str,
    colour: str | None,
    first_frame: int,
    select: str | None,
    index: str | None,
    shard: tuple[int, int] | None,
    allow_different: bool,
    state_every: int,
    progress: NewsStyle,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> int:
    """Make every clip of the list SHOTS in a folder of its own. Exit code 4: some shots failed; 75: try again."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    try:
        picked = pick_shots(read_shots(shots), select, index, shard)
    except FarmError as error:
        raise click.UsageError(str(error)) from error
    files = Output(suffix, pick_colour(colour, f".{suffix}"), first_frame)
    if not output.absolute().parent.is_dir():
        raise click.UsageError(f"folder {output}: got no {output.parent}, want an existing one; create it first")
    choice = choose(context, rest)
    if dry_run:
        return _print_plan(choice, output, files, picked, as_json)
    if (output / JOB).is_file():
        check_job(output, choice.fitted, files)
        if all(_state_of(output, shot, choice.profile) == FINISHED for shot in picked):  # no models to open for that
            return _print_results(output, [Result(shot.name, "skipped") for shot in picked], as_json)
    loaded, hashes = choice.open(console)
    with Session.open(loaded) as session, show_news(console, "none" if quiet else progress) as on_news:
        farm = Farm(output, session, loaded, hashes, files, allow_different, state_every)
        return _print_results(output, farm.render(picked, on_news), as_json)


def _print_results(folder: Path, results: list[Result], as_json: bool) -> int:
    """Results on stdout, what went wrong on stderr. The exit code."""
    states = {result.status for result in results}
    code = TRY_AGAIN if "stopped" in states else SOME_FAILED if "failed" in states else OK
    code = TRY_AGAIN if code == OK and "busy" in states else code
    if as_json:
        found = [{"shot": r.shot, "status": r.status, "text": r.text, "folder": str(folder / r.shot)} for r in results]
        click.echo(json.dumps({"ok": code == OK, "exit_code": code, "result": {"shots": found}}))
    else:
        for result in results:
            click.echo(f"{result.status:<8} {folder / result.shot}")
    for result in results:
        if result.status in ("failed", "stopped"):
            click.echo(f"swifti2v: {result.shot}: {' '.join(result.text.split())}", err=True)
    if "busy" in states:
        click.echo("swifti2v: other workers have shots of this list; run it again to see them finished", err=True)
    return code


def _print_plan(choice: Choice, folder: Path, files: Output, shots: tuple[Shot, ...], as_json: bool) -> int:
    if (folder / JOB).is_file():
        check_job(folder, choice.fitted, files)
    plan = {**choice.plan(), "folder": str(folder), "format": files.format, "colour": files.colour}
    found = {shot.name: _state_of(folder, shot, choice.profile) for shot in shots}
    bad = any(state.startswith("refused") for state in found.values())
    code = SOME_FAILED if bad else OK
    if as_json:
        click.echo(json.dumps({"ok": not bad, "exit_code": code, "plan": {**plan, "shots": found}}, ensure_ascii=False))
    else:
        for key, value in (*plan.items(), *found.items()):
            click.echo(f"{key:<12} {value}")
    return code


def _state_of(job: Path, shot: Shot, profile: Profile) -> str:
    """One word on a shot: new, how far it is, finished, held by another worker, or refused and why."""
    folder = ShotFolder(job, shot.name)
    segments = len(plan_segments(profile.blocks, profile.noisy, profile.neighbours))
    try:
        state = look_at(folder, asked_for(shot, read_request(shot, profile, deep=False)), segments)
    except (FarmError, MediaError) as error:
        return f"refused: {error}"
    return f"{state}, held by another worker" if is_held(folder.lock) else state
