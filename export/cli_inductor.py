"""The process that opens one AOTInductor package: its path and its device; prints the names of its weights, as JSON.

PyTorch may crash there, and a build must not.
"""

import json
import sys
from pathlib import Path

import torch

from ..runtime.backend_inductor import load_package


def main(package: str, place: str) -> None:
    """Open it as a session would, on a GPU that is in use already."""
    device = torch.device(place)
    if device.type == "cuda":
        torch.zeros(1, device=device)
    sys.stdout.write("\n" + json.dumps(load_package(Path(package), device).get_constant_fqns()) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
