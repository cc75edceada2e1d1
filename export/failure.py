"""A compiler that fails: one line for the user, and all that it said in a file beside the graphs that are done."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engine.errors import SwiftError
from ..engine.manifest import write_text


class CompileError(SwiftError):
    """A compiler that failed on a graph, or made something else of it than was wanted."""


@contextmanager
def compiling(graph: str, backend: str, log: Path) -> Iterator[None]:
    """Turn whatever a compiler raises into a CompileError; the traceback goes to the file `log`.

    What is said already (SwiftError), and what the system refuses (OSError), pass as they are.
    """
    try:
        yield
    except (SwiftError, OSError):
        raise
    except Exception as error:  # every compiler has its own
        write_text(log, traceback.format_exc())
        raise CompileError(
            f"{graph}: got {type(error).__name__} from {backend} ({gist(str(error))}), want it compiled; "
            f"see {log}, run the same command again once that is put right, or use another --backend or --precision"
        ) from error


def gist(said: str) -> str:
    """The line that says most: a compiler's first error, else the first line."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in lines if "error:" in line.lower()), lines[0])[:200]
