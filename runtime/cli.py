"""The command `swifti2v`: results on stdout, prose and progress on stderr, one line for every error."""

from typing import NoReturn

import click

from .cli_generate import generate
from .cli_main import run
from .cli_render import render
from .cli_tools import convert, doctor, inspect


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="swifti2v")
def cli() -> None:
    """2K video from one image."""


cli.add_command(generate)
cli.add_command(render)
cli.add_command(inspect)
cli.add_command(doctor)
cli.add_command(convert)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    run(cli, "swifti2v", arguments)
