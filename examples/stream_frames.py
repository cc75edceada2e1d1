"""Save every frame as a PNG the moment its segment is finished.

python examples/stream_frames.py photo.jpg out_folder "slow zoom in" tiny
"""

import sys
from pathlib import Path

from PIL import Image

import swifti2v


def main(photo: str, folder: str, prompt: str = "", profile_name: str = "nano") -> None:
    profile = swifti2v.get_profile(profile_name)
    image = swifti2v.fit_image(swifti2v.load_image(photo), profile.width, profile.height)
    Path(folder).mkdir(parents=True, exist_ok=True)

    def show(progress: swifti2v.Progress) -> bool:
        print(progress.phase, progress.done, "of", progress.total)
        return True  # False stops the run

    with swifti2v.Session.open(swifti2v.load_models(profile)) as session:
        for chunk in session.generate(swifti2v.Request(image, prompt), show):
            for offset, frame in enumerate(chunk.frames):
                Image.fromarray(frame).save(Path(folder) / f"{chunk.index + offset:04d}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
