"""The contact sheet: the right frames, in order, from a stream, in little memory."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swifti2v.engine.errors import MediaError
from swifti2v.runtime.contact_sheet import GAP, ContactSheet


def grey_frames(first: int, count: int, height: int = 36, width: int = 64) -> np.ndarray:
    """Frames whose grey level is twice their index."""
    levels = 2 * np.arange(first, first + count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def cell_levels(path: Path, columns: int, width: int, height: int, count: int) -> list[int]:
    pixels = np.array(Image.open(path).convert("L"))
    corners = [divmod(cell, columns) for cell in range(count)]
    # The upper right of a cell is free of the label.
    return [int(pixels[GAP + r * (height + GAP) + 4, (c + 1) * (width + GAP) - 4]) for r, c in corners]


@pytest.mark.parametrize("chunks", [[81], [9, *[12] * 6], [1] * 81])
def test_evenly_spaced_frames_in_order_however_they_are_chunked(tmp_path: Path, chunks: list[int]):
    sheet, first = ContactSheet(81, cell_side=64), 0
    for count in chunks:
        sheet.add(grey_frames(first, count), first)
        first += count
    sheet.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert (image.size, image.mode) == ((GAP + 4 * (64 + GAP), GAP + 3 * (36 + GAP)), "RGB")
    want = [round(80 * cell / 11) for cell in range(12)]
    assert cell_levels(tmp_path / "a.png", 4, 64, 36, 12) == [2 * index for index in want]
    assert (want[0], want[-1]) == (0, 80)


@pytest.mark.parametrize(("frames", "grid"), [(1, (1, 1)), (3, (3, 1)), (5, (3, 2)), (12, (4, 3)), (13, (4, 3))])
def test_short_clips(tmp_path: Path, frames: int, grid: tuple[int, int]):
    sheet = ContactSheet(frames, cell_side=64)
    sheet.add(grey_frames(0, frames), 0)
    sheet.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (GAP + grid[0] * (64 + GAP), GAP + grid[1] * (36 + GAP))


def test_portrait_cells_keep_their_shape(tmp_path: Path):
    sheet = ContactSheet(12, cell_side=96)
    sheet.add(grey_frames(0, 12, height=96, width=48), 0)
    sheet.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (GAP + 6 * (48 + GAP), GAP + 2 * (96 + GAP))


def test_every_cell_has_its_own_number(tmp_path: Path):
    sheet = ContactSheet(2, cell_side=200)
    sheet.add(np.full((2, 100, 200, 3), 90, np.uint8), 0)
    sheet.save(tmp_path / "a.png")
    pixels = np.array(Image.open(tmp_path / "a.png"))
    cells = [pixels[GAP : GAP + 100, left : left + 200] for left in (GAP, 2 * GAP + 200)]
    for cell in cells:
        assert cell[50:, :60].max() > 200, "white digits"
        assert cell[50:, :60].min() < 60, "on a dark plate"
        assert (cell[:50] == 90).all()
    assert (cells[0] != cells[1]).any()


def test_memory_does_not_grow_with_the_clip():
    sheet = ContactSheet(10_000, cells=12, cell_side=64)
    for first in range(0, 10_000, 500):
        sheet.add(np.zeros((500, 36, 64, 3), np.uint8), first)
    kept = [value for value in vars(sheet).values() if isinstance(value, dict)]
    assert [len(value) for value in kept] == [12]


def test_a_clip_that_stopped_early_shows_what_there_is(tmp_path: Path):
    sheet = ContactSheet(81, cell_side=64)
    sheet.add(grey_frames(0, 20), 0)
    sheet.save(tmp_path / "a.jpg")
    assert cell_levels(tmp_path / "a.jpg", 3, 64, 36, 3) == pytest.approx([0, 14, 30], abs=3)


def test_what_is_refused(tmp_path: Path):
    with pytest.raises(MediaError, match="got 0 frames"):
        ContactSheet(0)
    sheet = ContactSheet(4)
    with pytest.raises(MediaError, match="got no frames"):
        sheet.save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="want uint8"):
        sheet.add(np.zeros((1, 8, 8, 3)), 0)
    sheet.add(grey_frames(0, 4), 0)
    with pytest.raises(MediaError, match=r"got suffix '.gif', want .png or .jpg or .jpeg; name the file a.png"):
        sheet.save(tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())
