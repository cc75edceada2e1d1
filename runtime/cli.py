"""The command `swifti2v`: results on stdout, prose and progress on stderr, one line for every error."""

import json
import signal
import sys
from types import FrameType
from typing import NoReturn

import click
import torch

from ..engine.errors import Cancelled, EnvironmentMismatch, ProfileError, SwiftError
from .cli_generate import generate
from .cli_tools import convert, doctor, inspect

OK, FAILED, USAGE, ENVIRONMENT = 0, 1, 2, 3


class Terminated(BaseException):
    """SIGTERM as an exception, so that half-written files are removed on the way out."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="swifti2v")
def cli() -> None:
    """2K video from one image."""


cli.add_command(generate)
cli.add_command(inspect)
cli.add_command(doctor)
cli.add_command(convert)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 ok, 1 failed, 2 usage, 3 this machine does not fit, 130 and 143 signals."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(cli.main(arguments, prog_name="swifti2v", standalone_mode=False) or OK)
    except (click.Abort, KeyboardInterrupt, Cancelled):
        code, text = 130, "interrupted; nothing was written"
    except Terminated:
        code, text = 143, "terminated; nothing was written"
    except click.ClickException as error:
        code, text = USAGE, f"{error.format_message()} (see swifti2v --help)"
    except ProfileError as error:
        code, text = USAGE, str(error)
    except EnvironmentMismatch as error:
        code, text = ENVIRONMENT, str(error)
    except SwiftError as error:
        code, text = FAILED, str(error)
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "not enough memory" not in str(error):
            raise
        code, text = FAILED, "memory: got too little, want more for this profile; make the size smaller"
    if "--json" in arguments:
        click.echo(json.dumps({"ok": False, "exit_code": code, "error": text}))
    click.echo("swifti2v: " + " ".join(text.split()), err=True)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    raise Terminated
