"""Packages of the `train` extra that measuring needs, opened when they are needed."""

import importlib
from typing import Any

from ..engine.errors import EnvironmentMismatch


def library(name: str) -> Any:
    """Import a module of scikit-image. Raises EnvironmentMismatch that names the extra where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentMismatch(
            f"{name}: got '{error}', want it for the measurements; run pip install 'swifti2v[train]'"
        ) from error
