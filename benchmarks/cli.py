"""The command `swifti2v-bench`: measured results on stdout, progress on stderr, one line for every error."""

from typing import NoReturn

import click

from ..runtime.cli_main import run
from .cli_quality import quality


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="swifti2v")
def cli() -> None:
    """Measure what swifti2v makes."""


cli.add_command(quality)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. A gate that is missed is a result, not an error."""
    run(cli, "swifti2v-bench", arguments)
