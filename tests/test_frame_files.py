"""PNG, EXR and y4m, read back and compared with what was meant: values, tags, rate, numbers, count."""

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from swifti2v import FrameChunk, Request
from swifti2v.engine.errors import MediaError
from swifti2v.runtime.frame_colour import AP1, COLOURS, REC709, from_srgb, rgb_matrix, srgb_to_linear
from swifti2v.runtime.frame_files import FrameFiles, FramePattern, FrameStyle, timecode, write_bytes
from swifti2v.runtime.frame_pipe import PipeWriter

HEIGHT, WIDTH = 48, 64
SAID = {"shot": "sh010", "seed": "3", "profile": "tiny"}
# Linear Rec.709 to ACEScg with Bradford, as published with ACES and by colour science libraries.
PUBLISHED = [
    [0.6130974, 0.3395231, 0.0473795],
    [0.0701937, 0.9163539, 0.0134524],
    [0.0206156, 0.1095698, 0.8698146],
]


def chunk(count: int = 3, index: int = 13, seed: int = 0) -> FrameChunk:
    """Frames whose float values lie between the 8-bit ones."""
    deep = np.random.default_rng(seed).random((count, HEIGHT, WIDTH, 3), np.float32)
    deep[0, 0, :4] = [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0.5, 0.5, 0.5]]
    return FrameChunk(np.rint(deep * 255).astype(np.uint8), index, 1, deep)


def test_the_srgb_curve():
    codes = np.array([0, 0.04045, 0.0404501, 0.5, 1], np.float32)
    np.testing.assert_allclose(srgb_to_linear(codes), [0, 0.0031308, 0.0031308, 0.2140411, 1], atol=1e-7)
    assert srgb_to_linear(codes).dtype == np.float32
    levels = np.arange(1024, dtype=np.float32) / 1023
    assert len(np.unique(srgb_to_linear(levels).astype(np.float16))) == 1024, "half keeps every 10-bit level"


def test_the_matrix_to_acescg():
    np.testing.assert_allclose(rgb_matrix(REC709, AP1), PUBLISHED, atol=1e-6)
    np.testing.assert_allclose(rgb_matrix(REC709, AP1) @ rgb_matrix(AP1, REC709), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(rgb_matrix(REC709, AP1).sum(1), 1, atol=1e-12)  # white stays white


@pytest.mark.parametrize(
    ("colour", "red", "grey"),
    [
        ("srgb", [1, 0, 0], 0.5),
        ("lin_rec709", [1, 0, 0], 0.2140411),
        ("acescg", [0.6130974, 0.0701937, 0.0206156], 0.2140411),
    ],
)
def test_known_colours(colour: str, red: list[float], grey: float):
    black, white, is_red, is_grey = from_srgb(chunk().deep[0, 0, :4], COLOURS[colour])  # type: ignore[index]
    np.testing.assert_allclose(black, 0)
    np.testing.assert_allclose(white, 1, atol=1e-6)
    np.testing.assert_allclose(is_red, red, atol=1e-6)
    np.testing.assert_allclose(is_grey, grey, atol=1e-6)


@pytest.mark.parametrize("colour", list(COLOURS))
def test_exr_comes_back_as_it_was_meant(tmp_path: Path, colour: str):
    openexr = pytest.importorskip("OpenEXR")
    style = FrameStyle(Fraction(24), 1001, COLOURS[colour], SAID)
    files = FrameFiles(FramePattern.parse(tmp_path / "shot.####.exr"), style).write(chunk())
    assert [path.name for path in files] == ["shot.1014.exr", "shot.1015.exr", "shot.1016.exr"]
    assert sorted(tmp_path.iterdir()) == files
    for number, path in enumerate(files, 1014):
        file = openexr.File(str(path))
        header, pixels = file.header(), file.channels()["RGB"].pixels
        assert pixels.dtype == np.float16
        meant = from_srgb(chunk().deep[number - 1014], COLOURS[colour])  # type: ignore[index]
        np.testing.assert_allclose(pixels, meant, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(header["chromaticities"], COLOURS[colour].primaries, rtol=1e-6)
        assert header["colorInteropID"] == COLOURS[colour].interop
        assert openexr.checkColorMetadata(header) == 0, "tags agree with one another"
        assert header["framesPerSecond"] == Fraction(24)
        assert header["imageCounter"] == number
        code = header["timeCode"]
        assert (code.hours, code.minutes, code.seconds, code.frame) == timecode(number, Fraction(24))
        assert {name: header[f"swifti2v/{name}"] for name in SAID} == SAID
        assert header["compression"] == openexr.ZIP_COMPRESSION
        assert header["swifti2v/digitalSourceType"].endswith("trainedAlgorithmicMedia")


def test_exr_is_made_from_float_not_from_8_bits(tmp_path: Path):
    openexr = pytest.importorskip("OpenEXR")
    ramp = np.linspace(0.5, 0.51, WIDTH * HEIGHT * 3, dtype=np.float32).reshape(1, HEIGHT, WIDTH, 3)
    shallow = FrameChunk(np.rint(ramp * 255).astype(np.uint8), 0, 0)
    files = FrameFiles(FramePattern.parse(tmp_path / "a.####.exr"), FrameStyle(Fraction(16)))
    with pytest.raises(MediaError, match="got 8-bit ones, want float"):
        files.write(shallow)
    path = files.write(replace(shallow, deep=ramp))[0]
    assert len(np.unique(openexr.File(str(path)).channels()["RGB"].pixels)) > 15, "8 bits have 4 levels there"


def test_png_comes_back_as_it_was_meant(tmp_path: Path):
    files = FrameFiles(FramePattern.parse(tmp_path / "a.%04d.png"), FrameStyle(Fraction(30000, 1001), attributes=SAID))
    paths = files.write(chunk())
    assert [path.name for path in paths] == ["a.1014.png", "a.1015.png", "a.1016.png"]
    for path, frame in zip(paths, chunk().frames, strict=True):
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert np.array_equal(np.asarray(image), frame)
            assert image.info["srgb"] == 1
            assert image.info["swifti2v/fps"] == "30000/1001"
            assert {name: image.info[f"swifti2v/{name}"] for name in SAID} == SAID


def test_png_is_srgb_only(tmp_path: Path):
    with pytest.raises(MediaError, match="write EXR for linear light"):
        FrameFiles(FramePattern.parse(tmp_path / "a.#.png"), FrameStyle(Fraction(8), colour=COLOURS["acescg"]))


@pytest.mark.parametrize("suffix", ["png", "exr"])
def test_equal_frames_are_written_once(tmp_path: Path, suffix: str):
    if suffix == "exr":
        pytest.importorskip("OpenEXR")
    files = FrameFiles(FramePattern.parse(tmp_path / f"a.####.{suffix}"), FrameStyle(Fraction(8)))
    before = [path.stat().st_mtime_ns for path in files.write(chunk())]
    assert [path.stat().st_mtime_ns for path in files.write(chunk())] == before
    assert [path.stat().st_mtime_ns for path in files.write(chunk(seed=1))] != before


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path):
    with pytest.raises(MediaError, match=r"file .*none/a: got 'No such file or directory', want a finished file"):
        write_bytes(tmp_path / "none" / "a", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MediaError, match="folder"):
        write_bytes(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("name", "file", "record"),
    [
        ("shot.####.exr", "shot.0007.exr", "shot.json"),
        ("shot.%04d.EXR", "shot.0007.EXR", "shot.json"),
        ("shot_$F4.png", "shot_0007.png", "shot.json"),
        ("$F.png", "7.png", "frames.json"),
        ("%d.png", "7.png", "frames.json"),
        ("#.png", "7.png", "frames.json"),
        ("a.##.b.png", "a.07.b.png", "a.json"),
    ],
)
def test_patterns(tmp_path: Path, name: str, file: str, record: str):
    pattern = FramePattern.parse(tmp_path / name)
    assert pattern.file(7) == tmp_path / file
    assert "123456" in pattern.file(123456).name, "more digits than there is room for"
    assert pattern.record == tmp_path / record


@pytest.mark.parametrize(("name", "words"), [("shot.png", "got 0 places"), ("##.##.png", "got 2"), ("#.tif", "'.tif'")])
def test_patterns_that_are_refused(name: str, words: str):
    with pytest.raises(MediaError, match=words):
        FramePattern.parse(name)


def test_timecodes():
    assert timecode(0, Fraction(24)) == (0, 0, 0, 0)
    assert timecode(1001, Fraction(24)) == (0, 0, 41, 17)
    assert timecode(86_400 * 25 - 1, Fraction(25)) == (23, 59, 59, 24)
    assert timecode(86_400 * 25, Fraction(25)) == (0, 0, 0, 0)
    assert timecode(30, Fraction(30000, 1001)) == (0, 0, 1, 0)


def test_no_timecode_above_30_frames_per_second(tmp_path: Path):
    openexr = pytest.importorskip("OpenEXR")
    files = FrameFiles(FramePattern.parse(tmp_path / "a.####.exr"), FrameStyle(Fraction(60)))
    header = openexr.File(str(files.write(chunk())[0])).header()
    assert "timeCode" not in header
    assert header["framesPerSecond"] == 60


def y4m(frames: np.ndarray, chroma, fps: Fraction = Fraction(24)) -> bytes:
    file = io.BytesIO()
    PipeWriter(file, WIDTH, HEIGHT, fps, chroma).write(frames)
    return file.getvalue()


@pytest.mark.parametrize("chroma", ["420", "444"])
def test_y4m_comes_back_as_it_was_meant(chroma):
    frames = np.stack([np.full((HEIGHT, WIDTH, 3), colour, np.uint8) for colour in ((200, 40, 40), (0, 0, 0))])
    with av.open(io.BytesIO(y4m(frames, chroma, Fraction(30000, 1001))), format="yuv4mpegpipe") as file:
        stream = file.streams.video[0]
        assert stream.average_rate == Fraction(30000, 1001)
        assert (stream.width, stream.height) == (WIDTH, HEIGHT)
        assert stream.codec_context.pix_fmt == f"yuv{chroma}p"
        assert stream.codec_context.color_range == 1, "limited"
        decoded = list(file.decode(stream))
    assert len(decoded) == 2
    # 16 + 219 Y', 128 + 224 (B'-Y')/1.8556, 128 + 224 (R'-Y')/1.5748 with the luma of BT.709
    for frame, meant in zip(decoded, ((79.57, 111.90, 198.27), (16, 128, 128)), strict=True):
        planes = [np.frombuffer(bytes(p), np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes]
        np.testing.assert_allclose([plane.mean() for plane in planes], meant, atol=0.6)
        assert all(plane.std() == 0 for plane in planes)


def test_chroma_of_420_lies_where_its_tag_says():
    """`420jpeg`: a sample lies amid its four pixels, so it is their mean."""
    ramp = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    ramp[0, :, :, 0] = 40 + 2 * np.arange(WIDTH)
    data = {chroma: y4m(ramp, chroma).split(b"FRAME\n")[1] for chroma in ("420", "444")}
    assert b" C420jpeg " in y4m(ramp, "420").split(b"\n")[0]
    red = np.frombuffer(data["420"], np.uint8)[-HEIGHT * WIDTH // 4 :].reshape(HEIGHT // 2, WIDTH // 2).astype(float)
    full = np.frombuffer(data["444"], np.uint8)[-HEIGHT * WIDTH :].reshape(HEIGHT, WIDTH).astype(float)
    means = full.reshape(HEIGHT // 2, 2, WIDTH // 2, 2).mean((1, 3))
    inner = (red - means)[:, 2:-2]
    assert abs(inner.mean()) < 0.05
    assert abs(inner).max() <= 1


def test_chunks_are_one_stream():
    frames = chunk(5).frames
    whole, file = y4m(frames, "420"), io.BytesIO()
    writer = PipeWriter(file, WIDTH, HEIGHT, 24)
    assert file.getvalue() == b"", "nothing before there is a frame"
    writer.write(frames[:2])
    writer.write(frames[2:])
    assert file.getvalue() == whole
    assert whole.count(b"YUV4MPEG2") == 1
    assert len(whole) == len(whole.split(b"\n")[0]) + 1 + 5 * (6 + WIDTH * HEIGHT * 3 // 2)


def test_a_pipe_without_reader():
    class Closed(io.BytesIO):
        def write(self, data) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(MediaError, match="got 'Broken pipe', want a reader until the end"):
        PipeWriter(Closed(), WIDTH, HEIGHT, 24).write(chunk().frames)


def test_deep_frames_are_the_frames_before_rounding(tiny, make_session):
    """A session's float frames round to its 8-bit ones, and asking for them changes nothing."""
    image = np.random.default_rng(0).integers(0, 256, (tiny.height, tiny.width, 3), np.uint8)
    with make_session(tiny) as session:
        plain = next(session.generate(Request(image, "zoom")))
        both = next(session.generate(Request(image, "zoom", deep=True)))
    assert plain.deep is None
    assert both.deep is not None
    assert (both.deep.dtype, both.deep.shape) == (np.float32, both.frames.shape)
    assert 0 <= both.deep.min() <= both.deep.max() <= 1
    assert np.array_equal(both.frames, plain.frames)
    assert np.array_equal(np.rint(both.deep * 255).astype(np.uint8), both.frames)
    assert np.array_equal(np.rint(both.deep[0] * 255).astype(np.uint8), image)
    between = np.abs(both.deep[1:] * 255 - both.frames[1:])
    assert between.max() > 0.4, "they hold what rounding takes away"
