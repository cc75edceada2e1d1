"""H.264 in BT.709, read back with numbers; a file that is whole or not there at all."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from swifti2v.engine.errors import MediaError
from swifti2v.runtime.video import VideoWriter

WIDTH, HEIGHT = 96, 64
BT709_LUMA, BT601_LUMA = (0.2126, 0.7152, 0.0722), (0.299, 0.587, 0.114)


def solid(colour, count: int = 1) -> np.ndarray:
    return np.full((count, HEIGHT, WIDTH, 3), colour, np.uint8)


def moving(count: int) -> np.ndarray:
    """Smooth frames that differ from each other."""
    y, x, t = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), np.arange(count), indexing="ij")
    red, green, blue = 128 + 100 * np.sin(x / 17 + t / 5), 40 + 2 * y, 128 + 90 * np.cos(x / 12 - y / 20 + t / 6)
    return np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8).transpose(2, 0, 1, 3)  # [T, H, W, 3]


def write(path: Path, *chunks: np.ndarray, fps: float | Fraction = 24) -> Path:
    with VideoWriter(path, WIDTH, HEIGHT, fps, preset="veryfast") as video:
        for chunk in chunks:
            video.write(chunk)
    return path


def decode(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def planes(frame: av.VideoFrame) -> list[np.ndarray]:
    return [np.frombuffer(bytes(p), np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes]


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Our own BT.709 limited-range conversion, so that the test does not trust the converter under test."""
    y, cb, cr = (p.astype(np.float64) for p in planes(frame))
    cb, cr = (np.kron(c, np.ones((2, 2))) for c in (cb, cr))
    luma, cb, cr = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    red, blue = luma + 1.5748 * cr, luma + 1.8556 * cb
    green = (luma - BT709_LUMA[0] * red - BT709_LUMA[2] * blue) / BT709_LUMA[1]
    return np.stack([red, green, blue], -1) * 255


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (30, 90, 200)])
def test_colours_follow_the_709_matrix(tmp_path: Path, colour: tuple[int, int, int]):
    luma, luma_601 = (16 + 219 * np.dot(colour, weights) / 255 for weights in (BT709_LUMA, BT601_LUMA))
    red, _, blue = (c / 255 for c in colour)
    scaled = (luma - 16) / 219
    want = (luma, 128 + 224 * (blue - scaled) / 1.8556, 128 + 224 * (red - scaled) / 1.5748)
    got = planes(decode(write(tmp_path / "a.mp4", solid(colour)))[0])
    np.testing.assert_allclose([p.mean() for p in got], want, atol=1)
    if colour.count(0) == 2:  # a primary tells the two matrices apart
        assert abs(got[0].mean() - luma_601) > 5


def test_the_file_is_tagged_709_limited(tmp_path: Path):
    path = write(tmp_path / "a.mp4", solid((9, 9, 9), 3))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        for tags in (stream.codec_context, frame):
            assert (tags.colorspace, tags.color_primaries, tags.color_trc, tags.color_range) == (1, 1, 1, 1)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (WIDTH, HEIGHT)
    data = path.read_bytes()
    assert data[data.index(b"colr") :][:15] == b"colrnclx\0\1\0\1\0\1\0"
    assert data.index(b"moov") < data.index(b"mdat"), "the index comes first"


def test_frames_come_back_in_order_and_close(tmp_path: Path):
    frames = moving(30)
    back = decode(write(tmp_path / "a.mp4", frames[:1], frames[1:13], frames[13:13], frames[13:]))
    assert len(back) == 30
    assert [frame.time for frame in back] == pytest.approx([i / 24 for i in range(30)])
    for got, want in zip(back, frames, strict=True):
        error = to_rgb(got) - want
        assert np.sqrt((error**2).mean()) < 4
        assert abs(error.mean((0, 1))).max() < 1


@pytest.mark.parametrize("fps", [16, 24, 29.97, Fraction(30000, 1001)])
def test_frame_rates(tmp_path: Path, fps: float | Fraction):
    with av.open(str(write(tmp_path / "a.mp4", solid(50, 5), fps=fps))) as container:
        assert float(container.streams.video[0].average_rate or 0) == pytest.approx(float(fps), abs=1e-4)


def test_any_memory_layout(tmp_path: Path):
    frames = moving(2)
    channels_first = np.ascontiguousarray(frames.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    plain, strided = write(tmp_path / "a.mp4", frames), write(tmp_path / "b.mp4", channels_first)
    assert plain.read_bytes() == strided.read_bytes()


def test_odd_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30 take %d.mp4", "https:a.MP4", "-ä.mp4"):
        assert len(decode(tmp_path / write(Path(name), solid(50)))) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_clip_leaves_nothing_and_keeps_the_old(tmp_path: Path, error: type[BaseException]):
    target = tmp_path / "a.mp4"
    target.write_bytes(b"old")
    video = VideoWriter(target, WIDTH, HEIGHT, 24)
    with pytest.raises(error), video:  # noqa: PT012
        video.write(moving(60))
        assert list(tmp_path.glob("a.mp4.*.part"))
        assert target.read_bytes() == b"old"
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert target.read_bytes() == b"old"
    assert len(decode(write(target, solid(1, 2)))) == 2


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path):
    one, other = (VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 24, preset="veryfast") for _ in range(2))
    with one:
        one.write(solid(50, 3))
        with other:
            other.write(solid(200, 5))
        assert len(decode(tmp_path / "a.mp4")) == 5
        one.write(solid(50, 4))
    made = decode(tmp_path / "a.mp4")
    assert len(made) == 7
    assert all(abs(to_rgb(frame).mean() - 50) < 3 for frame in made), "the last to finish, whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_no_frames_is_an_error_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(MediaError, match="got no frames"):
        write(tmp_path / "a.mp4", solid(0, 0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, HEIGHT, WIDTH, 3), np.float32),
        np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        np.zeros((1, 3, HEIGHT, WIDTH), np.uint8),
        np.zeros((1, WIDTH, HEIGHT, 3), np.uint8),
        np.zeros((1, HEIGHT, WIDTH, 4), np.uint8),
    ],
    ids=lambda f: f"{f.dtype}{f.shape}",
)
def test_wrong_frames_are_refused(tmp_path: Path, frames: np.ndarray):
    with pytest.raises(MediaError, match=r"want uint8 \(n, 64, 96, 3\)"):
        write(tmp_path / "a.mp4", frames)
    assert not list(tmp_path.iterdir())


def refusal(path: Path, **settings) -> str:
    with pytest.raises(MediaError) as caught, VideoWriter(path, **{"width": 64, "height": 64, "fps": 24, **settings}):
        pytest.fail("opened")
    text = str(caught.value)
    assert all(part in text for part in (str(path), ": got ", ", want ", "; "))
    assert "\n" not in text
    return text


def test_what_cannot_be_opened(tmp_path: Path):
    (tmp_path / "folder.mp4").mkdir()
    assert "name the file clip.mp4" in refusal(tmp_path / "clip.mov")
    assert "want .mp4" in refusal(tmp_path / "clip")
    assert "got a folder" in refusal(tmp_path / "folder.mp4")
    assert "got a folder" in refusal(tmp_path)
    assert "create it first" in refusal(tmp_path / "missing" / "a.mp4")
    assert "too long" in refusal(tmp_path / ("a" * 250 + ".mp4"))
    assert "65x64" in refusal(tmp_path / "a.mp4", width=65)
    assert "64x0" in refusal(tmp_path / "a.mp4", height=0)
    assert "positive" in refusal(tmp_path / "a.mp4", fps=0)
    assert "check crf and preset" in refusal(tmp_path / "a.mp4", preset="warp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.mp4"]


def test_a_folder_without_write_permission(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        assert "Permission denied" in refusal(tmp_path / "a.mp4")
    finally:
        tmp_path.chmod(0o700)


def test_a_target_that_cannot_be_replaced(tmp_path: Path):
    """The target turns into a folder while the clip is written."""
    video = VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 24)
    with pytest.raises(MediaError, match="want a finished file"), video:  # noqa: PT012
        video.write(solid(5))
        (tmp_path / "a.mp4").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


FULL_DISK = """
import resource, sys
import numpy as np
from swifti2v.engine.errors import MediaError
from swifti2v.runtime.video import VideoWriter
path, limit = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores SIGXFSZ: writes fail with EFBIG
random, stage = np.random.default_rng(0), "write"
try:
    with VideoWriter(path, 64, 64, 24, preset="ultrafast") as video:
        for _ in range(8):
            video.write(random.integers(0, 256, (10, 64, 64, 3), dtype=np.uint8))
        stage = "close"
except MediaError as error:
    print(stage, error)
"""


def test_a_full_disk(tmp_path: Path):
    """Whether it runs full while frames are written or only at the end: one line, and nothing is left."""
    pytest.importorskip("resource", reason="file size limits are a POSIX thing")
    target = tmp_path / "a.mp4"

    def run(limit: int) -> str:
        command = [sys.executable, "-c", FULL_DISK, str(target), str(limit)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert run(1 << 30) == ""
    size = target.stat().st_size
    for limit, stage in ((20_000, "write"), (size - 100, "close")):
        target.write_bytes(b"old")
        text = run(limit)
        assert text.startswith(f"{stage} video {target}: got 'File too large', want a finished file; ")
        assert "\n" not in text
        assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
        assert target.read_bytes() == b"old"
