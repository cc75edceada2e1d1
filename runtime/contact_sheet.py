"""One picture of a whole clip: evenly spaced frames in a grid, kept small while the clip streams by."""

import os
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..engine.errors import MediaError
from .image import save_image

BACKGROUND, LABEL_BACK, LABEL_TEXT = (18, 18, 20), (0, 0, 0, 160), (255, 255, 255, 235)
GAP = 8


class ContactSheet:
    """Collects about `cells` frames of a clip, their longer side scaled to `cell_side` pixels, for one PNG or JPEG.

    First and last frame are always among them. Memory is that of the thumbnails, whatever the clip's length.
    """

    def __init__(self, total_frames: int, cells: int = 12, cell_side: int = 400):
        if total_frames < 1 or cells < 1:
            raise MediaError(f"contact sheet: got {total_frames} frames, {cells} cells, want 1 or more; count again")
        self.wanted = {round(float(index)) for index in np.linspace(0, total_frames - 1, min(cells, total_frames))}
        self.cell_side = cell_side
        self._thumbnails: dict[int, Image.Image] = {}

    def add(self, frames: np.ndarray, first_index: int) -> None:
        """Take what is wanted of a chunk, uint8 [n, H, W, 3], whose first frame has this index in the clip."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            got = f"{frames.dtype} {frames.shape}"
            raise MediaError(f"contact sheet: got {got}, want uint8 (n, H, W, 3); pass the chunk's frames")
        height, width = frames.shape[1:3]
        scale = self.cell_side / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        for index in self.wanted & set(range(first_index, first_index + len(frames))):
            image = Image.fromarray(frames[index - first_index])
            self._thumbnails[index] = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the grid of what has come so far. Raises MediaError for no frames, or no PNG or JPEG suffix."""
        if not self._thumbnails:
            raise MediaError(f"contact sheet {path}: got no frames, want at least one; add chunks before saving")
        save_image(self._grid(), path)

    def _grid(self) -> Image.Image:
        width, height = next(iter(self._thumbnails.values())).size
        count = len(self._thumbnails)
        rows = ceil(count / (4 if width >= height else 6))
        columns = ceil(count / rows)
        sheet = Image.new("RGB", (GAP + columns * (width + GAP), GAP + rows * (height + GAP)), BACKGROUND)
        font = ImageFont.load_default(size=max(11, self.cell_side // 26))
        for cell, (index, thumbnail) in enumerate(sorted(self._thumbnails.items())):
            row, column = divmod(cell, columns)
            corner = (GAP + column * (width + GAP), GAP + row * (height + GAP))
            sheet.paste(_labelled(thumbnail, str(index), font), corner)
        return sheet


def _labelled(thumbnail: Image.Image, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """Put a small dark plate with the text into the lower left corner, readable on any picture."""
    layer = Image.new("RGBA", thumbnail.size)
    draw = ImageDraw.Draw(layer)
    left, bottom = 6, thumbnail.height - 6
    box = draw.textbbox((left + 6, bottom - 4), text, font=font, anchor="lb")
    draw.rounded_rectangle((left, box[1] - 4, box[2] + 6, bottom), radius=4, fill=LABEL_BACK)
    draw.text((left + 6, bottom - 4), text, font=font, anchor="lb", fill=LABEL_TEXT)
    return Image.alpha_composite(thumbnail.convert("RGBA"), layer).convert("RGB")
