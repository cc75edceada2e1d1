"""Real footage from files: decoded, brought to the clip's size and frame rate."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

from ..engine.errors import MediaError
from ..engine.profile import Profile
from ..runtime.image import fit_image, reason


def load_footage(path: Path, profile: Profile) -> np.ndarray:
    """The first frames of a video as a clip of the profile, uint8 [T, H, W, 3].

    Frames are taken at the profile's rate; from a slower file, every one of them. Each is resized and centre cropped,
    turned upright where the file says so. Raises MediaError for a file that is unreadable or too short.
    """
    if not path.is_file():
        raise MediaError(f"footage {path}: got no file, want a video; check the path")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path.absolute())) as file:
            if not file.streams.video:
                raise MediaError(f"footage {path}: got no video stream, want one; give another file")
            start = None
            for frame in file.decode(video=0):
                time = frame.time if frame.time is not None else 0.0
                start = time if start is None else start
                # A quarter of a frame early is on time: time stamps are rounded.
                if frame.time is not None and time - start < (len(frames) - 0.25) / profile.fps:
                    continue
                frames.append(_fit(frame, profile))
                if len(frames) == profile.frames:
                    break
    except (OSError, av.FFmpegError) as error:
        want = "want a readable video; convert it to MP4"
        raise MediaError(f"footage {path}: got '{reason(error)}', {want}") from error
    if len(frames) < profile.frames:
        want = f"want {profile.frames}; give a longer one, or pass a profile of fewer"
        raise MediaError(f"footage {path}: got {len(frames)} frames at {profile.fps:g} a second, {want}")
    return np.stack(frames)


def _fit(frame: av.VideoFrame, profile: Profile) -> np.ndarray:
    picture = frame.to_ndarray(format="rgb24")  # [h, w, 3]
    upright = np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))
    return fit_image(Image.fromarray(upright), profile.width, profile.height, "crop")
