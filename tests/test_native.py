"""The C library: built, installed and used as docs/EMBED.md says, from C, C++ and Python; under memory checkers."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

from swifti2v import __version__
from swifti2v.runtime import capi
from swifti2v.runtime.capi import Status

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "EMBED.md").read_text()
BLOCKS = re.findall(r"^```(\w+) (?:test|native)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
TOOLS = ("cmake", "cc", "c++", "pkg-config")
# What a C host needs, and nothing of the environment that the tests run in.
PLAIN = {
    "PATH": os.environ["PATH"],
    "HOME": os.environ.get("HOME", "/"),
    "OMP_NUM_THREADS": "1",
    "VIRTUAL_ENV": sys.prefix,  # which Python CMake takes
}


def block(kind: str, index: int = 0) -> str:
    return [code for found, code in BLOCKS if found == kind][index]


def run(command: list[str] | str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    words = ["bash", "-euc", command] if isinstance(command, str) else command
    return subprocess.run(words, cwd=folder, env=PLAIN | environment, capture_output=True, text=True, check=False)


def done(ran: subprocess.CompletedProcess) -> str:
    """What a command printed; it must have worked."""
    assert ran.returncode == 0, f"{ran.args}\n{ran.stdout[-6000:]}\n{ran.stderr[-6000:]}"
    return ran.stdout


def copy_tree(folder: Path) -> Path:
    """The sources of the library, as a checkout has them."""
    for name in ("native", "examples", "tests/native"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("CMakeLists.txt", "__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the library is built and installed by the document's own commands."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} on this machine")
    folder = copy_tree(tmp_path_factory.mktemp("native"))
    lines = block("sh").splitlines()
    assert [line.split()[0] for line in lines] == ["cmake", "cmake", "ctest", "cmake"]
    built = run("\n".join(line for line in lines if not line.startswith("ctest")), folder)
    done(built)
    assert "warning" not in built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def library(tree: Path) -> Path:
    return tree / "build" / "native" / "libswifti2v.so"


@pytest.fixture
def ppm(tmp_path: Path) -> Path:
    Image.open(ROOT / "examples" / "photo.jpg").resize((192, 128)).save(tmp_path / "photo.ppm")
    return tmp_path / "photo.ppm"


def test_the_hosts_of_ctest_run(tree: Path):
    said = done(run("ctest --test-dir build/native --output-on-failure -E cycles", tree))
    assert "100% tests passed, 0 tests failed out of 4" in said


@pytest.mark.slow
def test_100_sessions_leave_memory_flat(tree: Path):
    done(run("ctest --test-dir build/native --output-on-failure -R cycles", tree))


def test_only_the_header_is_visible(tree: Path, library: Path):
    header = (tree / "build" / "prefix" / "include" / "swifti2v.h").read_text()
    declared = set(re.findall(r"^SWIFTI2V_API [^;(]*?(swifti2v_\w+)\(", header, re.MULTILINE))
    for name in ("swifti2v_create", "swifti2v_set_log"):
        assert name in declared
    nm = done(run(["nm", "-D", "--defined-only", str(library)], tree))
    assert {line.split()[-1] for line in nm.splitlines()} == declared


def test_the_c_block_runs_with_pkg_config(tree: Path):
    (tree / "clip.c").write_text(block("c"))
    assert done(run(block("sh", 1), tree)).startswith("13 frames from 0 on, first byte ")
    [found] = (tree / "build" / "prefix").rglob("swifti2v.pc")
    said = run(["pkg-config", "--modversion", "swifti2v"], tree, PKG_CONFIG_PATH=str(found.parent))
    assert done(said) == f"{__version__}\n"


def test_the_cpp_block_builds_with_find_package(tree: Path, tmp_path: Path):
    (tmp_path / "CMakeLists.txt").write_text(block("cmake"))
    (tmp_path / "host.cpp").write_text(block("cpp"))
    said = done(run(block("sh", 2), tmp_path, PREFIX=str(tree / "build" / "prefix")))
    assert said.endswith(f"swifti2v {__version__}\n")


def test_the_example_writes_every_frame(tree: Path, ppm: Path, tmp_path: Path):
    program = str(tree / "build" / "native" / "examples" / "c" / "generate")
    out = tmp_path / "out"
    out.mkdir()
    said = done(run([program, str(ppm), str(out), "--profile", "tiny", "--prompt", 'a "slow" zoom \\'], tmp_path))
    assert "segment 2: frames 25 to 32" in said
    assert "100 %" in said
    assert sorted(path.name for path in out.iterdir()) == [f"{frame:04d}.ppm" for frame in range(33)]
    assert Image.open(out / "0000.ppm").tobytes() == Image.open(ppm).tobytes()
    assert Image.open(out / "0032.ppm").size == (192, 128)


def test_the_example_says_what_is_wrong(tree: Path, ppm: Path, tmp_path: Path):
    program = str(tree / "build" / "native" / "examples" / "c" / "generate")
    refused = run([program, str(ppm), str(tmp_path), "--profile", "huge"], tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("session: INVALID_JSON: profile: got 'huge', want one of")
    (tmp_path / "cut.ppm").write_bytes(ppm.read_bytes()[:100])
    assert run([program, "cut.ppm", "."], tmp_path).returncode == 1
    (tmp_path / "deep.ppm").write_bytes(b"P6\n192 128\n65535\n" + bytes(2 * 3 * 192 * 128))
    assert run([program, "deep.ppm", "."], tmp_path).returncode == 1
    assert run([program, str(ppm), ".", "--prompt"], tmp_path).returncode == 2


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment without the package."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    return folder


def test_a_missing_package_is_said_in_every_thread(tree: Path, library: Path, empty: Path):
    host = str(tree / "build" / "native" / "tests" / "native" / "local")
    python = str(empty / "bin" / "python")
    said = done(run([host, str(library), "refused", "No module named 'swifti2v'"], tree, SWIFTI2V_PYTHON=python))
    assert re.fullmatch(
        rf"package swifti2v: got ModuleNotFoundError: .* {python}; want .*, or set SWIFTI2V_PYTHON\n", said
    )
    wrong = {"SWIFTI2V_PYTHON": "python3", "PYTHONPATH": str(tree)}
    assert "got python3 from $SWIFTI2V_PYTHON" in done(run([host, str(library), "refused", "absolute"], tree, **wrong))
    folder = {"SWIFTI2V_PYTHON": str(empty)}
    assert f"got {empty} from" in done(run([host, str(library), "refused", "absolute"], tree, **folder))


def test_the_environment_it_is_installed_in_is_found(tree: Path, library: Path, empty: Path):
    host = str(tree / "build" / "native" / "tests" / "native" / "local")
    inside = empty / "lib" / "deep" / "libswifti2v.so"
    inside.parent.mkdir()
    shutil.copy(library, inside)
    done(run([host, str(inside), "refused", f"in the environment of {empty / 'bin' / 'python'};"], tree))
    moved = shutil.copytree(empty, empty.parent / "moved", symlinks=True)
    (moved / "bin" / "python").unlink()
    said = done(run([host, str(moved / "lib" / "deep" / inside.name), "refused", "absolute"], tree))
    assert f"got {moved / 'bin' / 'python'} from the virtual environment of this library" in said, (
        "and no other is taken"
    )


@pytest.fixture
def loaded(library: Path) -> ctypes.CDLL:
    """The library in this process, which runs Python already."""
    opened = ctypes.CDLL(str(library))
    opened.swifti2v_last_error.restype = ctypes.c_char_p
    opened.swifti2v_last_error.argtypes = [ctypes.c_uint64]
    return opened


def test_it_joins_a_host_that_runs_python(loaded: ctypes.CDLL, library: Path):
    assert loaded.swifti2v_start() == Status.OK, loaded.swifti2v_last_error(0)
    assert ctypes.PyDLL(str(library)).swifti2v_start() == Status.OK, "and a caller that holds the GIL"
    handle = ctypes.c_uint64(0)
    config = b'{"profile": "tiny", "frames": 13, "size": [128, 64], "stage1_steps": 1, "stage2_steps": 1}'
    assert loaded.swifti2v_create(config, ctypes.byref(handle)) == Status.OK, loaded.swifti2v_last_error(0)
    assert capi.info(handle.value)[0] == Status.OK, "one table of sessions for the process"
    assert loaded.swifti2v_submit(handle, b'{"image": "/nowhere.png"}', None) == Status.INVALID_IMAGE
    assert capi.last_error(handle.value)[1] == loaded.swifti2v_last_error(handle).decode()
    for padding in ("", "x", "xx"):
        ask = ('{"image": "/' + padding + "€" * 3000 + '"}').encode()
        assert loaded.swifti2v_submit(handle, ask, None) == Status.INVALID_IMAGE, "a name that no file system has"
        assert loaded.swifti2v_last_error(handle).decode().endswith("€")
    assert loaded.swifti2v_destroy(handle) == Status.OK
    assert capi.info(handle.value)[0] == Status.INVALID_HANDLE


def test_long_texts_are_cut_between_characters(loaded: ctypes.CDLL):
    handle = ctypes.c_uint64(0)
    for padding in ("", "x", "xx"):
        config = ('{"bundle": "/' + padding + "€" * 3000 + '"}').encode()
        assert loaded.swifti2v_create(config, ctypes.byref(handle)) < 0
        said = loaded.swifti2v_last_error(0)
        assert 4000 < len(said) < 4096
        assert said.decode().endswith("€")


def test_names_of_statuses_are_those_of_python(loaded: ctypes.CDLL):
    loaded.swifti2v_status_name.restype = ctypes.c_char_p
    assert all(loaded.swifti2v_status_name(status.value).decode() == status.name for status in Status)
    table = re.findall(r"^\| (-?\d+) \| ([A-Z_]+) \|", TEXT, re.MULTILINE)
    assert [(int(number), name) for number, name in table] == [(status.value, status.name) for status in Status]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_address_and_undefined_behaviour_sanitizers_find_nothing(tree: Path, ppm: Path, tmp_path: Path):
    """The library and its hosts are instrumented, Python and PyTorch are not.

    Leaks are valgrind's and the cycles' to find: the leak sanitizer stops every thread of the process at its end, and
    where there are PyTorch's it can wait for ever.
    """
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
    options = [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=Debug"]
    done(run(["cmake", "-S", str(tree), "-B", "asan", *options], tmp_path))
    done(run(["cmake", "--build", "asan"], tmp_path))
    (tmp_path / "out").mkdir()
    example = ["asan/examples/c/generate", str(ppm), "out", "--profile", "tiny"]
    for command in (["asan/tests/native/calls"], ["asan/tests/native/threads"], example):
        done(run(command, tmp_path, ASAN_OPTIONS="detect_leaks=0"))


def made_by_us(record: str) -> bool:
    """Whether our C code is what valgrind speaks of: called by it with no Python function or PyTorch in between."""
    for frame in re.findall(r"(?:at|by) 0x\w+: (.*)", record):
        if "_PyEval" in frame or "torch" in frame:
            return False
        if re.search(r"libswifti2v|\((?:calls|threads|generate)\.c|/native/(?:calls|threads)|/c/generate", frame):
            return True
    return False


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind on this machine")
@pytest.mark.parametrize("host", ["calls", "threads", "generate"])
def test_valgrind_finds_nothing_of_ours(tree: Path, ppm: Path, tmp_path: Path, host: str):
    """No wrong access to memory (the loader's strncmp reads whole words); no unset values and no leaks of ours."""
    log = tmp_path / "valgrind.log"
    (tmp_path / "out").mkdir()
    folder = tree / "build" / "native" / ("examples/c" if host == "generate" else "tests/native")
    words = [str(folder / host), *([str(ppm), "out", "--profile", "tiny"] if host == "generate" else [])]
    done(run(["valgrind", "--leak-check=full", "--num-callers=12", f"--log-file={log}", *words], tmp_path))
    records = re.split(r"^==\d+== \n", log.read_text(), flags=re.MULTILINE)
    assert any("ERROR SUMMARY" in text for text in records)
    assert not [text for text in records if "Invalid" in text and "(dl-load.c:" not in text]
    kinds = r"definitely lost in|uninitialised"
    assert not [text for text in records if re.search(kinds, text) and made_by_us(text)]
