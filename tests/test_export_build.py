"""Building bundles: whole or not there, resumed, repaired, rebuilt only where something changed."""

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bundles import build, change, command, flip, refused
from safetensors.torch import load_file, save_file

from swifti2v.engine.errors import BundleError, EnvironmentMismatch, NumericsError, ProfileError
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.manifest import MANIFEST, Artifact, check_artifacts, read_bundle, sha256_of
from swifti2v.engine.profile import Profile
from swifti2v.engine.weights import FILE_NAME
from swifti2v.export.build import BuildProgress, build_bundle
from swifti2v.export.builders import BUILDERS
from swifti2v.export.failure import CompileError, compiling
from swifti2v.export.parity import parity_error, sample_feed
from swifti2v.export.part_folder import finish
from swifti2v.export.plan import plan_build
from swifti2v.export.target import pick_precision
from swifti2v.runtime.backend_eager import EagerExecutable
from swifti2v.runtime.backend_registry import BACKENDS
from swifti2v.runtime.backend_weights import Source, open_source

FIRST = ["stage1_time", "stage1_text", "stage1_step"]


@pytest.fixture
def source(tiny: Profile) -> Source:
    return open_source(tiny)


def kept(source: Source, out: Path, names: list[str] | None = None, backend: str = "eager") -> list[str]:
    """Build, and name the graphs that were there already."""
    seen: list[BuildProgress] = []
    build_bundle(source, backend, out, names, seen.append)
    return [progress.name for progress in seen if progress.kept]


def test_a_bundle_has_every_graph_and_nothing_else(source: Source, tmp_path: Path):
    bundle = build_bundle(source, "eager", tmp_path / "deep" / "b")
    assert bundle == read_bundle(tmp_path / "deep" / "b")
    graphs = profile_graphs(source.profile, bundle.manifest.dtype)
    assert {name: record.spec for name, record in bundle.manifest.graphs.items()} == {
        name: graph.spec for name, graph in graphs.items()
    }
    check_artifacts(bundle)
    files = {path.relative_to(bundle.folder).as_posix() for path in bundle.folder.rglob("*") if path.is_file()}
    assert files == {MANIFEST} | {a.path for r in bundle.manifest.graphs.values() for a in r.artifacts}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["b"]
    assert bundle.manifest.weights.source == "untrained"
    assert all(record.parity == 0 for record in bundle.manifest.graphs.values())


def test_two_builds_have_one_digest(source: Source, tiny: Profile, tmp_path: Path):
    one, other = build_bundle(source, "eager", tmp_path / "a"), build_bundle(open_source(tiny), "eager", tmp_path / "b")
    assert one.manifest.digest == other.manifest.digest
    assert one.manifest.digest != build(tmp_path / "c", precision="bf16").manifest.digest


def test_an_interrupted_build_goes_on(source: Source, tmp_path: Path):
    def stop(progress: BuildProgress) -> None:
        if progress.name == "stage1_step" and progress.record is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(source, "eager", tmp_path / "b", on_progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["b.part"]
    refused(lambda: read_bundle(tmp_path / "b"), "b.part of an interrupted build")
    refused(lambda: read_bundle(tmp_path / "b.part"), f"no {MANIFEST}")
    assert kept(source, tmp_path / "b") == FIRST[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    check_artifacts(read_bundle(tmp_path / "b"))


def test_half_a_record_and_a_damaged_artifact_are_built_anew(source: Source, tmp_path: Path):
    def stop(progress: BuildProgress) -> None:
        if progress.name == "stage2_time":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(source, "eager", tmp_path / "b", on_progress=stop)
    part = tmp_path / "b.part"
    record = part / "finished" / "stage1_time.json"
    record.write_text(record.read_text()[:100])
    flip(part / "stage1_text" / "graph.json", 40)
    (part / "work").mkdir()
    (part / "work" / "half").write_text("")
    assert kept(source, tmp_path / "b") == ["stage1_step"]
    check_artifacts(read_bundle(tmp_path / "b"))


def test_a_second_build_keeps_what_is_whole(source: Source, tmp_path: Path):
    out = tmp_path / "b"
    build_bundle(source, "eager", out, FIRST)
    assert list(read_bundle(out).manifest.graphs) == FIRST
    assert kept(source, out, ["stage1_time", "stage2_time"]) == ["stage1_time"]
    assert list(read_bundle(out).manifest.graphs) == [*FIRST, "stage2_time"], "others stay where they fit"
    flip(out / "stage1_text" / "graph.json", 40)
    (out / "stage1_step" / "graph.json").unlink()
    assert kept(source, out) == ["stage1_time", "stage2_time"]
    check_artifacts(read_bundle(out))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_decides_an_artifact_is_in_its_key(source: Source, tmp_path: Path):
    out = tmp_path / "b"
    build_bundle(source, "eager", out, FIRST)
    change(out, versions={"torch": "1.0"})
    assert kept(source, out, FIRST) == FIRST, "keys, not what the manifest says, decide"
    longer = open_source(source.profile.override(frames=41))
    assert kept(longer, out, FIRST) == FIRST[:2], "Stage I grows with the clip"
    build_bundle(source, "eager", out, FIRST)
    other = open_source(source.profile)
    other.modules["stage1"].get_parameter("text_embedding.0.weight").data.mul_(1.5)
    assert kept(other, out, FIRST) == ["stage1_time", "stage1_step"], "the text graph alone reads this"


def test_only_graphs_of_changed_weights_are_built_again(tiny: Profile, save_models, tmp_path: Path):
    models, out = save_models(tiny, tmp_path / "models"), tmp_path / "b"
    before = build_bundle(open_source(tiny, models), "eager", out)
    assert before.manifest.weights.source == "given"
    file = models / "stage2" / FILE_NAME
    state = load_file(file)
    state["head.head.bias"] = state["head.head.bias"] + 1
    save_file(state, tmp_path / "new")
    (tmp_path / "new").replace(file)
    again = kept(open_source(tiny, models), out)
    assert set(before.manifest.graphs) - set(again) == {"stage2_first", "stage2_next"}


def test_an_old_bundle_stays_until_the_new_one_is_whole(source: Source, tmp_path: Path):
    old = build(tmp_path / "b", precision="bf16").manifest.digest

    def stop(progress: BuildProgress) -> None:
        if progress.name == "stage1_step":
            assert read_bundle(tmp_path / "b").manifest.digest == old
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(source, "eager", tmp_path / "b", on_progress=stop)
    assert read_bundle(tmp_path / "b").manifest.digest == old
    assert build_bundle(source, "eager", tmp_path / "b").manifest.precision == "fp32"


def test_one_process_builds_at_a_time(source: Source, tmp_path: Path):
    (tmp_path / "b.part").mkdir()
    handle = os.open(tmp_path / "b.part", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    refused(lambda: build_bundle(source, "eager", tmp_path / "b"), "another build", kind=BundleError)
    os.close(handle)
    build_bundle(source, "eager", tmp_path / "b", FIRST)


def test_what_is_no_bundle_is_not_replaced(source: Source, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MANIFEST).write_text('{"manifest_version": 3, "name": "an extension of a browser"}')
    for name in ("photos", "file", "web"):
        refused(lambda name=name: build_bundle(source, "eager", tmp_path / name), "no bundle", kind=BundleError)
    (tmp_path / "empty").mkdir()
    build_bundle(source, "eager", tmp_path / "empty", FIRST)


def test_a_graph_that_computes_something_else_is_refused(source: Source):
    graph = profile_graphs(source.profile, torch.float32)["stage2_text"]
    other = open_source(source.profile).modules["stage2"]
    other.get_parameter("text_embedding.0.weight").data.mul_(1.001)
    refused(
        lambda: parity_error(EagerExecutable(graph, other), graph, source.modules["stage2"], "fp32"),
        "stage2_text", "relative error", "at most 1e-05 in fp32", kind=NumericsError,
    )  # fmt: skip
    assert 1e-5 < parity_error(EagerExecutable(graph, other), graph, source.modules["stage2"], "bf16") < 2e-3
    other.get_parameter("text_embedding.0.weight").data.fill_(float("nan"))
    refused(lambda: parity_error(EagerExecutable(graph, other), graph, source.modules["stage2"], "fp32"), "want finite")


def test_feeds_are_the_same_every_time(tiny: Profile):
    for graph in profile_graphs(tiny, torch.float32).values():
        one, other = sample_feed(graph.spec), sample_feed(graph.spec)
        assert all(one[name].equal(other[name]) for name in one)
        assert not sample_feed(graph.spec, seed=1)[graph.spec.inputs[0].name].equal(one[graph.spec.inputs[0].name])


def test_a_compiler_that_fails_says_so_in_one_line(source: Source, tmp_path: Path):
    """Real failures of a real compiler: a layer that looks at the values of its input."""
    pytest.importorskip("onnxscript")
    out, part = tmp_path / "b", tmp_path / "b.part"
    layer = source.modules["stage2"].get_submodule("text_embedding.0")
    hook = layer.register_forward_hook(lambda _layer, _given, made: made if made.sum().item() > 0 else -made)
    text = refused(
        lambda: build_bundle(source, "onnxruntime", out, ["stage1_time", "stage2_text"]),
        "stage2_text: got ", " from onnxruntime (", f"see {part / 'stage2_text.log'}", kind=CompileError,
    )  # fmt: skip
    assert "\n" not in text
    assert "Traceback" in (part / "stage2_text.log").read_text()
    hook.remove()
    assert kept(source, out, ["stage1_time", "stage2_text"], "onnxruntime") == ["stage1_time"]
    assert [path.name for path in out.iterdir() if path.suffix == ".log"] == []


def test_of_what_a_compiler_says_the_first_error_is_shown(tmp_path: Path):
    def fail(error: Exception) -> None:
        with compiling("decode_next", "inductor", tmp_path / "log"):
            raise error

    said = "C++ compile error\n\nCommand:\ng++ " + "x " * 300 + "\nOutput:\nmain.cpp:3:1: error: no member\n"
    refused(lambda: fail(RuntimeError(said)), "got RuntimeError from inductor (main.cpp:3:1: error: no member)")
    assert said.splitlines()[3] in (tmp_path / "log").read_text()
    refused(lambda: fail(AssertionError()), "got AssertionError from inductor (it said nothing)", kind=CompileError)
    with pytest.raises(OSError, match="full"):
        fail(OSError("the disk is full"))
    refused(lambda: fail(BundleError("a: got b, want c; d")), "a: got b", kind=BundleError)


def test_files_that_graphs_have_in_common_are_kept_once(source: Source, tmp_path: Path):
    bundle = build_bundle(source, "eager", tmp_path / "b", FIRST)
    records = {}
    for name, record in bundle.manifest.graphs.items():
        file = bundle.folder / name / "weights"
        file.write_text("one" if name == FIRST[0] else "two")
        artifact = Artifact(f"{name}/weights", 3, sha256_of(file))
        records[name] = replace(record, artifacts=(*record.artifacts, artifact))
    part = bundle.folder.rename(tmp_path / "c.part")
    (part / "finished").mkdir()
    made = finish(part, tmp_path / "c", replace(bundle.manifest, graphs=records))
    check_artifacts(made)
    one, two, three = (made.folder / name / "weights" for name in FIRST)
    assert two.samefile(three)
    assert not one.samefile(two)
    assert not list(made.folder.rglob("*.part"))


def test_names_are_checked(source: Source, tmp_path: Path):
    refused(
        lambda: build_bundle(source, "eager", tmp_path / "b", ["stage9"]), "stage9", "stage1_time", kind=ProfileError
    )
    refused(lambda: build_bundle(source, "tensorflow", tmp_path / "b"), "tensorflow", kind=EnvironmentMismatch)
    assert not list(tmp_path.iterdir())
    assert BUILDERS.keys() == BACKENDS.keys()


def test_precisions_are_those_the_backend_has(source: Source):
    assert pick_precision("onnxruntime", None, source.device) == "fp32"
    refused(lambda: pick_precision("onnxruntime", "bf16", source.device), "bf16", "want one of fp32", kind=ProfileError)


def test_a_plan_knows_sizes_without_weights(tiny: Profile):
    plan = plan_build(tiny, "eager", "fp32")
    sizes = {graph.spec.name: graph.bytes for graph in plan.graphs}
    assert list(sizes) == list(profile_graphs(tiny, torch.float32))
    assert sizes["stage2_next"] == sizes["stage2_first"] > sizes["stage2_text"]
    half = plan_build(tiny, "eager", "bf16", ["stage2_next"])
    assert half.graphs[0].bytes * 2 == sizes["stage2_next"]


def test_the_command_builds_says_so_and_does_not_build_twice(tmp_path: Path):
    arguments = ["--profile", "tiny", "--backend", "eager", "--precision", "fp32", "-o", tmp_path / "b"]
    some = [*arguments, "--graphs", "stage1_time,stage1_text"]
    ran = command("swifti2v-export", *some, cache=tmp_path / "cache")
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path / 'b'}\n"), ran.stderr
    assert "stage1_text: built in" in ran.stderr
    assert "(2/2)" in ran.stderr
    again = command("swifti2v-export", *some, "--json", "--quiet", cache=tmp_path / "cache")
    assert again.stderr == ""
    result = json.loads(again.stdout)["result"]
    assert result["bundle"] == str(tmp_path / "b")
    assert result["digest"] == read_bundle(tmp_path / "b").manifest.digest
    assert (result["graphs"], result["seconds"]) == (2, {})


def test_dry_run_builds_nothing_even_at_full_size(tmp_path: Path):
    arguments = ["--profile", "wan-2k", "--backend", "inductor", "--dry-run", "-o", tmp_path / "b"]
    ran = command("swifti2v-export", *arguments, "--json", cache=tmp_path / "cache")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)["result"]
    assert result["graphs"]["stage2_next"]["shape"] == "latents 1x96x5x88x160 -> velocity 1x48x3x88x160"
    assert result["graphs"]["stage2_next"]["bytes"] == pytest.approx(8.7e9, rel=0.01)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--profile", "tiny"], 2, ["--backend"]),
        (["--profile", "huge", "--backend", "eager"], 2, ["huge"]),
        (["--profile", "tiny", "--backend", "eager", "--frames", "34"], 2, ["the nearest is 33"]),
        (["--profile", "tiny", "--backend", "eager", "--size", "big"], 2, ["WIDTHxHEIGHT"]),
        (["--profile", "tiny", "--backend", "onnxruntime", "--precision", "bf16"], 2, ["want one of fp32"]),
        (["--profile", "tiny", "--backend", "eager", "--graphs", "all"], 2, ["got all, want some of stage1_time"]),
        (["--profile", "tiny", "--backend", "eager", "--weights", "nowhere"], 1, ["nowhere"]),
        (["--profile", "wan-2k", "--backend", "eager"], 1, ["want checkpoints"]),
        (["verify", "nowhere"], 1, ["no such folder"]),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, monkeypatch, arguments: list[str], code: int, words: list[str]):
    monkeypatch.chdir(tmp_path)
    ran = command("swifti2v-export", *arguments, cache=tmp_path / "cache")
    lines = ran.stderr.strip().splitlines()
    assert (ran.returncode, len(lines)) == (code, 1), ran.stderr
    assert lines[0].startswith("swifti2v-export: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.iterdir())
