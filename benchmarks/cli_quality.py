"""`swifti2v-bench quality`: how good the clips are, against truth where there is one, and which gates they pass."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from ..engine.errors import MediaError, WeightsError
from ..engine.presets import PROFILES, get_profile
from ..engine.weights import fingerprint, load_dit, read_dit_config
from ..runtime.cli_options import PATH, Device, cache_folder, pick_device
from ..runtime.image import reason
from ..runtime.model_paths import find_models, path_of
from ..runtime.models import Loaded, load_models
from ..runtime.sidecar import describe_profile, dtype_name, versions, write_json
from ..training.photos import load_packed, load_split
from ..training.transition import TransitionConfig
from .footage import load_footage
from .library import library
from .page import write_page
from .quality import OnStep, Options, Report, run_quality, work_steps
from .quality_text import ABLATION_HEADER, HEADER, ablation_cells, metric_cells
from .vbench import VBenchExport

TABLE_WIDTH = 140  # where stdout is no terminal
UNTRAINED = "UNTRAINED weights: no number here says anything about the method."


@click.command()
@click.option("--profile", "profile_name", default="nano", show_default=True, help=f"{', '.join(PROFILES)}.")
@click.option("--model-dir", type=PATH, help="Folder with stage1, stage2, vae1, vae2 and text.")
@click.option("--device", type=Device(), default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), default="auto", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--clips", type=click.IntRange(1), default=Options.clips, show_default=True, help="Clips of each kind.")
@click.option("--crops", type=click.IntRange(1), default=64, show_default=True, help="Crops for prompt following.")
@click.option("--photos-dir", "folders", type=PATH, multiple=True, help="Folder of photographs; repeatable.")
@click.option("--packed", type=PATH, help="Photographs written by `swifti2v-train pack`.")
@click.option("--allow-missing", is_flag=True, help="Go on without the held-out photographs that are not here.")
@click.option(
    "--split", type=click.Choice(["held-out", "val"]), default="held-out", show_default=True,
    help="Set of photographs: decide on val, report on held-out.",
)  # fmt: skip
@click.option("--footage", type=PATH, multiple=True, help="A real video, measured as a group of its own; repeatable.")
@click.option(
    "--transition-levels", type=float, nargs=2, default=(TransitionConfig.lowest, TransitionConfig.highest),
    show_default=True, help="Noise that Stage I starts from in references; the default is training's.",
)  # fmt: skip
@click.option("--full", is_flag=True, help="Also the ablations, and all six prompts on every crop.")
@click.option(
    "--compare", multiple=True, metavar="NAME=FOLDER",
    help="With --full, the Stage II of another folder of models, on the same clips; repeatable.",
)  # fmt: skip
@click.option("--export-vbench", type=PATH, help="Write the clips for VBench-I2V's custom input, into a new folder.")
@click.option("--out", type=PATH, help="Folder for quality.html and quality.json.")
@click.option("--untrained", is_flag=True, help="Run on untrained weights, to try the command.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def quality(
    profile_name: str,
    model_dir: Path | None,
    device: str,
    dtype: str,
    seed: int,
    clips: int,
    crops: int,
    folders: tuple[Path, ...],
    packed: Path | None,
    allow_missing: bool,
    split: str,
    footage: tuple[Path, ...],
    transition_levels: tuple[float, float],
    full: bool,
    compare: tuple[str, ...],
    export_vbench: Path | None,
    out: Path | None,
    untrained: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure quality: PSNR, sharpness, seams, drift, prompt following, with intervals and gates."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    library("skimage")
    if compare and not full:
        raise click.UsageError("--compare: got no --full, want it, as the comparison is one of the ablations; add it")
    if packed is not None and folders:
        raise click.UsageError("--packed: got --photos-dir too, want one of them; leave one out")
    lowest, highest = transition_levels
    if not 0 < lowest <= highest <= 1:
        raise click.UsageError(f"--transition-levels: got {lowest} {highest}, want 0 < LOW <= HIGH <= 1; correct them")
    loaded = _load(profile_name, model_dir, device, dtype, untrained)
    others = dict(_other(text, profile_name, model_dir, loaded) for text in compare)
    if len(others) != len(compare):
        raise click.UsageError("--compare: got one NAME twice, want each once; rename one")
    if packed is not None:
        photos = load_packed(packed, split)
    else:
        photos = load_split(split, folders, allow_missing=allow_missing)
    films = [(path.name, load_footage(path, loaded.profile)) for path in footage]
    if out is not None:
        _make_folder(out)
    export = None if export_vbench is None else VBenchExport(export_vbench, loaded.profile.fps)
    transition = TransitionConfig(lowest=lowest, highest=highest).at(loaded.profile.stage1)
    options = Options(clips, crops, seed, full, transition)
    started = time.perf_counter()
    with _progress(console, work_steps(options, len(films)), quiet) as on_step:
        report = run_quality(loaded, photos, options, films, on_step, export, others)
    about = _about(loaded, split, photos, options, time.perf_counter() - started)
    if not loaded.trained:
        report.notes.insert(0, UNTRAINED)
    if export is not None:
        export.finish()
    record = {**about, **as_result(report)}
    if out is not None:
        write_json(out / "quality.json", record)
        write_page(out / "quality.html", f"Quality of {loaded.profile.name}", _facts(about), report)
        console.print(f"written: {out / 'quality.html'}, {out / 'quality.json'}")
    if as_json:
        click.echo(json.dumps({"ok": True, "exit_code": 0, "result": record}, ensure_ascii=False))
    else:
        _print_tables(report)


def as_result(report: Report) -> dict[str, Any]:
    """The report as plain JSON values: one key a metric, and the other parts by name."""
    return {
        **{result.metric.key: result.as_json() for result in report.results},
        "gates_missed": [result.metric.key for result in report.results if result.verdict == "miss"],
        "footage": {result.metric.key: result.as_json() for result in report.footage} or None,
        "ablations": [item.as_json() for item in report.ablations] or None,
        "details": report.details,
        "notes": report.notes,
    }


def _load(profile_name: str, model_dir: Path | None, device: str, dtype: str, untrained: bool) -> Loaded:
    """The models; untrained ones only where they are asked for."""
    profile = get_profile(profile_name)
    paths = find_models(profile, model_dir)
    if not paths.trained and not untrained:
        raise WeightsError(
            f"weights of {profile.name}: got none that are trained, want them, as without the numbers mean nothing; "
            "pass --model-dir, or --untrained to try the command"
        )
    place, number = pick_device(device, dtype)
    return load_models(profile, paths, place, number, cache_folder())


def _other(text: str, profile_name: str, model_dir: Path | None, loaded: Loaded) -> tuple[str, nn.Module]:
    """The name and the second DiT of NAME=FOLDER, which must read what the models measured give it."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise click.UsageError(f"--compare: got {text!r}, want NAME=FOLDER, as short=runs/short/models; write it so")
    profile = get_profile(profile_name)
    here, there = find_models(profile, model_dir), find_models(profile, Path(folder))
    if not here.trained:
        raise WeightsError(
            f"--compare {name}: got untrained models to compare with, want trained ones; pass --model-dir"
        )
    for entry, what in {"vae2": "VAE of Stage II", "text": "text encoder"}.items():
        if fingerprint(path_of(here, entry)) != fingerprint(path_of(there, entry)):
            raise WeightsError(
                f"--compare {name}: got another {what} than that of the models measured, want the same, as its DiT "
                "reads no other; train both on one"
            )
    path = path_of(there, "stage2")
    if read_dit_config(path) != loaded.profile.stage2.dit:
        raise WeightsError(f"--compare {name}: got a DiT of another size, want one like that measured; pass such a one")
    return name, load_dit(path, dtype=loaded.dtype, device=loaded.device)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"--out {out}: got '{reason(error)}', want a folder to write to; choose another") from error


def _about(loaded: Loaded, split: str, photos: list[np.ndarray], options: Options, seconds: float) -> dict[str, Any]:
    return {
        "format": 1,
        "profile": describe_profile(loaded.profile),
        "trained": loaded.trained,
        "device": str(loaded.device),
        "dtype": dtype_name(loaded.dtype),
        "photos": len(photos),
        "split": split,
        "transition": asdict(options.transition),
        "options": {"clips": options.clips, "crops": options.crops, "seed": options.seed, "full": options.full},
        "seconds": round(seconds, 1),
        "versions": versions(),
    }


def _facts(about: dict[str, Any]) -> list[str]:
    profile, options = about["profile"], about["options"]
    weights = "trained weights" if about["trained"] else UNTRAINED
    return [
        f"{profile['frames']} frames of {'x'.join(map(str, profile['size']))}, {about['device']}, {about['dtype']}, "
        f"{weights}",
        f"{about['photos']} {about['split']} photographs, {options['clips']} clips of each kind, "
        f"{options['crops']} crops, seed {options['seed']}, transition from {about['transition']['lowest']:g} to "
        f"{about['transition']['highest']:g}, {about['seconds']:.0f} seconds",
    ]


def _print_tables(report: Report) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [
        ("", HEADER, [metric_cells(result) for result in report.results])
    ]
    if report.footage:
        tables.append(("footage", HEADER, [metric_cells(result) for result in report.footage]))
    if report.ablations:
        tables.append(("ablations", ABLATION_HEADER, [ablation_cells(item) for item in report.ablations]))
    for title, header, rows in tables:
        table = Table(*header, title=title or None, title_justify="left")
        for row in rows:
            style = "red" if row[-1].startswith("miss") else None
            table.add_row(*row, style=style)
        console.print(table)
    for note in report.notes:
        console.print(note, highlight=False, markup=False, style="dim")


@contextmanager
def _progress(console: Console, total: int, quiet: bool) -> Iterator[OnStep]:
    """A callback for each clip that is done: a bar on a terminal, plain lines elsewhere."""
    if quiet:
        yield lambda _: None
    elif not console.is_terminal:
        done = iter(range(1, total + 1))
        yield lambda text: console.print(f"{next(done)}/{total} {text}", markup=False)
    else:
        columns = (
            TextColumn("quality"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as bars:
            task = bars.add_task("", total=total, note="")
            yield lambda text: bars.update(task, advance=1, note=text)
