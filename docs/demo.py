"""Makes docs/demo.webp, the clip in the README: the shipped photo through `nano`, forwards, as an animated WebP.

python docs/demo.py [OUT] [PROMPT]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import swifti2v

HERE = Path(__file__).resolve().parent
PROMPT = "slow zoom in"
LIMIT = 2_000_000  # bytes


def make(out: Path, prompt: str) -> None:
    """Write the clip; the quality falls until the file is small enough."""
    profile = swifti2v.get_profile("nano")
    image = swifti2v.fit_image(
        swifti2v.load_image(HERE.parent / "examples" / "photo.jpg"), profile.width, profile.height
    )
    with swifti2v.Session.open(swifti2v.load_models(profile)) as session:
        chunks = session.generate(swifti2v.Request(image, prompt))
        frames = [Image.fromarray(frame) for frame in np.concatenate([chunk.frames for chunk in chunks])]
    for quality in (80, 65, 50, 35, 20):
        frames[0].save(
            out, save_all=True, append_images=frames[1:], duration=1000 // profile.fps, loop=0, quality=quality
        )
        if out.stat().st_size < LIMIT:
            return
    raise SystemExit(f"{out}: got {out.stat().st_size:,} bytes, want under {LIMIT:,}; make fewer frames")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    make(Path(arguments[0]) if arguments else HERE / "demo.webp", arguments[1] if len(arguments) > 1 else PROMPT)
