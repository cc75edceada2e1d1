"""Bundles in use: a session from a folder, and every bundle that cannot be used refused, with what repairs it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import Ran, build, change, command, flip, refused
from safetensors.torch import save_file

from swifti2v import Request, Session, find_models, get_profile, load_models
from swifti2v.engine.errors import BundleError, EnvironmentMismatch
from swifti2v.engine.manifest import MANIFEST, Bundle, read_bundle, write_manifest
from swifti2v.engine.profile import Profile
from swifti2v.export.build import build_bundle
from swifti2v.runtime.backend_cache import bundle_place
from swifti2v.runtime.backend_weights import open_source, weights_record
from swifti2v.runtime.bundle import find_bundle, load_bundle
from swifti2v.runtime.model_paths import ModelPaths

CPU = torch.device("cpu")
REPAIR = "run swifti2v-export --profile tiny --backend eager --precision fp32 -o "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("made") / "bundle").folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "bundle")


def clip(session: Session) -> np.ndarray:
    profile = session.profile
    image = np.random.default_rng(0).integers(0, 256, (profile.height, profile.width, 3), np.uint8)
    with session:
        return np.concatenate([chunk.frames for chunk in session.generate(Request(image, "zoom", seed=3))])


def test_a_session_on_a_bundle_makes_the_same_clip(tiny: Profile, made: Path):
    eager = clip(Session.open(load_models(tiny, dtype=torch.float32)))
    assert np.array_equal(clip(Session.open(made)), eager)
    assert np.array_equal(clip(Session.open(load_bundle(str(made)))), eager)


def test_what_enters_no_graph_may_differ(tiny: Profile, made: Path):
    guided = tiny.override(stage1_steps=2, shift=2.0, stage2_guidance=3.0)
    one = clip(Session.open(load_bundle(made, guided)))
    assert np.array_equal(one, clip(Session.open(load_models(guided, dtype=torch.float32))))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"frames": 41},
            ["stage1_step: got latents [1, 12, 9, 4, 6]", "want latents [1, 12, 11, 4, 6]", "--frames 41"],
        ),
        ({"size": (128, 192)}, ["stage1_step", "[1, 12, 9, 6, 4]", "--size 128x192"]),
        ({"noisy": 2}, ["stage2_first", "--noisy 2"]),
    ],
)
def test_another_profile_is_refused(tiny: Profile, made: Path, changes: dict, words: list[str]):
    refused(lambda: load_bundle(made, tiny.override(**changes)), *words, f"-o {made}", kind=BundleError)


def spoil_flip(folder: Path) -> None:
    flip(folder / "stage2_next" / "graph.json", 100)


def spoil_cut(folder: Path) -> None:
    path = folder / "decode_next" / "graph.json"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_lose(folder: Path) -> None:
    (folder / "image_first" / "graph.json").unlink()


def spoil_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"parity": 0.0', '"parity": 0.5', 1))


def spoil_format(folder: Path) -> None:
    plain = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**plain, "format": 2}))


def spoil_torch(folder: Path) -> None:
    change(folder, versions={**read_bundle(folder).manifest.versions, "torch": "2.0.0"})


def spoil_code(folder: Path) -> None:
    change(folder, versions={**read_bundle(folder).manifest.versions, "model code": "0" * 12})


def spoil_compiler(folder: Path) -> None:
    change(folder, versions={**read_bundle(folder).manifest.versions, "nvcc": "13.0"})


def spoil_graphs(folder: Path) -> None:
    graphs = read_bundle(folder).manifest.graphs
    change(folder, graphs={name: record for name, record in graphs.items() if name != "decode_next"})


def spoil_weights(folder: Path) -> None:
    record = read_bundle(folder).manifest.weights
    change(folder, weights=replace(record, sha256={**record.sha256, "vae2": "0" * 64}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_flip, ["stage2_next/graph.json", "SHA-256"]),
        (spoil_cut, ["decode_next/graph.json", "bytes"]),
        (spoil_lose, ["image_first/graph.json", "no such file"]),
        (spoil_manifest, [MANIFEST, "digest"]),
        (spoil_format, [MANIFEST, "format: got 2, want 1"]),
        (spoil_torch, ["torch", "2.0.0", torch.__version__]),
        (spoil_code, ["model code", "000000000000"]),
        (spoil_compiler, ["nvcc", "13.0"]),
        (spoil_graphs, ["got 14 graphs, want decode_next too"]),
        (spoil_weights, ["weights of vae2", "SHA-256 000"]),
    ],
)
def test_a_bad_bundle_is_refused_and_its_command_repairs_it(folder: Path, spoil, words: list[str]):
    spoil(folder)
    text = refused(lambda: Session.open(folder), *words)
    assert f"{REPAIR}{folder}" in text
    build(folder)  # what the command does
    Session.open(folder).close()


def test_another_arch_is_refused(folder: Path):
    change(folder, arch="sm89")
    refused(
        lambda: load_bundle(folder, device="cpu"), "arch: got a bundle for sm89, want one for cpu", f"{REPAIR}{folder}"
    )
    change(folder, backend="tensorflow", arch="cpu")
    refused(lambda: load_bundle(folder), "tensorflow", "eager, inductor, onnxruntime", kind=EnvironmentMismatch)


def test_a_bundle_cut_off_is_refused(folder: Path, tmp_path: Path):
    (folder / MANIFEST).unlink()
    refused(lambda: Session.open(folder), f"no {MANIFEST}", "swifti2v-export")
    folder.rename(tmp_path / "cut.part")
    refused(lambda: Session.open(tmp_path / "cut"), "cut.part of an interrupted build", f"-o {tmp_path / 'cut'}")
    refused(lambda: Session.open(tmp_path / "nowhere"), "no such folder")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, save_models) -> tuple[Path, Bundle]:
    """A model folder, and a bundle of it."""
    tiny, folder = get_profile("tiny"), tmp_path_factory.mktemp("trained")
    models = save_models(tiny, folder / "models")
    return models, build_bundle(open_source(tiny, models), "eager", folder / "bundle")


def test_weights_must_be_those_it_was_built_from(tiny: Profile, trained: tuple[Path, Bundle], made: Path, save_models):
    models, bundle = trained
    paths = find_models(tiny, models)
    loaded = load_bundle(bundle.folder, paths=paths)
    assert loaded.trained
    assert np.array_equal(clip(Session.open(loaded)), clip(Session.open(load_models(tiny, paths, dtype=torch.float32))))
    refused(lambda: load_bundle(bundle.folder), "weights of", "got none", "--model-dir", kind=BundleError)
    refused(
        lambda: load_bundle(made, paths=paths), "untrained", "want the given ones", "--weights DIR", kind=BundleError
    )
    lora = models.parent / "l.safetensors"
    save_file({"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(96)}, lora)
    merged = find_models(tiny, models, ModelPaths(loras={"stage2": ((lora, 0.5),)}))
    refused(lambda: load_bundle(bundle.folder, paths=merged), "weights of stage2", kind=BundleError)
    record = weights_record(tiny, merged)
    assert [name for name, sha in record.sha256.items() if sha != bundle.manifest.weights.sha256[name]] == ["stage2"]
    none = find_models(tiny, models, ModelPaths(loras={"stage2": ((lora, 0.0),)}))
    assert weights_record(tiny, none).sha256 == bundle.manifest.weights.sha256


def test_the_cache_gives_the_last_bundle_that_fits(tiny: Profile, tmp_path: Path):
    cache, paths = tmp_path / "cache", find_models(tiny)
    assert find_bundle(cache, tiny, paths, CPU) == (None, "")
    source = open_source(tiny)
    specs = [record.spec for record in build(tmp_path / "b").manifest.graphs.values()]
    place = bundle_place(cache, "tiny", "eager", "fp32", "cpu", source.record, specs)
    assert place.parent == cache / "bundles"
    build_bundle(source, "eager", place)
    assert find_bundle(cache, tiny, paths, CPU) == (place, "")
    assert find_bundle(cache, tiny, paths, CPU, torch.bfloat16) == (None, "")
    assert find_bundle(cache, tiny.override(frames=41), paths, CPU) == (None, "")
    assert find_bundle(cache, tiny.override(shift=2.0), paths, CPU) == (place, "")
    half = build(cache / "bundles" / "tiny-eager-bf16-later", precision="bf16").folder
    assert find_bundle(cache, tiny, paths, CPU) == (half, ""), "the last one built"
    assert find_bundle(cache, tiny, paths, CPU, torch.float32) == (place, "")
    write_manifest(half, replace(read_bundle(half).manifest, precision="fp8"))
    assert find_bundle(cache, tiny, paths, CPU) == (place, ""), "fp8 is only for who asks for it"
    (half / MANIFEST).write_text("{")
    assert find_bundle(cache, tiny, paths, CPU) == (place, ""), "what is unreadable is not what is looked for"
    spoil_torch(place)
    found, reason = find_bundle(cache, tiny, paths, CPU)
    assert found is None
    assert "torch: got a bundle built with 2.0.0" in reason
    assert f"-o {place}" in reason


def generate(folder: Path, *arguments: object) -> Ran:
    photo = Path(__file__).resolve().parent.parent / "examples" / "photo.jpg"
    return command("swifti2v", "generate", photo, "-o", folder / "clip.mp4", *arguments, cache=folder / "cache")


def test_the_command_runs_a_bundle(made: Path, tmp_path: Path):
    ran = generate(tmp_path, "--bundle", made, "--json", "--stage2-steps", 1)
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)["result"]
    assert (record["backend"], record["dtype"], record["profile"]["name"]) == ("eager", "float32", "tiny")
    assert record["bundle"] == read_bundle(made).manifest.digest
    assert "33 frames of 192x128, cpu, float32, eager," in ran.stderr
    assert generate(tmp_path, "--bundle", made, "--profile", "nano", "-q").returncode == 1
    wrong = generate(tmp_path, "--bundle", made, "--dtype", "bf16", "-q")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1), wrong.stderr
    assert "--dtype: got bf16, want fp32" in wrong.stderr


def test_without_a_bundle_eager_runs_and_says_how_to_compile(tmp_path: Path):
    few = ("--profile", "tiny", "--dtype", "fp32", "--stage1-steps", 1, "--stage2-steps", 1, "--frames", 13)
    ran = generate(tmp_path, *few)
    assert ran.returncode == 0, ran.stderr
    notes = [line for line in ran.stderr.splitlines() if "swifti2v-export" in line]
    assert len(notes) == 1
    assert "note: eager PyTorch; swifti2v-export --profile tiny --frames 13 --backend" in notes[0]
    line = ["--profile", "tiny", "--frames", 13, "--backend", "eager", "--precision", "fp32", "-q"]
    made = command("swifti2v-export", *line, cache=tmp_path / "cache")
    assert made.returncode == 0, made.stderr
    again = generate(tmp_path, *few, "--json")
    assert "swifti2v-export" not in again.stderr
    assert json.loads(again.stdout)["result"]["bundle"] == read_bundle(Path(made.stdout.strip())).manifest.digest
    flip(next(Path(made.stdout.strip()).glob("decode_next/*")), 9)
    damaged = generate(tmp_path, *few, "-q")
    assert damaged.returncode == 1, "a damaged bundle is an error, not a reason to run something else"
    assert "SHA-256" in damaged.stderr


def test_inspect_and_verify(made: Path, tmp_path: Path):
    ran = command("swifti2v", "inspect", made, cache=tmp_path)
    lines = [line for line in ran.stdout.splitlines() if "decode_next" in line]
    assert len(lines) == 1
    assert all(word in lines[0] for word in ("latents 1x6x1x8x12 -> pixels 1x3x4x128x192", "float32", "cpu", "0.0e+00"))
    plain = json.loads(command("swifti2v", "inspect", made, "--json", cache=tmp_path).stdout)["result"]["bundle"]
    assert (plain["kind"], len(plain["graphs"])) == ("bundle", 15)
    verified = command("swifti2v-export", "verify", made, "--json", cache=tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert set(json.loads(verified.stdout)["result"]["parity"].values()) == {0.0}


def test_a_bundle_may_be_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    opened = load_bundle(".").bundle
    assert opened is not None
    assert opened.folder == folder
    plain = json.loads(command("swifti2v", "inspect", ".", "--json", cache=folder).stdout)["result"][folder.name]
    assert plain["kind"] == "bundle", "by the folder's own name"
    assert command("swifti2v-export", "verify", ".", cache=folder).returncode == 0


def test_verify_finds_what_is_wrong(folder: Path, tmp_path: Path):
    spoil_flip(folder)
    ran = command("swifti2v-export", "verify", folder, cache=tmp_path)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1), ran.stderr
    assert f"{REPAIR}{folder}" in ran.stderr
    repaired = command(*ran.stderr.strip().rpartition("run ")[2].split(), "-q", cache=tmp_path)
    assert repaired.returncode == 0, repaired.stderr
    assert command("swifti2v-export", "verify", folder, "--json", cache=tmp_path).returncode == 0


def test_the_runtime_does_not_import_the_exporter(made: Path):
    code = f"""
import sys
from swifti2v import Session
Session.open({str(made)!r}).close()
print([name for name in sys.modules if name.startswith(("swifti2v.export", "onnx"))])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
