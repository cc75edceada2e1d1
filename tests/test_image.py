"""Any picture in, upright sRGB out; to the clip's size without distortion; to a tensor and back without loss."""

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile, features

from swifti2v.engine.errors import MediaError, NumericsError
from swifti2v.runtime.image import fit_image, load_image, save_image, to_frames, to_tensor

P3_TO_XYZ = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB_TO_XYZ = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])  # D50


def icc_profile(space: bytes, connection: bytes, device: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A minimal ICC version 2 profile: header, tag table, tags."""
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = bytes(4) + struct.pack(">I", 0x02400000) + device + space + connection + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return struct.pack(">I", offset + len(body)) + head + struct.pack(">I", len(tags)) + table + body


def xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(v) * 65536) for v in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def display_p3() -> bytes:
    columns = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, P3_TO_XYZ.T), strict=True))
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(2.2))
    return icc_profile(b"RGB ", b"XYZ ", b"mntr", {b"wtpt": xyz((0.9642, 1, 0.8249)), **columns, **curves})


def linear_grey() -> bytes:
    return icc_profile(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": xyz((0.9642, 1, 0.8249)), b"kTRC": gamma(1.0)})


def black_ink_only() -> bytes:
    """A CMYK profile whose cyan, magenta and yellow inks are invisible: lightness follows K alone."""
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    grid = b"".join(bytes((255 * (1 - k), 128, 128)) for _ in range(8) for k in range(2))  # K varies fastest
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + 4 * ramp + grid + 3 * ramp
    return icc_profile(b"CMYK", b"Lab ", b"prtr", {b"wtpt": xyz((0.9642, 1, 0.8249)), b"A2B0": table})


def solid(mode: str, value) -> Image.Image:
    return Image.new(mode, (32, 24), value)


def deep(value: float, dtype: str) -> Image.Image:
    return Image.fromarray(np.full((24, 32), value, dtype))


def palette_with_hole() -> Image.Image:
    image = solid("P", 1)
    image.putpalette([0, 0, 0, 200, 30, 60])
    image.putpixel((0, 0), 0)
    return image


MODES = {
    "1 bit": (solid("1", 1), "png", {}, (255, 255, 255)),
    "grey": (solid("L", 77), "png", {}, (77, 77, 77)),
    "grey alpha": (solid("LA", (100, 128)), "png", {}, (177, 177, 177)),
    "palette": (palette_with_hole(), "png", {"transparency": 0}, (200, 30, 60)),
    "rgb": (solid("RGB", (10, 20, 30)), "png", {}, (10, 20, 30)),
    "rgba": (solid("RGBA", (0, 100, 200, 51)), "png", {}, (204, 224, 244)),
    "hidden colour": (solid("RGBA", (255, 0, 0, 0)), "png", {}, (255, 255, 255)),
    "colour key": (solid("RGB", (1, 2, 3)), "png", {"transparency": (1, 2, 3)}, (255, 255, 255)),
    "cmyk": (solid("CMYK", (0, 255, 255, 0)), "tif", {}, (255, 0, 0)),
    "ycbcr": (solid("RGB", (90, 120, 150)).convert("YCbCr"), "tif", {}, (90, 120, 150)),
    "lab": (solid("LAB", (128, 128, 128)), "tif", {}, (119, 119, 119)),
    "16 bit": (deep(257 * 200, "<u2"), "png", {}, (200, 200, 200)),
    "16 bit big-endian": (deep(257 * 200, ">u2"), "tif", {}, (200, 200, 200)),
    "32 bit as 16": (deep(257 * 200, "<i4"), "tif", {}, (200, 200, 200)),
    "32 bit": (deep(1_000_000, "<i4"), "tif", {}, (255, 255, 255)),
    "float": (deep(0.4, "<f4"), "tif", {}, (102, 102, 102)),
    "float above one": (deep(40, "<f4"), "tif", {}, (255, 255, 255)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_8_bit_rgb(tmp_path: Path, name: str):
    image, suffix, options, want = MODES[name]
    path = tmp_path / f"picture.{suffix}"
    image.save(path, **options)
    loaded = load_image(path)
    assert (loaded.mode, loaded.size) == ("RGB", (32, 24))
    np.testing.assert_allclose(np.array(loaded)[20, 20], want, atol=2)
    if "transparency" in options or name == "hidden colour":
        assert loaded.getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_keeps_its_whole_range(tmp_path: Path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    got = np.array(load_image(tmp_path / "ramp.png"))[..., 0]
    np.testing.assert_array_equal(got, np.rint(ramp / 257))


def test_bright_float_is_scaled_by_its_maximum(tmp_path: Path):
    Image.fromarray(np.linspace(-1, 4, 32 * 32, dtype=np.float32).reshape(32, 32)).save(tmp_path / "hdr.tif")
    got = np.array(load_image(tmp_path / "hdr.tif"))
    assert (got.min(), got.max(), got[-1, -1, 0]) == (0, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str):
    upright = Image.new("L", (64, 32))
    upright.paste(255, (0, 0, 16, 16))  # marks the top left corner of a wide picture
    turns = Image.Transpose
    inverse = (None, None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM)
    inverse += (turns.TRANSPOSE, turns.ROTATE_90, turns.TRANSVERSE, turns.ROTATE_270)
    method = inverse[orientation]
    stored = upright if method is None else upright.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"turned.{suffix}", exif=exif)
    loaded = load_image(tmp_path / f"turned.{suffix}")
    assert loaded.size == (64, 32)
    np.testing.assert_allclose(np.array(loaded)[..., 0], np.array(upright), atol=8)


def test_display_p3_becomes_srgb(tmp_path: Path):
    colour = np.array([180, 120, 90])
    solid("RGB", tuple(colour)).save(tmp_path / "p3.png", icc_profile=display_p3())
    linear = np.linalg.solve(SRGB_TO_XYZ, P3_TO_XYZ @ (colour / 255) ** 2.2)
    want = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    got = np.array(load_image(tmp_path / "p3.png"))[0, 0]
    assert abs(want - colour).max() > 5
    np.testing.assert_allclose(got, want, atol=1.5)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_grey_profile_applies_to_grey(tmp_path: Path, mode: str):
    solid(mode, 64 if mode == "L" else (64, 255)).save(tmp_path / "grey.png", icc_profile=linear_grey())
    np.testing.assert_allclose(np.array(load_image(tmp_path / "grey.png"))[0, 0], 137, atol=1)


def test_a_cmyk_profile_applies(tmp_path: Path):
    solid("CMYK", (255, 0, 0, 0)).save(tmp_path / "ink.tif", icc_profile=black_ink_only())
    np.testing.assert_allclose(np.array(load_image(tmp_path / "ink.tif"))[0, 0], 255, atol=1)


@pytest.mark.parametrize("profile", [b"junk", display_p3()[:150], linear_grey(), black_ink_only()])
def test_a_profile_that_is_broken_or_of_another_kind_counts_as_absent(tmp_path: Path, profile: bytes):
    solid("RGB", (180, 120, 90)).save(tmp_path / "a.png", icc_profile=profile)
    assert load_image(tmp_path / "a.png").getpixel((5, 5)) == (180, 120, 90)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b"Exif\0\0no header of TIFF", b"Exif\0\0"]
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_metadata_does_no_harm(tmp_path: Path, exif: bytes, suffix: str):
    solid("RGB", (50, 50, 50)).save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0" + exif, dpi=(72, 72))
    assert load_image(tmp_path / f"a.{suffix}").getpixel((5, 5)) == (50, 50, 50)


def test_a_turned_picture_may_have_other_tags_that_are_wrong(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # orientation, and a resolution
    data = bytearray(exif.tobytes())
    data[data.index(b"\x01\x1a") + 3] = 7  # of no known use: undefined bytes
    Image.new("L", (64, 32)).save(tmp_path / "a.png", exif=bytes(data))
    assert load_image(tmp_path / "a.png").size == (32, 64)


def test_an_animation_gives_its_first_frame(tmp_path: Path):
    solid("RGB", (255, 0, 0)).save(tmp_path / "a.gif", save_all=True, append_images=[solid("RGB", (0, 0, 255))])
    assert load_image(tmp_path / "a.gif").getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["webp", "avif", "jp2", "bmp", "ppm", "tga"])
def test_other_formats(tmp_path: Path, suffix: str):
    feature = {"webp": "webp", "avif": "avif", "jp2": "jpg_2000"}.get(suffix)
    if feature and not features.check(feature):
        pytest.skip(f"this Pillow is built without {feature}")
    solid("RGB", (255, 255, 255)).save(tmp_path / f"a.{suffix}")
    assert load_image(tmp_path / f"a.{suffix}").getpixel((5, 5)) == (255, 255, 255)


def png_header(width: int, height: int) -> bytes:
    """A PNG file that says its size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", b"\0")


def refusal(path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        load_image(path)
    text = str(caught.value)
    assert str(path) in text
    assert all(part in text for part in (": got ", ", want ", "; "))
    assert "\n" not in text
    return text


def test_what_is_refused_before_decoding(tmp_path: Path):
    assert "no such file" in refusal(tmp_path / "missing.png")
    assert "folder" in refusal(tmp_path)
    cases = {
        "empty.png": (b"", "none"),
        "text.jpg": (b"hello", "none"),
        "vector.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n", "none"),
        "small.png": (png_header(15, 400), "15x400"),
        "zero.png": (png_header(0, 10), "none"),
        "large.png": (png_header(10_000, 10_000), "10000x10000"),
        "vast.png": (png_header(50_000, 50_000), "178,956,970 pixels"),
    }
    for name, (data, want) in cases.items():
        (tmp_path / name).write_bytes(data)
        assert want in refusal(tmp_path / name), name


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "gif", "bmp"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((200, 200), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-4000])
    assert "want" in refusal(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "gif", "psd", "jp2"])
def test_damaged_bytes_give_an_image_or_a_media_error(tmp_path: Path, suffix: str):
    path, random = tmp_path / f"a.{suffix}", np.random.default_rng(0)
    Image.effect_noise((40, 40), 60).convert("RGB").save(path, **({"format": "PNG"} if suffix == "psd" else {}))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(40):
        damaged = whole.copy()
        damaged[random.integers(0, len(whole), 8)] = random.integers(0, 256, 8)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(MediaError):
            assert load_image(path).mode == "RGB"


def test_floats_that_are_not_finite_are_refused(tmp_path: Path):
    deep(float("nan"), "<f4").save(tmp_path / "nan.tif")
    assert "not finite" in refusal(tmp_path / "nan.tif")


def test_nothing_global_changes_and_no_file_stays_open(tmp_path: Path):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files are counted in /proc")
    solid("RGB", (1, 2, 3)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(png_header(64, 64))
    before = len(os.listdir("/proc/self/fd")), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES  # noqa: PTH208
    kept = load_image(tmp_path / "good.png")
    refusal(tmp_path / "bad.png")
    after = len(os.listdir("/proc/self/fd")), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES  # noqa: PTH208
    assert before == after
    (tmp_path / "good.png").unlink()
    assert kept.getpixel((0, 0)) == (1, 2, 3)


def test_the_right_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    for fit in ("crop", "pad"):
        np.testing.assert_array_equal(fit_image(Image.fromarray(pixels), 160, 96, fit), pixels)


def test_a_crop_without_scaling_copies_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 191, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(Image.fromarray(pixels), 160, 96), pixels[:, 15:175])


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (2000, 400), (161, 97), (97, 801), (40, 40)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_circle_stays_round_and_central(size: tuple[int, int], fit):
    radius = min(size) * 0.3
    image = Image.new("RGB", size)
    box = [size[0] / 2 - radius, size[1] / 2 - radius, size[0] / 2 + radius, size[1] / 2 + radius]
    ImageDraw.Draw(image).ellipse(box, fill=(255, 255, 255))
    got = fit_image(image, 320, 192, fit)
    assert got.shape == (192, 320, 3)
    scale = (max if fit == "crop" else min)(320 / size[0], 192 / size[1])
    rows, columns = (got[..., 0].astype(float).sum(axis) for axis in (1, 0))
    if 2 * radius * scale > 192:
        pytest.skip("the circle is cut by this crop")
    # The widths of the disc through its middle, and its centre of mass.
    assert rows.max() == pytest.approx(columns.max(), rel=0.06, abs=2.5 * 255)
    assert np.average(np.arange(192), weights=rows) == pytest.approx(95.5, abs=0.6 + scale)
    assert np.average(np.arange(320), weights=columns) == pytest.approx(159.5, abs=0.6 + scale)


def test_pad_is_black_outside():
    got = fit_image(solid("RGB", (255, 255, 255)), 320, 64, "pad")
    assert got[:, :100].max() == 0
    assert got[:, -100:].max() == 0
    assert got[32, 160].min() == 255


def test_an_unknown_fit_is_refused():
    with pytest.raises(MediaError, match="got 'stretch', want 'crop' or 'pad'"):
        fit_image(solid("RGB", 0), 64, 64, "stretch")  # pyright: ignore[reportArgumentType]


def test_pixels_survive_the_tensor():
    levels = np.arange(256, dtype=np.uint8)
    frame = np.stack([levels, levels[::-1], np.roll(levels, 99)], axis=-1).reshape(16, 16, 3)
    tensor = to_tensor(frame)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((1, 3, 1, 16, 16), torch.float32, True)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert tensor[0, 0, 0, 3, 5] == pytest.approx(frame[3, 5, 0] / 127.5 - 1)
    np.testing.assert_array_equal(to_frames(tensor), frame[None])


def test_frames_are_rounded_and_clamped():
    pixels = torch.tensor([-1.7, -1.0, 100.6 / 127.5 - 1, 1.0, 9.0]).expand(1, 3, 2, 4, 5)
    for dtype in (torch.float32, torch.float64):
        got = to_frames(pixels.to(dtype))
        assert (got.shape, got.dtype) == ((2, 4, 5, 3), np.uint8)
        assert got[1, 2, :, 1].tolist() == [0, 0, 101, 255, 255]
    assert to_frames(pixels.bfloat16())[0, 0, [0, 1, 3, 4], 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad: float):
    pixels = torch.zeros(1, 3, 2, 4, 4)
    pixels[0, 1, 1, 2, 3] = bad
    with pytest.raises(NumericsError, match="not finite"):
        to_frames(pixels)


def test_wrong_shapes_are_refused():
    with pytest.raises(MediaError, match="want uint8"):
        to_tensor(np.zeros((4, 4), np.uint8))
    with pytest.raises(MediaError, match="want uint8"):
        to_tensor(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(MediaError, match=r"want \(1, 3, T, H, W\)"):
        to_frames(torch.zeros(3, 4, 4))


def test_save_image_is_whole_or_absent(tmp_path: Path):
    for name in ("a.png", "a.JPG", "a.jpeg"):
        save_image(solid("RGB", (255, 255, 255)), tmp_path / name)
        assert load_image(tmp_path / name).getpixel((3, 3)) == (255, 255, 255)
    for path, match in ((tmp_path / "a.bmp", "a.png"), (tmp_path, "folder"), (tmp_path / "no" / "a.png", "no folder")):
        with pytest.raises(MediaError, match=match):
            save_image(solid("RGB", 0), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.JPG", "a.jpeg", "a.png"]
