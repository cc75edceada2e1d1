"""`swifti2v-bench CASE` for every speed case: tables on stdout, progress on stderr, the whole record in --json FILE.

The record is written anew after every part of a case, so that a run that is stopped leaves what it has measured.
"""

import json
from pathlib import Path
from typing import Any

import click
import torch

from ..engine.errors import ProfileError
from ..engine.manifest import EAGER_PRECISIONS
from ..engine.presets import PROFILES, get_profile
from ..runtime.acceleration import KERNEL_CHOICES, KernelChoice, can_fuse
from ..runtime.backend_registry import BACKENDS
from ..runtime.cli_options import PATH, REUSE_HELP, Device, Size, cache_folder, pick_device
from ..runtime.devices import best_dtype
from ..runtime.sidecar import write_json
from .accelerated import captured_variant, fused_variant
from .baseline import Change, compare, read_record
from .clock import CLOCKS, ClockName, Timing
from .items import Bench
from .lengths import growth_words
from .models import open_models
from .peers import Peer, diffusers
from .plot import plot_lengths
from .report import HEADER, LENGTH_HEADER, Peaks, Result, length_cells, make_record, row_cells, table
from .speed import CASES, WITH_LENGTHS, Plan, check_case
from .variants import bundle_variant, compiled_variant, distinct, eager_variant

REGRESSED = 3  # the exit code
STDOUT = Path("-")


def speed_command(case: str) -> click.Command:
    """The command of one case."""
    options: list[click.Parameter] = [
        click.Option(["--profile", "profile_name"], default="nano", show_default=True, help=f"{', '.join(PROFILES)}."),
        click.Option(["--frames"], type=int, help="Length, 4k+1 frames."),
        click.Option(["--size"], type=Size(), help="Final size in pixels, such as 384x256."),
        click.Option(["--stage2-steps"], type=int, help="Steps of Stage II."),
        click.Option(["--reuse-context"], is_flag=True, help=REUSE_HELP),
        click.Option(["--model-dir"], type=PATH, help="Folder with weights; the shipped ones, or random ones if none."),
        click.Option(["--device"], type=Device(), default="auto", show_default=True, help="auto, cpu, cuda ..."),
        click.Option(
            ["--dtype", "dtypes"], type=click.Choice(list(EAGER_PRECISIONS)), multiple=True,
            help="Eager PyTorch in this dtype; repeatable. What the device is best in, if neither this nor --bundle.",
        ),
        click.Option(["--bundle", "bundles"], type=PATH, multiple=True, help="A compiled bundle; repeatable."),
        click.Option(["--backend"], type=click.Choice(list(BACKENDS)), help="Refuse bundles of another backend."),
        click.Option(["--compile", "compiling"], is_flag=True, help="Also torch.compile."),
        click.Option(
            ["--kernels"], type=click.Choice(KERNEL_CHOICES), default="eager", show_default=True,
            help="Also PyTorch with the kernels chosen here.",
        ),
        click.Option(["--cuda-graphs"], is_flag=True, help="Also with the denoising steps as CUDA graphs."),
        click.Option(["--peers"], is_flag=True, help="Also diffusers' modules with the same weights, in fp32."),
        click.Option(["--peer-dtype"], type=click.Choice(list(EAGER_PRECISIONS)), help="Peers in this dtype too."),
        click.Option(["--runs"], type=click.IntRange(1), default=10, show_default=True, help="Timed calls of each."),
        click.Option(["--warmup"], type=click.IntRange(0), default=2, show_default=True, help="Calls before them."),
        click.Option(
            ["--clock"], type=click.Choice(list(CLOCKS)), default="wall", show_default=True,
            help="On a CPU; process counts only what cores did for this process, with --threads 1 for busy machines.",
        ),
        click.Option(["--threads"], type=click.IntRange(1), help="Threads on the CPU."),
        click.Option(
            ["--json", "json_file"], type=PATH,
            help="Write the record, with raw samples; - is stdout. A file has what is measured so far at any time.",
        ),
        click.Option(["--baseline"], type=PATH, help=f"Compare with a record of --json; exit {REGRESSED} if slower."),
        click.Option(["-q", "--quiet"], is_flag=True, help="No progress."),
    ]  # fmt: skip
    if case in WITH_LENGTHS:
        options.append(click.Option(["--lengths"], help="Frames, separated by commas: 33,65,97."))
        options.append(click.Option(["--plot"], type=PATH, help="Draw times over frames, a .png or .svg."))
        options.append(click.Option(["--denoising"], is_flag=True, help="Time the denoising steps alone, no VAE."))
    help_text = CASES[case].__doc__
    return click.Command(case, params=options, callback=lambda **given: _run(case, **given), help=help_text)


def _run(
    case: str,
    *,
    device: str,
    runs: int,
    warmup: int,
    clock: ClockName,
    threads: int | None,
    json_file: Path | None,
    baseline: Path | None,
    quiet: bool,
    compiling: bool,
    lengths: str | None = None,
    plot: Path | None = None,
    denoising: bool = False,
    **chosen: Any,
) -> int:
    if threads is not None:
        torch.set_num_threads(threads)
    before = None if baseline is None else read_record(baseline)
    place, _ = pick_device("cpu" if case == "cpu-nano" and device == "auto" else device, "auto")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    timing = Timing(runs, warmup, clock)
    bench = _open(case, place, compiling, **chosen)
    peaks = Peaks(place, clock)
    say = (lambda _: None) if quiet else (lambda text: click.echo(f"{case}: {text}", err=True))
    plan = Plan(timing, _numbers(lengths), denoising, compiling, cache_folder(), say)
    file = None if json_file == STDOUT else json_file
    result = _measure(case, bench, peaks, plan, file)
    record = make_record(case, bench.models, bench.variants, result, peaks, timing)
    changes = [] if before is None else compare(record, before)
    if before is not None:
        record["changes"] = [change.as_json() for change in changes]
    if plot is not None:
        plot_lengths(record, plot)
    if file is not None:
        write_json(file, record)
    if json_file == STDOUT:
        click.echo(json.dumps({"ok": True, "exit_code": 0, "result": record}, ensure_ascii=False))
    else:
        _print(record, result, peaks, changes)
    for variant in bench.variants.values():
        variant.close()
    return REGRESSED if any(change.regressed for change in changes) else 0


def _measure(case: str, bench: Bench, peaks: Peaks, plan: Plan, file: Path | None) -> Result:
    """Run a case; after each of its parts the record in `file` holds all so far, marked as not complete."""
    result = Result()
    try:
        for part in CASES[case](bench, peaks, plan):
            result.add(part)
            if file is not None:
                write_json(file, make_record(case, bench.models, bench.variants, result, peaks, plan.timing, False))
            plan.say(f"{part.words}: done")
    except BaseException:
        if file is not None and (result.rows or result.lengths):
            click.echo(f"{case}: stopped; {file} has what was measured, marked as not complete", err=True)
        raise
    return result


def _open(
    case: str,
    device: torch.device,
    compiling: bool,
    *,
    profile_name: str,
    frames: int | None,
    size: tuple[int, int] | None,
    stage2_steps: int | None,
    reuse_context: bool,
    model_dir: Path | None,
    dtypes: tuple[str, ...],
    bundles: tuple[Path, ...],
    backend: str | None,
    kernels: KernelChoice,
    cuda_graphs: bool,
    peers: bool,
    peer_dtype: str | None,
) -> Bench:
    """What is compared: peers first, then eager, torch.compile, bundles; ratios are to the first."""
    if case == "cpu-nano" and (profile_name not in ("nano", "tiny") or device.type != "cpu"):
        raise ProfileError(f"cpu-nano: got {profile_name} on {device.type}, want nano on cpu; use the other cases")
    profile = get_profile(profile_name).override(
        frames=frames, size=size, stage2_steps=stage2_steps, reuse_context=reuse_context
    )
    models = open_models(profile, model_dir, device)
    numbers = [EAGER_PRECISIONS[name] for name in dtypes] or ([] if bundles else [best_dtype(device)])
    narrow = numbers[-1] if numbers else best_dtype(device)
    variants = [eager_variant(models, dtype) for dtype in numbers]
    if compiling and case != "ladder":
        variants.append(compiled_variant(models, narrow))
    if kernels == "fused" or (kernels == "auto" and can_fuse(device)):
        variants.append(fused_variant(models, narrow, cache_folder()))
        variants += [fused_variant(models, narrow, cache_folder(), captured=True)] if cuda_graphs else []
    elif cuda_graphs:
        variants.append(captured_variant(models, narrow))
    variants += [bundle_variant(models, folder, backend, cache_folder()) for folder in bundles]
    wanted = [torch.float32] if peers else []
    wanted += [EAGER_PRECISIONS[peer_dtype]] if peer_dtype is not None else []
    beside = [Peer(dtype, compiled) for dtype in dict.fromkeys(wanted) for compiled in (False, True)[: 1 + compiling]]
    check_case(case, variants, len(beside))
    if beside:
        diffusers()
    return Bench(models, distinct(variants), beside)


def _print(record: dict[str, Any], result: Result, peaks: Peaks, changes: list[Change]) -> None:
    click.echo(_facts(record))
    if result.rows:
        click.echo(table(HEADER, [row_cells(row) for row in result.rows]))
        notes = dict.fromkeys(f"{row.name} {row.variant}: {row.note}" for row in result.rows if row.note)
        click.echo("".join(f"{note}\n" for note in notes), nl=False)
    if result.lengths:
        rate = next(iter(peaks.found.values())).rate
        click.echo(table(LENGTH_HEADER, [length_cells(point, rate) for point in result.lengths]))
        for way, fit in record["lengths"]["growth"].items():
            click.echo(f"{way}: {growth_words(fit)}")
    for change in changes:
        ratio = change.ratio
        verdict = "SLOWER" if change.regressed else "ok"
        click.echo(
            f"{verdict}: {change.name} {change.variant} takes {ratio.value:.3f} of the baseline's time "
            f"[{ratio.low:.3f}, {ratio.high:.3f}]"
        )


def _facts(record: dict[str, Any]) -> str:
    identity, profile = record["identity"], record["profile"]
    device, weights = identity["device"], identity["weights"]
    kind = weights.get("all", "checkpoints")
    rates = [*record["peak"].items(), *record["products_reach"].items()]
    peak = "; ".join(f"{name} {value['tflops']:g} TFLOP/s, {value['source']}" for name, value in rates)
    return (
        f"{profile['name']} {profile['frames']} frames of {profile['size'][0]}x{profile['size'][1]}, weights: {kind}\n"
        f"{device['name']}, torch {identity['versions']['torch']}, {record['timer']['runs']} runs after "
        f"{record['timer']['warmup']} of warm-up\npeak: {peak}"
    )


def _numbers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise click.UsageError(f"--lengths: got {text!r}, want frames separated by commas, such as 33,65,97")
    return tuple(int(word) for word in words)
