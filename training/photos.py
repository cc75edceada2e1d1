"""The photographs that clips are drawn over: where they come from, whose licence they have, and which set has them.

They come with packages that other people's programs use anyway, so nothing is downloaded here. A photograph is in
one set only, and no two sets share a scene. Left out on purpose: pictures whose package states no licence, close
portraits, drawings, documents and pictures from a microscope.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from ..engine.errors import EnvironmentMismatch, MediaError

SPLITS = ("train", "val", "held-out")
LOADED_SIDE, PACKED_SIDE = 1600, 1024
PACKED_BYTES = 40 * 2**20
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "photo.jpg"

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class Photo:
    """One photograph: its file's name, the package it comes with, the licence as that package states it."""

    name: str
    package: str
    licence: str
    source: str
    split: str


@dataclass(frozen=True)
class Package:
    """A package of photographs: what to install, and where its files are, if it is a Python package."""

    install: str
    module: str = ""
    folder: str = ""


PACKAGES = {
    "budgie-backgrounds": Package("Debian's budgie-backgrounds 3.0 and name the folder of its pictures"),
    "scikit-image": Package("the Python package scikit-image", "skimage", "data"),
    "scikit-learn": Package("the Python package scikit-learn", "sklearn", "datasets/images"),
}


def _budgie(name: str, split: str, source: str) -> Photo:
    return Photo(f"{name}.jpg", "budgie-backgrounds", "CC0-1.0", source, split)


PHOTOS = (
    _budgie("abstract-spiral", "train", "white facade, nearly black and white"),
    _budgie("beacon-street-sunset", "train", "roofs of Boston, Matthew Landers"),
    _budgie("casa-mila", "train", "round courtyard from below"),
    _budgie("extreme-desert-hike", "train", "orange dune, clear sky"),
    _budgie("high-trestle-trail", "train", "lit bridge at night"),
    _budgie("oakland-zoo-otters", "train", "otters at the water, Derrick Coetzee"),
    _budgie("perched-osprey", "train", "bird on a branch, U.S. National Park Service"),
    _budgie("tea-gardens", "train", "green hills in fog"),
    Photo("camera.png", "scikit-image", "CC0", "man with a camera, grey; Lav Varshney", "train"),
    Photo("grass.png", "scikit-image", "CC0", "grass, grey; linolafett on DeviantArt", "train"),
    Photo("hubble_deep_field.jpg", "scikit-image", "public domain", "galaxies, NASA", "train"),
    Photo("coins.png", "scikit-image", "no known copyright restrictions", "Brooklyn Museum, grey", "train"),
    Photo("flower.jpg", "scikit-learn", "CC-BY-2.0", "dahlia; vultilion on Flickr, 6056698931", "train"),
    _budgie("piazza-gae-aulenti", "val", "tower through an opening, nearly black and white"),
    Photo("chelsea.png", "scikit-image", "CC0", "cat; Stefan van der Walt", "val"),
    Photo("rocket.jpg", "scikit-image", "public domain", "launch pad at dusk, SpaceX", "val"),
    Photo("brick.png", "scikit-image", "CC0", "brick wall, grey; CC0Textures Bricks25", "val"),
    _budgie("lake-sherburne", "held-out", "mountains and lake, Jacob W. Frank, NPS; also this project's example"),
    _budgie("roman-colosseum", "held-out", "arches and clouds"),
    _budgie("canyon-wren", "held-out", "bird on a rock, Brad Sutton, NPS"),
    _budgie("singaporean-cityscape", "held-out", "skyline at dusk, Romain Guy"),
    _budgie("blue-periwinkle", "held-out", "flowers, shallow depth of field"),
    Photo("coffee.png", "scikit-image", "CC0", "cup on a table; Rachel Michetti", "held-out"),
    Photo("gravel.png", "scikit-image", "CC0", "gravel, grey; CC0Textures Gravel04", "held-out"),
    Photo("china.jpg", "scikit-learn", "CC-BY-2.0", "temple; danielbuechele on Flickr, 6061409035", "held-out"),
)


def in_split(split: str) -> tuple[Photo, ...]:
    """The table's rows of one set. Raises MediaError for another word."""
    if split not in SPLITS:
        raise MediaError(f"photo set: got {split!r}, want one of {', '.join(SPLITS)}; pick one")
    return tuple(photo for photo in PHOTOS if photo.split == split)


def find_photos(folders: Iterable[Folder] = ()) -> dict[str, Path]:
    """Which photographs of the table are here, name -> path: in these folders, else in installed packages.

    Finding imports no package. Files of the same name that are not in the table are ignored.
    """
    places = [Path(folder) for folder in folders]
    found = {}
    for photo in PHOTOS:
        candidates = [place / photo.name for place in places]
        package = PACKAGES[photo.package]
        spec = find_spec(package.module) if package.module else None
        for location in (spec.submodule_search_locations or ()) if spec else ():
            candidates.append(Path(location) / package.folder / photo.name)
        if photo.name == "lake-sherburne.jpg":
            candidates.append(EXAMPLE)
        path = next((path for path in candidates if path.is_file()), None)
        if path:
            found[photo.name] = path
    return found


def load_split(
    split: str, folders: Iterable[Folder] = (), *, allow_missing: bool = False, side: int = LOADED_SIDE
) -> list[np.ndarray]:
    """The photographs of a set in the table's order, uint8 [H, W, 3], the longer side at most `side`.

    Raises EnvironmentMismatch that names what to install for a missing one, unless `allow_missing`, and MediaError
    for one that cannot be read.
    """
    return list(_load(split, folders, side, allow_missing).values())


def pack(
    splits: Sequence[str], out: Folder, folders: Iterable[Folder] = (), *, allow_missing: bool = False
) -> dict[str, int]:
    """Write the photographs of these sets to one safetensors file, "set/name" -> uint8 [H, W, 3], sides <= 1024.

    So a machine without the packages, and without a network, trains on the same photographs, the largest of them
    smaller than `load_split` gives them. Returns how many of each set went in. Raises as `load_split` does, and
    MediaError over 40 MiB.
    """
    folders = tuple(folders)
    tensors, counts = {}, {}
    for split in splits:
        pictures = _load(split, folders, PACKED_SIDE, allow_missing)
        tensors.update({f"{split}/{name}": picture for name, picture in pictures.items()})
        counts[split] = len(pictures)
    size = sum(picture.nbytes for picture in tensors.values())
    if size > PACKED_BYTES:
        raise MediaError(f"packed photos: got {size:,} bytes, want at most {PACKED_BYTES:,}; pack fewer sets")
    out = Path(out)
    part = out.with_name(out.name + ".part")
    save_file(tensors, part, metadata={"licences": "; ".join(f"{p.name}: {p.licence}, {p.package}" for p in PHOTOS)})
    part.replace(out)
    return counts


def load_packed(path: Folder, split: str) -> list[np.ndarray]:
    """The photographs of a set from a packed file, uint8 [H, W, 3], in the table's order.

    Raises MediaError for a file that is missing or broken, or has none of that set.
    """
    names = [f"{split}/{photo.name}" for photo in in_split(split)]
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own kinds beside OSError
        want = "want a readable safetensors file; pack the photos again"
        raise MediaError(f"packed photos {path}: got '{error}', {want}") from error
    pictures = [tensors[name] for name in names if name in tensors]
    if not pictures:
        have = ", ".join(sorted({name.split("/")[0] for name in tensors})) or "nothing"
        raise MediaError(f"packed photos {path}: got {have}, want {split}; pack that set too")
    return pictures


def _load(split: str, folders: Iterable[Folder], side: int, allow_missing: bool) -> dict[str, np.ndarray]:
    found, wanted = find_photos(folders), in_split(split)
    missing = [photo for photo in wanted if photo.name not in found]
    if missing and not allow_missing:
        packages = dict.fromkeys(photo.package for photo in missing)
        advice = ", and ".join(PACKAGES[package].install for package in packages)
        names = ", ".join(photo.name for photo in missing)
        have = f"{len(wanted) - len(missing)} of {len(wanted)}, without {names}"
        raise EnvironmentMismatch(f"{split} photos: got {have}, want all; install {advice}")
    return {photo.name: _read(found[photo.name], side) for photo in wanted if photo.name in found}


def _read(path: Path, side: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except Exception as error:  # on damaged files, decoders raise nearly anything
        want = "want a readable picture; install its package again"
        raise MediaError(f"photo {path}: got '{error}', {want}") from error
    scale = side / max(picture.size)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.array(picture)
