"""swifti2v: 2K video from one image, in two stages, segment by segment."""

__version__ = "0.1.0"
__all__ = ["__version__"]
