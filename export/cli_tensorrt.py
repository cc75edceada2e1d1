"""The process that builds one engine: a job as JSON on stdin, exit code 0, or a JSON object with the error on stdout.

The first build of a process gives the same bytes every time, later ones do not.
"""

import json
import sys

from ..engine.errors import SwiftError
from ..engine.plain import from_plain
from .tensorrt_network import EngineJob, build_engine


def main() -> int:
    """Build what stdin says. 0 ok, 1 refused, with one line why."""
    job = from_plain(EngineJob, json.load(sys.stdin), "job")
    try:
        build_engine(job)
    except SwiftError as error:
        sys.stdout.write(json.dumps({"kind": type(error).__name__, "error": str(error)}) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
