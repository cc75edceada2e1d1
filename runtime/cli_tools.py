"""`swifti2v inspect`, `doctor` and `convert`."""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from ..engine.manifest import MANIFEST
from ..engine.presets import PROFILES
from ..engine.weights import convert as convert_pickle
from .cli_bundle import show_bundle
from .cli_kernels import show_kernels
from .cli_options import PATH, cache_folder
from .cuda_probe import probe_driver
from .devices import computes_bf16
from .fused import TABLE
from .inspection import describe_checkpoint
from .model_paths import SHIPPED
from .sidecar import versions
from .video import has_x264

ENTRY_DEPTH = 2  # of the weights of an entry in a folder of models, as text/text_encoder


@click.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect(path: Path, as_json: bool) -> None:
    """Say what a checkpoint or a bundle is: kind, layout, sizes, dtypes. Reads headers and manifests only."""
    if (path / MANIFEST).is_file():
        show_bundle(path, as_json)
        return
    if path.name == TABLE:
        show_kernels(path, as_json)
        return
    items = _checkpoints(path, ENTRY_DEPTH) if path.is_dir() else []
    # A folder of one model may hold shards; a folder of several models holds each as a file or a folder.
    if len(items) > 1 and not list(path.glob("*.index.json")):
        found = {item.relative_to(path).as_posix(): describe_checkpoint(item) for item in items}
    else:
        found = {path.name: describe_checkpoint(path)}
    if as_json:
        click.echo(json.dumps({"ok": True, "exit_code": 0, "result": found}))
        return
    console = Console()
    for name, facts in found.items():
        table = Table("", name, show_header=True, title_justify="left")
        for key, value in facts.items():
            table.add_row(key, _words(value))
        console.print(table)


def _checkpoints(folder: Path, depth: int) -> list[Path]:
    """Files of weights, and folders that hold some, down to `depth` folders below; links are followed."""
    found = []
    for item in sorted(folder.iterdir()):
        if item.suffix == ".safetensors" or (item.is_dir() and any(item.glob("*.safetensors"))):
            found.append(item)
        elif item.is_dir() and depth > 1:
            found += _checkpoints(item, depth - 1)
    return found


def _words(value: Any) -> str:
    if isinstance(value, (dict, list, tuple)) and not value:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        words = [_words(item) for item in value]
        alike = len(words) > 3 and len(set(words)) == 1
        return f"{words[0]}, {len(words)} times" if alike else ", ".join(words)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def doctor(as_json: bool) -> None:
    """Say what this machine can run. Exit code 3 when something that every run needs is missing."""
    facts = _facts()
    problems = []
    if not facts["h264"]:
        problems.append("PyAV has no libx264 encoder: pip install --force-reinstall av")
    if not facts["cache_writable"]:
        problems.append(f"the cache folder {facts['cache']} cannot be written: set SWIFTI2V_CACHE")
    if as_json:
        click.echo(
            json.dumps({"ok": not problems, "exit_code": 3 if problems else 0, "result": facts, "problems": problems})
        )
    else:
        table = Table("what", "here", show_header=False)
        for key, value in facts.items():
            table.add_row(key, _words(value))
        Console().print(table)
    if problems:
        click.echo("swifti2v: " + "; ".join(problems), err=True)
        click.get_current_context().exit(3)


def _facts() -> dict[str, Any]:
    cache = cache_folder()
    home = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    cuda = [
        {
            "name": torch.cuda.get_device_name(index),
            "sm": "".join(map(str, torch.cuda.get_device_capability(index))),
            "GB": round(torch.cuda.get_device_properties(index).total_memory / 1e9, 1),
        }
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return {
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "cpu_bf16": computes_bf16(torch.device("cpu")),
        "cuda_devices": cuda or "none",
        "cuda_driver": probe_driver(),
        "default": f"{'cuda' if cuda else 'cpu'}, eager PyTorch",
        "h264": has_x264(),
        "cache": str(cache),
        "cache_writable": os.access(home, os.W_OK),
        "cache_free_GB": round(shutil.disk_usage(home).free / 1e9, 1),
        "trained_weights": [name for name in PROFILES if (SHIPPED / name).is_dir()] or "none shipped",
    }


@click.command()
@click.argument("source", type=PATH)
@click.option("-o", "--output", type=PATH, help="File or folder to write; beside SOURCE by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def convert(source: Path, output: Path | None, as_json: bool) -> None:
    """Rewrite a pickled checkpoint SOURCE (.pth, .pt, .bin) as safetensors, with a manifest beside it."""
    target = output or source.with_suffix(".safetensors")
    manifest = convert_pickle(source, target)
    if as_json:
        click.echo(json.dumps({"ok": True, "exit_code": 0, "result": manifest}))
    else:
        written = target if target.suffix == ".safetensors" else target / manifest["output"]
        click.echo(str(written))
        dtypes = ", ".join(f"{count} {name}" for name, count in Counter(manifest["dtypes"]).items())
        click.echo(f"{manifest['tensors']} tensors ({dtypes}), {manifest['bytes']:,} bytes", err=True)
