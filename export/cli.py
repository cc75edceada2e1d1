"""The command `swifti2v-export`: compiled bundles. Results on stdout, progress on stderr, one line for every error."""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from ..engine.errors import Cancelled, EnvironmentMismatch, ProfileError, SwiftError
from ..engine.graphs import profile_graphs
from ..engine.manifest import PRECISIONS, Precision, read_bundle
from ..engine.presets import PROFILES, get_profile
from ..runtime.backend_cache import bundle_folders, bundle_place, cache_folder
from ..runtime.backend_fit import check_machine, device_of
from ..runtime.backend_options import PATH, REUSE_HELP, make_paths, model_options
from ..runtime.backend_weights import Source, find_models, open_source
from .build import build_bundle
from .builders import BUILDERS, find_builder
from .calibration import quantise_as, quantise_source
from .cli_progress import show_build
from .part_folder import check_out
from .plan import Plan, plan_build, shape_words
from .target import Target, archs_here, make_target, pick_device, pick_precision
from .verify import verify_graphs

OK, FAILED, USAGE, ENVIRONMENT = 0, 1, 2, 3


class Terminated(BaseException):
    """SIGTERM as an exception, so that the build stops between two files."""


def weights_options(command: Callable) -> Callable:
    """The options of `swifti2v generate` for models, and this command's own name for their folder."""
    return click.option("--weights", type=PATH, help="Another name for --model-dir.")(model_options(command))


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="swifti2v")
@click.option("--profile", "profile_name", default="nano", show_default=True, help=f"{', '.join(PROFILES)}.")
@click.option("--frames", type=int, help="Length, 4k+1 frames.")
@click.option("--size", help="Final size in pixels, WIDTHxHEIGHT.")
@click.option("--noisy", type=int, help="M: latent blocks made at once.")
@click.option("--neighbours", type=int, help="N: clean blocks before them.")
@click.option("--reuse-context", is_flag=True, default=None, help=REUSE_HELP)
@weights_options
@click.option("--backend", type=click.Choice(list(BUILDERS)), help="What to compile with.")
@click.option("--precision", type=click.Choice(list(PRECISIONS)), help="What the backend is best in, if none.")
@click.option("--device", "kind", type=click.Choice(["cpu", "cuda"]), help="What to compile for, where both can be.")
@click.option("--arch", help="What to compile for, such as sm89,sm120, where the backend can; this machine if none.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Graphs compiled at once.")
@click.option("--graphs", help="Only these graphs, separated by commas.")
@click.option("--reuse", type=PATH, multiple=True, help="Take graphs from this bundle, too; may be repeated.")
@click.option("-o", "--output", type=PATH, help="The bundle to write; the user's cache, where generate looks, if none.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.pass_context
def cli(
    context: click.Context,
    profile_name: str,
    size: str | None,
    backend: str | None,
    precision: Precision | None,
    kind: str | None,
    arch: str | None,
    jobs: int,
    graphs: str | None,
    reuse: tuple[Path, ...],
    output: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> None:
    """Compile the graphs of a profile into a bundle that `swifti2v generate --bundle` runs.

    An interrupted build goes on where it stopped when the same command is run again.
    """
    if context.invoked_subcommand is not None:
        return
    if backend is None:
        raise click.UsageError(f"--backend: got none, want one of {', '.join(BUILDERS)}")
    numbers = {name: rest[name] for name in ("frames", "noisy", "neighbours", "reuse_context")}
    profile = get_profile(profile_name).override(**numbers, size=None if size is None else _size(size))
    names, archs = None if graphs is None else _listed(graphs), _listed(arch or "")
    device = pick_device(backend, kind, archs)
    chosen = pick_precision(backend, precision, device)
    archs = archs or archs_here(backend, device)
    if jobs > 1 and find_builder(backend).process_memory is None:
        raise click.UsageError(f"--jobs: got {jobs}, want 1 for {backend}, which compiles in this process")
    if dry_run:
        _print_plan(plan_build(profile, backend, chosen, names, jobs), archs, as_json)
        return
    if output is not None:
        check_out(output)
    for path in reuse:
        read_bundle(path)  # refused before the work, and not passed over
    cache = cache_folder(os.environ)
    single = make_paths(rest, rest["loras"])
    source = open_source(profile, _folder(rest), chosen, "cpu", cache, single)  # a GPU gets what it needs at a time
    out = output or default_place(cache, source, make_target(source, backend, archs))
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    if chosen == "fp8":
        make_target(source, backend, archs)  # refused before the work
        console.print(f"fp8: scales from clips of {source.record.source} weights")
        quantise_source(source, find_models(source.profile, _folder(rest), single), cache)
    with show_build(console, quiet) as on_progress:
        known = (*reuse, *bundle_folders(cache))
        bundle = build_bundle(source, backend, out, names, on_progress, archs, jobs, known)
    if as_json:
        seen = [record.parity for record in bundle.manifest.graphs.values() if record.parity is not None]
        worst = max(seen, default=None)
        facts = {"bundle": str(out), "digest": bundle.manifest.digest, "graphs": len(bundle.manifest.graphs)}
        _print_result({**facts, "seconds": bundle.manifest.seconds, "parity": worst})
    else:
        click.echo(str(out))


@cli.command()
@click.argument("path", type=PATH, metavar="BUNDLE")
@weights_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def verify(path: Path, as_json: bool, **rest: Any) -> None:
    """Check every file of BUNDLE, and run every graph beside eager. Takes the weights and LoRAs it was built from."""
    bundle = read_bundle(path)
    manifest, device = bundle.manifest, device_of(bundle)
    check_machine(bundle, device)  # before weights are loaded to it
    single, cache = make_paths(rest, rest["loras"]), cache_folder(os.environ)
    source = open_source(manifest.profile, _folder(rest), manifest.precision, device, cache, single)
    if manifest.precision == "fp8":
        quantise_as(source, bundle)
    errors: dict[str, float] = {}
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=as_json)
    for name, error in verify_graphs(bundle, source):
        built = manifest.graphs[name].parity
        then = "not run where it was built" if built is None else f"{built:.1e} when it was built"
        console.print(f"{name}: error {error:.1e}, {then}")
        errors[name] = error
    if as_json:
        _print_result({"bundle": str(path), "digest": manifest.digest, "parity": errors})
    else:
        click.echo(f"{path}: {len(errors)} graphs are whole and equal eager in {manifest.precision}")


def default_place(cache: Path, source: Source, target: Target) -> Path:
    """Where `swifti2v generate` looks for a bundle of these."""
    specs = [graph.spec for graph in profile_graphs(source.profile, PRECISIONS[source.precision]).values()]
    name, precision = source.profile.name, source.precision
    return bundle_place(cache, name, target.backend, precision, target.arch, source.record, specs)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 ok, 1 failed, 2 usage, 3 this machine does not fit, 130 and 143 signals."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(cli.main(arguments, prog_name="swifti2v-export", standalone_mode=False) or OK)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(USAGE)
    except Exception as error:
        code, text = _explain(error)
    except (KeyboardInterrupt, Terminated) as error:
        code, text = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (143, "terminated")
    if "--json" in arguments:
        with contextlib.suppress(OSError):  # stdout may be what failed
            click.echo(json.dumps({"ok": False, "exit_code": code, "error": text}))
    click.echo("swifti2v-export: " + " ".join(text.split()), err=True)
    sys.exit(code)


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and one line for an error; what nobody foresaw is shown with its traceback too."""
    if isinstance(error, (click.Abort, Cancelled)):
        return 130, "interrupted"
    if isinstance(error, click.ClickException):
        return USAGE, f"{error.format_message()} (see swifti2v-export --help)"
    if isinstance(error, SwiftError):
        codes = {ProfileError: USAGE, EnvironmentMismatch: ENVIRONMENT}
        return codes.get(type(error), FAILED), str(error)
    if isinstance(error, OSError):
        return FAILED, f"file system: got '{error}', want to go on; check the disk and its permissions"
    traceback.print_exception(error)
    return FAILED, f"internal error: got {type(error).__name__}, want none; please report it with the lines above"


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise click.UsageError(f"--size: got {text!r}, want WIDTHxHEIGHT such as 512x320")
    return int(width), int(height)


def _folder(options: dict[str, Any]) -> Path | None:
    """The model folder, by whichever name it was given."""
    if options["weights"] is not None and options["model_dir"] is not None:
        raise click.UsageError("--weights: got --model-dir too, want one of them, as they are the same; leave one out")
    return options["weights"] or options["model_dir"]


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _print_plan(plan: Plan, archs: list[str], as_json: bool) -> None:
    if as_json:
        graphs = {
            graph.spec.name: {"shape": shape_words(graph.spec), "bytes": graph.bytes, "pieces": graph.pieces}
            for graph in plan.graphs
        }
        said = {"backend": plan.backend, "precision": plan.precision, "arch": ",".join(archs), "graphs": graphs}
        _print_result({**said, "memory": plan.memory, "process_memory": plan.process_memory})
        return
    words = [plan.profile, plan.backend, plan.precision, *archs]
    table = Table("graph", "shape", "about", "pieces", title=", ".join(words), title_justify="left")
    for graph in plan.graphs:
        table.add_row(graph.spec.name, shape_words(graph.spec), f"{graph.bytes / 1e6:,.2f} MB", str(graph.pieces))
    Console(soft_wrap=True).print(table)
    click.echo(f"memory while building: about {plan.memory / 1e9:,.2f} GB for weights and what is made of them")
    if plan.process_memory:
        click.echo(f"and about {plan.process_memory / 1e9:,.2f} GB for the processes that build engines")


def _print_result(result: dict[str, Any]) -> None:
    click.echo(json.dumps({"ok": True, "exit_code": 0, "result": result}))


def _terminate(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    raise Terminated
