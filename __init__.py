"""swifti2v: 2K video from one image, in two stages, segment by segment.

loaded = load_models(get_profile("nano"))
with Session.open(loaded) as session:
    image = fit_image(load_image("photo.jpg"), session.profile.width, session.profile.height)
    for chunk in session.generate(Request(image, "slow zoom in")):
        ...  # chunk.frames: uint8 [n, H, W, 3], chunk.index: the first one's place in the clip
"""

__version__ = "0.1.0"  # before the imports: modules below read it

from typing import TYPE_CHECKING, Any

from .engine.dit import DiT
from .engine.errors import SwiftError
from .engine.presets import PROFILES, get_profile
from .engine.profile import DiTConfig, Profile, StageConfig, VAEConfig
from .engine.segments import Segment, plan_segments
from .engine.vae import VAE
from .engine.weights import convert, load_dit, load_vae
from .runtime.contact_sheet import ContactSheet
from .runtime.fused import accelerate
from .runtime.image import fit_image, load_image
from .runtime.model_paths import ModelPaths, find_models
from .runtime.models import Loaded, load_models
from .runtime.session import FrameChunk, Progress, Request, Session

if TYPE_CHECKING:
    from .runtime.video import VideoWriter

__all__ = [
    "PROFILES",
    "VAE",
    "ContactSheet",
    "DiT",
    "DiTConfig",
    "FrameChunk",
    "Loaded",
    "ModelPaths",
    "Profile",
    "Progress",
    "Request",
    "Segment",
    "Session",
    "StageConfig",
    "SwiftError",
    "VAEConfig",
    "VideoWriter",
    "accelerate",
    "convert",
    "find_models",
    "fit_image",
    "get_profile",
    "load_dit",
    "load_image",
    "load_models",
    "load_vae",
    "plan_segments",
]


def __getattr__(name: str) -> Any:
    """The one public name that needs PyAV, imported when it is asked for: a machine that writes no video has none."""
    if name == "VideoWriter":
        from .runtime.video import VideoWriter

        return VideoWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
