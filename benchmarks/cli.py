"""The command `swifti2v-bench`: measured results on stdout, progress on stderr, one line for every error."""

from typing import NoReturn

import click

from ..engine.errors import EnvironmentMismatch
from ..runtime.cli_main import run
from .cli_speed import speed_command
from .speed import CASES


class Bench(click.Group):
    """The cases. `quality` is imported when it is asked for: a machine that only times may lack what it needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["quality", *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name != "quality":
            return super().get_command(ctx, cmd_name)
        try:
            from .cli_quality import quality
        except ImportError as error:
            raise EnvironmentMismatch(
                f"quality: got '{error}', want the packages of swifti2v; run pip install swifti2v"
            ) from error
        return quality


@click.group(cls=Bench, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="swifti2v")
def cli() -> None:
    """Measure what swifti2v makes: how good it is (quality), and how fast (every other case)."""


for name in CASES:
    cli.add_command(speed_command(name))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. A gate that is missed is a result, not an error; a regression exits with 3."""
    run(cli, "swifti2v-bench", arguments)


if __name__ == "__main__":
    main()
