"""The manifest: what is written is read again, and nothing else is."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from bundles import build, change, refused
from jsonschema import Draft202012Validator

from swifti2v.engine.errors import BundleError, EnvironmentMismatch
from swifti2v.engine.manifest import (
    MANIFEST,
    Artifact,
    Bundle,
    Manifest,
    Recipe,
    check_artifacts,
    format_manifest,
    parse_manifest,
    read_bundle,
)
from swifti2v.engine.plain import PlainError, from_plain, to_plain
from swifti2v.engine.presets import PROFILES, get_profile
from swifti2v.engine.profile import Profile

ROOT = Path(__file__).resolve().parent.parent
REPAIR = "run swifti2v-export --profile tiny --backend eager --precision fp32 -o "


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(tmp_path_factory.mktemp("whole") / "bundle", names=["stage1_time", "stage2_text"])


@pytest.fixture
def plain(whole: Bundle) -> dict:
    return json.loads((whole.folder / MANIFEST).read_text())


def parse(plain: dict) -> Manifest:
    """Parse what a writer with another idea of the format would write: its digest fits."""
    from swifti2v.engine import manifest

    body = {name: value for name, value in plain.items() if name not in ("format", "digest")}
    return parse_manifest(json.dumps({**plain, "digest": manifest._digest(body)}), Path("b") / MANIFEST)


def test_what_is_written_is_read_again(whole: Bundle):
    again = read_bundle(whole.folder)
    assert again.manifest == whole.manifest
    assert format_manifest(again.manifest) == (whole.folder / MANIFEST).read_text()
    assert [field.name for field in fields(Manifest)] == list(to_plain(whole.manifest))


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_survives(name: str):
    profile = get_profile(name)
    assert from_plain(Profile, json.loads(json.dumps(to_plain(profile))), "profile") == profile
    schedule = replace(profile, stage1=replace(profile.stage1, sigmas=(1.0, 0.9, 0.5, 0.25), boundary=0.9))
    assert from_plain(Profile, json.loads(json.dumps(to_plain(schedule))), "profile") == schedule


def test_a_whole_number_is_as_good_as_a_float(whole: Bundle):
    profile = replace(whole.manifest.profile, strength=1)
    text = format_manifest(replace(whole.manifest, profile=profile))
    assert json.loads(text)["digest"] == parse_manifest(text, Path(MANIFEST)).digest == whole.manifest.digest


def test_timings_are_no_part_of_the_digest(whole: Bundle):
    manifest = whole.manifest
    assert replace(manifest, seconds={"stage1_time": 99.0}).digest == manifest.digest
    assert replace(manifest, arch="sm89").digest != manifest.digest


def test_the_schema_says_the_same(plain: dict):
    schema = Draft202012Validator(json.loads((ROOT / "docs" / "bundle.schema.json").read_text()))
    schema.validate(plain)
    for name in plain:
        assert not schema.is_valid({key: value for key, value in plain.items() if key != name}), name
    assert not schema.is_valid({**plain, "more": 1})
    assert not schema.is_valid({**plain, "format": 2})
    for name in PROFILES:
        schema.validate({**plain, "profile": to_plain(get_profile(name))})


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("more",), 1, ["manifest", "extra ['more']"]),
        (("arch",), 7, ["manifest.arch", "got 7, want str"]),
        (("precision",), "int8", ["manifest.precision", "'fp32', 'bf16', 'fp16'"]),
        (("profile", "frames"), 33.0, ["profile.frames", "got 33.0, want int"]),
        (("profile", "frames"), True, ["profile.frames", "got True, want int"]),
        (("profile", "frames"), 34, ["frames: got 34", "want 4k+1"]),
        (("profile", "stage1", "vae", "mean"), "0", ["vae.mean", "want a list"]),
        (("profile", "stage1", "dit", "depth"), 2, ["stage1.dit", "extra ['depth']"]),
        (("profile", "stage1", "width"), 0, ["profile"]),
        (("weights", "source"), "found", ["weights.source", "'shipped'"]),
        (("graphs", "stage1_time", "spec", "outputs", 0, "dtype"), "float33", ["outputs[0].dtype", "a dtype"]),
        (("graphs", "stage1_time", "spec", "name"), "stage2_time", ["graphs.stage1_time", "'stage2_time'"]),
        (("graphs", "stage1_time", "weights"), "stage9", ["graphs.stage1_time", "'stage9'"]),
        (("graphs", "stage1_time", "artifacts"), [], ["graphs.stage1_time", "0 artifacts"]),
        (("graphs", "stage1_time", "parity"), "0", ["stage1_time.parity", "got '0', want a number"]),
        *((("graphs", "stage1_time", "artifacts", 0, "path"), path, ["inside the bundle"])
          for path in ("/etc/passwd", "../other/graph.json", "a/../../b", "C:\\x", "a\\..\\..\\b")),
    ],
)  # fmt: skip
def test_anything_else_is_refused(plain: dict, place: tuple, value: object, words: list[str]):
    spot = plain
    for key in place[:-1]:
        spot = spot[key]
    spot[place[-1]] = value
    refused(lambda: parse(plain), *words, "swifti2v-export", kind=BundleError)


def test_a_missing_key_is_refused(plain: dict):
    for name in [name for name in plain if name not in ("format", "digest")]:
        refused(lambda name=name: parse({k: v for k, v in plain.items() if k != name}), f"missing ['{name}']")


def test_another_format_is_refused(whole: Bundle, plain: dict):
    text = refused(lambda: parse({**plain, "format": 2}), "format: got 2, want 1", kind=EnvironmentMismatch)
    assert text.endswith(REPAIR + "b")
    refused(lambda: parse({"format": 3}), "run swifti2v-export --profile P --backend B -o b")


def test_a_changed_byte_is_refused(whole: Bundle):
    text = (whole.folder / MANIFEST).read_text()
    path = Path("b") / MANIFEST
    for old, new in (('"arch": "cpu"', '"arch": "gpu"'), ('"parity": 0.0', '"parity": 0.1')):
        assert old in text
        refused(lambda old=old, new=new: parse_manifest(text.replace(old, new), path), "digest", REPAIR + "b")
    for cut in (0, 1, len(text) // 2, len(text) - 3):
        refused(lambda cut=cut: parse_manifest(text[:cut], path), "unreadable JSON", "-o b")
    refused(lambda: parse_manifest("[]", path), "got list")


def test_what_is_no_bundle_is_refused(tmp_path: Path):
    refused(lambda: read_bundle(tmp_path / "none"), "no such folder")
    refused(lambda: read_bundle(tmp_path), f"no {MANIFEST}")
    (tmp_path / "cut.part").mkdir()
    refused(lambda: read_bundle(tmp_path / "cut"), "cut.part of an interrupted build", "again")
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe")
    refused(lambda: read_bundle(tmp_path), "UTF-8")


def test_a_link_out_of_the_bundle_is_refused(tmp_path: Path):
    bundle = build(tmp_path / "b", names=["stage1_time"])
    (tmp_path / "b" / "stage1_time" / "graph.json").rename(tmp_path / "outside.json")
    (tmp_path / "b" / "stage1_time" / "graph.json").symlink_to(tmp_path / "outside.json")
    refused(lambda: check_artifacts(bundle), "a link to", REPAIR)


def test_the_command_names_what_was_changed(whole: Bundle):
    profile = get_profile("tiny").override(frames=41, size=(128, 192), neighbours=2)
    command = Recipe(profile, "onnxruntime", "fp32", "given").command(Path("out"))
    assert command == (
        "swifti2v-export --profile tiny --frames 41 --neighbours 2 --size 128x192 --weights DIR "
        "--backend onnxruntime --precision fp32 -o out"
    )
    assert Recipe(replace(profile, name="mine"), "eager", "bf16", "shipped").command() == (
        "swifti2v-export --profile mine --backend eager --precision bf16"
    )


def test_types_are_not_guessed():
    with pytest.raises(PlainError, match=r"a: got extra \[\], missing \['bytes'\], want exactly"):
        from_plain(Artifact, {"path": "p", "sha256": ""}, "a")
    with pytest.raises(PlainError, match=r"a.bytes: got '1', want int"):
        from_plain(Artifact, {"path": "p", "bytes": "1", "sha256": ""}, "a")


def test_sizes_are_checked_without_hashes(tmp_path: Path):
    bundle = build(tmp_path / "b", names=["stage1_time"])
    path = bundle.files("stage1_time")[0]
    path.write_bytes(path.read_bytes()[::-1])
    check_artifacts(bundle, hashes=False)
    refused(lambda: check_artifacts(bundle), "SHA-256", REPAIR)
    path.write_bytes(path.read_bytes() + b" ")
    refused(lambda: check_artifacts(bundle, hashes=False), "bytes", REPAIR)


def test_a_manifest_can_be_changed_for_these_tests(tmp_path: Path):
    build(tmp_path / "b", names=["stage1_time"])
    change(tmp_path / "b", arch="sm89")
    assert read_bundle(tmp_path / "b").manifest.arch == "sm89"
