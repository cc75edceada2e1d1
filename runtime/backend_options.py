"""The options that say where models are, with LoRAs to merge: `swifti2v-export` takes those of `swifti2v generate`."""

from .cli_options import PATH, REUSE_HELP, make_paths, model_options

__all__ = ["PATH", "REUSE_HELP", "make_paths", "model_options"]
