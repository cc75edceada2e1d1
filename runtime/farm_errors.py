"""The errors of farm jobs."""

import errno
import re

from ..engine.errors import SwiftError
from .devices import out_of_memory

# What another try, here or on another machine, may not meet again: a full disk, a lost mount, a tired network.
TRANSIENT = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN",
        "ENETUNREACH", "ENODEV", "ENXIO", "EREMOTEIO", "ESHUTDOWN", "ECONNRESET", "ENOLCK", "EFBIG", "ENOMEM",
    )
    if hasattr(errno, name)
}  # fmt: skip
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust's libraries, such as safetensors, say which


class FarmError(SwiftError):
    """A shot list, a job or a shot's folder that cannot be used as it is."""


class LockLost(FarmError):  # noqa: N818  (reads better at the raise)
    """Another worker has taken the shot over."""


class Transient(FarmError):  # noqa: N818
    """Something that another try may not meet again; the folder resumes."""


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is of this kind. So is memory that a neighbour may have taken."""
    while error is not None:
        if isinstance(error, Transient) or out_of_memory(error):
            return True
        number = getattr(error, "errno", None)
        if number is None and (found := OS_ERROR.search(str(error))):
            number = int(found[1])
        if number in TRANSIENT:
            return True
        error = error.__cause__
    return False
