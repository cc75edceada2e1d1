"""The errors of the package: one base, whose text is ready to be shown to a user.

A text reads ``<thing>: got X, want Y; <what to do>``.
"""


class SwiftError(Exception):
    """Base of every error the package raises on purpose."""


class ProfileError(SwiftError):
    """A profile or an override that cannot work; the text names the nearest value that can."""


class SpecError(SwiftError):
    """A tensor that does not fit a graph's specification."""


class WeightsError(SwiftError):
    """A checkpoint or LoRA that is unreadable, incomplete, or belongs to another model."""


class MediaError(SwiftError):
    """An image or video that cannot be read or written."""


class NumericsError(SwiftError):
    """Values that are not finite where a result is due."""


class BundleError(SwiftError):
    """A bundle that is damaged, incomplete, or was built from something else."""


class EnvironmentMismatch(SwiftError):  # noqa: N818  (reads better at the raise)
    """This machine lacks something the request needs: a package, a device, memory."""


class Cancelled(SwiftError):  # noqa: N818
    """The progress callback asked to stop."""
