"""What every command line of ours does around its click group: signals, exit codes, one line for every error."""

import contextlib
import json
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import click

from ..engine.errors import Cancelled, EnvironmentMismatch, ProfileError, SwiftError
from .devices import out_of_memory

OK, FAILED, USAGE, ENVIRONMENT = 0, 1, 2, 3


class Terminated(BaseException):
    """SIGTERM as an exception, so that half-written files are removed on the way out."""


def run(cli: click.Command, name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    0 ok, 1 failed, 2 usage, 3 this machine does not fit, 4 some shots failed, 75 try again, 130 and 143 signals.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(cli.main(arguments, prog_name=name, standalone_mode=False) or OK)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(USAGE)
    except Exception as error:
        code, text = _explain(error, name)
    except (KeyboardInterrupt, Terminated) as error:
        code, text = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (143, "terminated")
    if "--json" in arguments:
        with contextlib.suppress(OSError):  # stdout may be what failed
            click.echo(json.dumps({"ok": False, "exit_code": code, "error": text}))
    click.echo(f"{name}: " + " ".join(text.split()), err=True)
    sys.exit(code)


def _explain(error: Exception, name: str) -> tuple[int, str]:
    """Exit code and one line for an error; what nobody foresaw is shown with its traceback too."""
    if isinstance(error, (click.Abort, Cancelled)):
        return 130, "interrupted"
    if isinstance(error, click.ClickException):
        return USAGE, f"{error.format_message()} (see {name} --help)"
    if isinstance(error, SwiftError):
        codes = {ProfileError: USAGE, EnvironmentMismatch: ENVIRONMENT}
        return codes.get(type(error), FAILED), str(error)
    if out_of_memory(error):
        return FAILED, "memory: got too little, want more for this profile; make the size smaller"
    if isinstance(error, OSError):
        return FAILED, f"file system: got '{error}', want to go on; check the disk and its permissions"
    traceback.print_exception(error)
    return FAILED, f"internal error: got {type(error).__name__}, want none; please report it with the lines above"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    raise Terminated
