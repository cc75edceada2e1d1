"""Pictures in and out: any image file to RGB, to the size of the clip, to a tensor; tensors back to frames."""

import contextlib
import io
import os
import secrets
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from ..engine.errors import MediaError, NumericsError
from ..kernels.pixels import to_bytes_eager

MAX_PIXELS = 89_478_485  # Pillow's own warning limit against decompression bombs
MIN_SIDE = 16
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
VECTOR_FORMATS = ("EPS", "WMF")  # Pillow hands these to another program, which executes them
# Cut-outs and drawings are made to be seen on a page; their dark outlines would vanish on black.
BEHIND_TRANSPARENCY = (255, 255, 255)
_TURNS = Image.Transpose
UPRIGHT = {  # by the EXIF orientation of a picture that is not
    2: _TURNS.FLIP_LEFT_RIGHT, 3: _TURNS.ROTATE_180, 4: _TURNS.FLIP_TOP_BOTTOM, 5: _TURNS.TRANSPOSE,
    6: _TURNS.ROTATE_270, 7: _TURNS.TRANSVERSE, 8: _TURNS.ROTATE_90,
}  # fmt: skip


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as an upright 8-bit sRGB image.

    Takes every mode that Pillow opens, and the first frame of an animation. Transparency is laid over white. Deep
    grey becomes 8 bits: 16-bit divided by 257; 32-bit integers likewise, floats as [0, 1], and either by its maximum
    where that is higher. An embedded colour profile is applied; a broken one counts as absent, as in every viewer.
    Raises MediaError for a file that is missing, no image, damaged, under 16 pixels on a side or over 89,478,485
    pixels; sizes are judged from the header, before anything is decoded.
    """
    path = Path(path)
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "something that is not a file" if path.exists() else "no such file"
            raise MediaError(f"image {path}: got {found}, want an image file; check the path")
        with path.open("rb") as file, warnings.catch_warnings():
            # Pillow warns about sizes that are refused here anyway, and about odd metadata that does no harm.
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                _check_header(path, image)
                return _to_rgb(_upright(image))
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        want = "want a picture format such as JPEG, PNG, WebP or TIFF; convert it"
        raise MediaError(f"image {path}: got a file that is none, {want}") from error
    except Image.DecompressionBombError as error:
        want = f"want at most {MAX_PIXELS:,}; scale it down first"
        raise MediaError(f"image {path}: got over {2 * MAX_PIXELS:,} pixels, {want}") from error
    except Exception as error:  # on damaged files, decoders raise nearly anything
        want = "want a complete, readable image; save or copy it again"
        raise MediaError(f"image {path}: got '{reason(error)}', {want}") from error


def fit_image(image: Image.Image, width: int, height: int, fit: Literal["crop", "pad"] = "crop") -> np.ndarray:
    """Bring an image to a size without distorting it: uint8 [height, width, 3].

    "crop" fills the size and cuts what sticks out, evenly on both sides; "pad" shows everything, centred on black.
    An image that has the size already comes back bit for bit. Raises MediaError for another word.
    """
    if fit not in ("crop", "pad"):
        raise MediaError(f"fit: got '{fit}', want 'crop' or 'pad'; choose one of them")
    image = image.convert("RGB")
    if image.size == (width, height):
        return np.array(image)
    scales = (width / image.width, height / image.height)
    lanczos = Image.Resampling.LANCZOS
    # reducing_gap: large reductions first average whole pixels, which is many times faster and looks the same.
    if fit == "pad":
        scale = min(scales)
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        canvas = Image.new("RGB", (width, height))
        offset = ((width - inner[0]) // 2, (height - inner[1]) // 2)
        canvas.paste(image.resize(inner, lanczos, reducing_gap=3.0), offset)
        return np.array(canvas)
    scale = max(scales)
    box_width, box_height = min(width / scale, image.width), min(height / scale, image.height)
    # Cutting at whole pixels makes a crop that needs no scaling a plain copy.
    left, top = int((image.width - box_width) / 2), int((image.height - box_height) / 2)
    box = (left, top, left + box_width, top + box_height)
    return np.array(image.resize((width, height), lanczos, box=box, reducing_gap=3.0))


def to_tensor(frame: np.ndarray) -> torch.Tensor:
    """Turn one frame, uint8 [H, W, 3], into the models' fp32 [1, 3, 1, H, W] in [-1, 1]."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise MediaError(f"frame: got {frame.dtype} {frame.shape}, want uint8 (H, W, 3); convert it with fit_image")
    channels_first = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))  # [3, H, W]
    return channels_first[None, :, None].float() / 127.5 - 1  # [1, 3, 1, H, W]


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """Turn pixels [1, 3, T, H, W] in [-1, 1], any float type or device, into frames, uint8 [T, H, W, 3].

    Rounds to nearest and clamps, so that it inverts to_tensor exactly. Raises NumericsError where a value is not
    finite, MediaError for another shape.
    """
    if pixels.ndim != 5 or pixels.shape[:2] != (1, 3):
        raise MediaError(f"pixels: got {tuple(pixels.shape)}, want (1, 3, T, H, W); pass the decoder's output")
    frames, broken = to_bytes_eager(pixels, 1)  # [1, T, H, W, 3]
    if broken.item():
        raise NumericsError("pixels: got values that are not finite, want [-1, 1]; try precision fp32 or bf16")
    return frames[0].cpu().numpy()


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG or JPEG file, whole or not at all. Raises MediaError for another suffix or a failed write."""
    target = check_target("image", path, IMAGE_SUFFIXES)
    part = part_of(target)
    try:
        if target.suffix.lower() == ".png":
            image.save(part, format="PNG")
        else:
            image.save(part, format="JPEG", quality=92)
        part.replace(target)
    except OSError as error:
        want = f"want a finished file; check {target.parent} for free space and permissions"
        raise MediaError(f"image {target}: got '{reason(error)}', {want}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def check_target(kind: str, path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Path:
    """Return the path as given, or raise MediaError if a file of this kind cannot be meant or placed there."""
    path = Path(path)
    if path.is_dir():
        raise MediaError(f"{kind} {path}: got a folder, want a file name; add one")
    if path.suffix.lower() not in suffixes:
        want = f"want {' or '.join(suffixes)}; name the file {path.with_suffix(suffixes[0]).name}"
        raise MediaError(f"{kind} {path}: got suffix '{path.suffix}', {want}")
    if not path.parent.is_dir():
        raise MediaError(f"{kind} {path}: got no folder {path.parent}, want an existing one; create it first")
    return path


def part_of(path: Path) -> Path:
    """Name the unfinished file that is renamed to path when it is complete; another writer of path has another."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def reason(error: BaseException) -> str:
    """Put an exception of another library on one line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _check_header(path: Path, image: Image.Image) -> None:
    if image.format in VECTOR_FORMATS:
        raise UnidentifiedImageError
    if min(image.size) < MIN_SIDE:
        want = f"want at least {MIN_SIDE} pixels on each side; use a larger image"
        raise MediaError(f"image {path}: got {image.width}x{image.height}, {want}")
    if image.width * image.height > MAX_PIXELS:
        want = f"want at most {MAX_PIXELS:,} pixels; scale it down first"
        raise MediaError(f"image {path}: got {image.width}x{image.height}, {want}")


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says. Damaged metadata says nothing: ImageOps.exif_transpose would refuse it."""
    image.load()  # metadata may come after the pixels
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as decoders, its readers raise nearly anything
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode[0] in "IF":  # I, I;16 and its byte orders, F
        image = _deep_to_grey(image)
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    alpha = image.convert("RGBA").getchannel("A")
    # Grey stays grey here, as its profile describes grey.
    colour = _to_srgb(image.convert("L" if image.mode in ("L", "LA") else "RGB"), profile)
    return Image.composite(colour, Image.new("RGB", colour.size, BEHIND_TRANSPARENCY), alpha)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):  # 1, P, YCbCr, HSV, RGBX
        image = image.convert("RGB")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
            transform = ImageCms.buildTransform(
                source, ImageCms.createProfile("sRGB"), image.mode, "RGB", renderingIntent=intent, flags=flags
            )
            return transform.apply(image)
    return image.convert("RGB")


def _deep_to_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    top = max(float(values.max()), 1.0 if image.mode == "F" else 65535.0)
    return Image.fromarray(np.rint(values.clip(min=0) * (255 / top)).astype(np.uint8))
