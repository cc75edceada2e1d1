"""What calls across the C boundary answer with: status codes, states, phases. The numbers are those of swifti2v.h."""

from enum import IntEnum

from ..engine.errors import (
    BundleError,
    Cancelled,
    EnvironmentMismatch,
    MediaError,
    NumericsError,
    ProfileError,
    SwiftError,
    WeightsError,
)
from .devices import out_of_memory

API_VERSION = 1


class Status(IntEnum):
    """How a call ended: 0 or more is no error, less is one, and `last_error` has its text."""

    OK = 0
    END = 1  # the request has no more segments
    TIMEOUT = 2  # nothing came within the time given
    INVALID_HANDLE = -1  # never given out, or destroyed
    INVALID_ARGUMENT = -2  # null, a wrong struct_size or version, a wrong type
    INVALID_JSON = -3  # malformed, an unknown or mistyped field, numbers that cannot work
    INVALID_IMAGE = -4  # unreadable, or not the size it should have
    BUFFER_TOO_SMALL = -5  # the segment stays where it is
    INVALID_STATE = -6  # nothing submitted, or the last request is not finished
    CANCELLED = -7
    ENVIRONMENT = -8  # Python, a package, a device is missing
    MODEL = -9  # a bundle or weights that are damaged, missing, or do not fit
    NUMERICS = -10  # values that are not finite
    NO_MEMORY = -11
    FAILED = -12  # anything else


class State(IntEnum):
    """Where the request last submitted is."""

    IDLE = 0
    RUNNING = 1
    FINISHED = 2  # every segment is made; some may still have to be fetched
    CANCELLED = 3
    FAILED = 4


class Stage(IntEnum):
    """What is being computed."""

    NONE = 0
    PROMPT = 1
    STAGE1 = 2
    STAGE2 = 3


class CallError(SwiftError):
    """A call that cannot be done, with the status it answers with."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(text)
        self.status = status


STATUSES: tuple[tuple[tuple[type[BaseException], ...], Status], ...] = (
    ((Cancelled,), Status.CANCELLED),
    ((EnvironmentMismatch,), Status.ENVIRONMENT),
    ((BundleError, WeightsError), Status.MODEL),
    ((ProfileError,), Status.INVALID_JSON),
    ((MediaError,), Status.INVALID_IMAGE),
    ((NumericsError,), Status.NUMERICS),
)


def status_of(error: BaseException) -> Status:
    """The status that an exception becomes."""
    if isinstance(error, CallError):
        return error.status
    if out_of_memory(error):
        return Status.NO_MEMORY
    return next((status for kinds, status in STATUSES if isinstance(error, kinds)), Status.FAILED)


def text_of(error: BaseException) -> str:
    """The error's text on one line; what is not raised on purpose is named."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SwiftError) else f"{type(error).__name__}: {text}"
