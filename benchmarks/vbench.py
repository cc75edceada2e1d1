"""Clips in the folder layout of VBench-I2V's custom input mode; the scores themselves need VBench and its models.

    DIR/videos/<name>-<index>.mp4    the clips
    DIR/images/<name>.jpg            their input images, under the same name without the index
    DIR/clips.json                   which prompt each was made with

    python evaluate_i2v.py --mode=custom_input --dimension camera_motion i2v_subject i2v_background ... \\
      --videos_path DIR/videos --custom_image_folder DIR/images

VBench reads the prompt from the file name, and for `camera_motion` wants one of its seven phrases there. So a name is
the photograph's number and VBench's phrase for the move. Source: vbench2_beta_i2v/README.md, "Evaluate Your Own
Videos", in github.com/Vchitect/VBench.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..engine.errors import MediaError
from ..runtime.image import reason, save_image
from ..runtime.sidecar import write_json
from ..runtime.video import VideoWriter

# Our words for a move -> VBench's; its "tilt" turns the camera where ours slides, and the picture moves alike.
PHRASES = {
    "camera pans left": "camera pans left",
    "camera pans right": "camera pans right",
    "camera pans up": "camera tilts up",
    "camera pans down": "camera tilts down",
    "zoom in": "camera zooms in",
    "zoom out": "camera zooms out",
    "static shot": "camera static",
}


class VBenchExport:
    """Writes generated clips into a folder as they are made."""

    def __init__(self, folder: Path, fps: float) -> None:
        """Makes the folders. Raises MediaError where they cannot be made, or hold clips of another run."""
        self.folder, self.fps = folder, fps
        self.videos, self.images = folder / "videos", folder / "images"
        self._clips: list[dict[str, Any]] = []
        self._count: Counter[str] = Counter()
        try:
            for place in (self.videos, self.images):
                place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MediaError(
                f"VBench folder {folder}: got '{reason(error)}', want a folder to write to; choose another"
            ) from error
        if any(self.videos.iterdir()):  # VBench would score them as well
            raise MediaError(f"VBench folder {self.videos}: got files in it, want an empty folder; choose another")

    def __call__(self, photo: int, prompt: str, image: np.ndarray, frames: np.ndarray) -> None:
        """Write one clip, frames uint8 [T, H, W, 3], and its image uint8 [H, W, 3]."""
        name = f"photo {photo}, {PHRASES.get(prompt, prompt)}"
        index = self._count[name]
        self._count[name] += 1
        height, width = frames.shape[1:3]
        path = self.videos / f"{name}-{index}.mp4"
        with VideoWriter(path, width, height, self.fps) as writer:
            writer.write(frames)
        if index == 0:
            save_image(Image.fromarray(image), self.images / f"{name}.jpg")
        self._clips.append({"video": f"videos/{path.name}", "image": f"images/{name}.jpg", "prompt": prompt})

    def finish(self) -> None:
        """Write the list of clips."""
        write_json(self.folder / "clips.json", {"format": 1, "fps": self.fps, "clips": self._clips})
