"""The table of photographs, finding and loading them, and the packed file. Works with whatever packages are here."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swifti2v.engine.errors import EnvironmentMismatch, MediaError
from swifti2v.training import photos
from swifti2v.training.photos import PACKAGES, PHOTOS, SPLITS, find_photos, in_split, load_packed, load_split, pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a small stand-in for every photograph of the table, each of its own size and colour."""
    place = tmp_path / "pictures"
    place.mkdir()
    for number, photo in enumerate(PHOTOS):
        Image.new("RGB", (40 + number, 30), (10 * number, 100, 200)).save(place / photo.name)
    return place


def test_no_photograph_is_in_two_sets():
    names = [photo.name for photo in PHOTOS]
    assert len(set(names)) == len(names)
    assert {photo.split for photo in PHOTOS} == set(SPLITS)
    assert len({Path(name).stem for name in names}) == len(names)
    assert sum(len(in_split(split)) for split in SPLITS) == len(PHOTOS)


def test_enough_is_held_out():
    assert len(in_split("held-out")) >= 8
    assert len(in_split("val")) >= 4
    assert len(in_split("train")) > len(in_split("held-out"))
    assert "lake-sherburne.jpg" in {photo.name for photo in in_split("held-out")}


def test_every_row_has_a_package_that_can_be_named_and_a_licence():
    for photo in PHOTOS:
        assert photo.package in PACKAGES
        assert photo.licence
        assert photo.source


def test_another_word_for_a_set_is_refused():
    with pytest.raises(MediaError, match=r"photo set: got 'test', want one of train, val, held-out; "):
        in_split("test")


def test_the_example_is_found_without_any_package():
    assert find_photos()["lake-sherburne.jpg"].name == "photo.jpg"


def test_a_folder_comes_before_an_installed_package(folder: Path):
    found = find_photos([folder])
    assert set(found) == {photo.name for photo in PHOTOS}
    assert {path.parent for path in found.values()} == {folder}


@pytest.mark.parametrize("split", SPLITS)
def test_a_set_has_its_own_pictures_in_the_order_of_the_table(folder: Path, split: str):
    widths = [40 + number for number, photo in enumerate(PHOTOS) if photo.split == split]
    pictures = load_split(split, [folder])
    assert [picture.shape for picture in pictures] == [(30, width, 3) for width in widths]
    assert all(picture.dtype == np.uint8 for picture in pictures)


def test_large_and_grey_pictures_become_rgb_of_at_most_1600(folder: Path):
    name = in_split("val")[0].name
    Image.new("L", (3000, 2000), 90).save(folder / name)
    picture = load_split("val", [folder])[0]
    assert picture.shape == (1067, 1600, 3)
    assert abs(picture.astype(int) - 90).max() <= 2


def test_a_missing_photograph_names_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    (folder / "coffee.png").unlink()
    (folder / "roman-colosseum.jpg").unlink()
    with pytest.raises(EnvironmentMismatch) as caught:
        load_split("held-out", [folder])
    assert re.search(r": got 6 of 8, .*coffee\.png.*, want all; install ", str(caught.value))
    assert "scikit-image" in str(caught.value)
    assert "budgie-backgrounds" in str(caught.value)
    assert "scikit-learn" not in str(caught.value)
    assert len(load_split("held-out", [folder], allow_missing=True)) == 6


def test_a_broken_photograph_is_refused(folder: Path):
    (folder / "brick.png").write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"brick\.png: got .*, want a readable picture; "):
        load_split("val", [folder])


def test_packed_pictures_come_back(folder: Path, tmp_path: Path):
    out = tmp_path / "photos.safetensors"
    assert pack(("train", "val"), out, [folder]) == {"train": len(in_split("train")), "val": len(in_split("val"))}
    for split in ("train", "val"):
        for ours, theirs in zip(load_packed(out, split), load_split(split, [folder]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(MediaError, match="got train, val, want held-out; "):
        load_packed(out, "held-out")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [out.name]


def test_packed_sides_are_capped(folder: Path, tmp_path: Path):
    Image.new("RGB", (1400, 2048)).save(folder / "chelsea.png")
    pack(("val",), tmp_path / "p.safetensors", [folder])
    assert max(max(picture.shape) for picture in load_packed(tmp_path / "p.safetensors", "val")) == 1024


def test_too_much_to_pack_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(photos, "PACKED_BYTES", 1000)
    with pytest.raises(MediaError, match="want at most 1,000; "):
        pack(SPLITS, tmp_path / "p.safetensors", [folder])
    assert not (tmp_path / "p.safetensors").exists()


def test_a_missing_packed_file_is_refused(tmp_path: Path):
    with pytest.raises(MediaError, match=r"want a readable safetensors file; "):
        load_packed(tmp_path / "none.safetensors", "train")


@pytest.mark.parametrize("package", [name for name, package in PACKAGES.items() if package.module])
def test_an_installed_package_has_its_photographs(package: str):
    if find_spec(PACKAGES[package].module) is None:
        pytest.skip(f"{package} is not installed; pip install -e '.[train]'")
    found = find_photos()
    for photo in PHOTOS:
        if photo.package == package:
            assert photo.name in found, f"{package} no longer comes with {photo.name}"
            with Image.open(found[photo.name]) as image:
                assert min(image.size) >= 300
