"""What `swifti2v inspect` says of a kernels.json: what runs where, and how long it and plain PyTorch take."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from .inspection import describe_kernels


def show_kernels(path: Path, as_json: bool = False) -> None:
    """Print the table of a file on stdout; of a file that is not there, nothing but JSON's empty list."""
    rows = describe_kernels(path)
    if as_json:
        click.echo(json.dumps({"ok": True, "exit_code": 0, "result": {path.name: {"kind": "kernels", "rows": rows}}}))
        return
    if not rows:
        return
    table = Table("kernel", "call", "GPU", "runs", "ms", "plain ms", "refused")
    for row in rows:
        refused = "; ".join(f"{name}: {why}" for name, why in row["refused"].items())
        times = [f"{row[name]:.4g}" if row[name] is not None else "-" for name in ("ms", "plain_ms")]
        table.add_row(row["kernel"], row["call"], row["gpu"], row["runs"], *times, refused)
    console = Console()
    wide = console.options.update(width=10_000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)  # no pipe is too narrow for it
    console.print(table)
