"""Shot lists: what is read, what is refused and how, and that the schema says the same."""

import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.runtime.farm_errors import FarmError
from swifti2v.runtime.farm_shots import MAX_BYTES, parse_indices, parse_shots, pick_shots, read_shots

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "shots.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
GOOD = {"name": "sq010_sh0020", "image": "plates/a.png", "prompt": "pan; $(left) \"x\" 'y' \n ü", "seed": 2**63 - 1}
FULL = {**GOOD, "negative": "blur", "fit": "pad"}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
wrong_fields = {
    "name": st.sampled_from(["", "..", "a/b", "a.b", "-a", "a" * 65, "a\n", "ä", "con", "LPT1", "a\0"]) | anything,
    "image": st.sampled_from(["", "a\0b", "\ud800"]) | anything,
    "prompt": st.sampled_from(["x" * 20_001, "\udfff", None]) | anything,
    "negative": st.sampled_from([["x"], 1, "\ud834"]) | anything,
    "seed": st.sampled_from([-1, 2**63, 10**400, 1.0, True, "1"]) | anything,
    "fit": st.sampled_from(["stretch", "", None]) | anything,
    "more": anything,
    "name ": anything,
}


@st.composite
def shot_lists(draw) -> str:
    """Texts that are nearly a shot list."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.text(max_size=40))
    if kind == 1:
        return json.dumps(draw(anything))
    shots = [dict(FULL, name=f"s{number}") for number in range(draw(st.integers(1, 3)))]
    field = draw(st.sampled_from(sorted(wrong_fields)))
    if kind == 2:
        shots[-1].pop(draw(st.sampled_from(sorted(FULL))))
    elif kind == 3:
        return json.dumps({"shots": shots})[: draw(st.integers(0, 60))]
    else:
        shots[-1][field] = draw(wrong_fields[field])
    whole = {"shots": shots, **({"v": 1} if draw(st.booleans()) and kind == 5 else {})}
    return json.dumps(whole, ensure_ascii=draw(st.booleans()))


@settings(max_examples=200)
@given(shot_lists())
def test_a_list_is_read_or_refused_in_one_line(text: str):
    """Whatever stands there: shots that the schema allows too, or one short line that says what is wrong."""
    try:
        shots = parse_shots(text, "shots.json")
    except FarmError as error:
        line = str(error)
        assert line.startswith("shots.json")
        assert "got " in line
        assert ": " in line
        assert "\n" not in line
        assert len(line) < 600
        line.encode()  # it can be printed
    else:
        VALIDATOR.validate(json.loads(text))
        assert len({shot.name.lower() for shot in shots}) == len(shots)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "JSON that does not read"),
        ("[]", "want {"),
        ('{"shots": []}', "got 0 shots"),
        ('{"shots": [], "shots": []}', "'shots' stands there twice"),
        ('{"shots": [NaN]}', "NaN is no JSON"),
        ("[" * 100_000, "JSON that does not read"),
        (json.dumps({"shots": [GOOD, dict(GOOD, name="SQ010_SH0020")]}), "both named SQ010_SH0020"),
        (json.dumps({"shots": [dict(GOOD, seeds=1)]}), r"shots\[0\]: got extra \['seeds'\]"),
        (json.dumps({"shots": [{"name": "a"}]}), r"missing \['image'\]"),
        (json.dumps({"shots": [dict(GOOD, name="../a")]}), "it names a folder"),
        (json.dumps({"shots": [dict(GOOD, seed=-1)]}), r"shots\[0\].seed: got -1, want 0 to"),
        (json.dumps({"shots": [dict(GOOD, prompt="\ud800")]}), "valid Unicode"),
    ],
)
def test_what_is_refused(text: str, words: str):
    with pytest.raises(FarmError, match=words):
        parse_shots(text, "list")


def test_a_list_from_a_file(tmp_path: Path):
    path = tmp_path / "shots.json"
    path.write_text(json.dumps({"shots": [GOOD, dict(FULL, name="b", image="/mnt/b.png")]}), encoding="utf-8-sig")
    VALIDATOR.validate(json.loads(path.read_text(encoding="utf-8-sig")))
    one, two = read_shots(path)
    assert (one.image, two.image) == (str(tmp_path / "plates/a.png"), "/mnt/b.png")
    assert (one.prompt, one.negative, one.seed, one.fit) == (GOOD["prompt"], None, 2**63 - 1, "crop")
    path.write_bytes(b"\xff\xfe\x00")
    for bad in (path, tmp_path, tmp_path / "none"):
        with pytest.raises(FarmError, match="want a readable shot list"):
            read_shots(bad)
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(FarmError, match="split the list"):
        read_shots(path)


def shots_of(*names: str):
    return parse_shots(json.dumps({"shots": [dict(GOOD, name=name) for name in names]}), "list")


def test_shots_are_picked():
    shots = shots_of(*"abcdefg")

    def names(**options) -> str:
        return "".join(shot.name for shot in pick_shots(shots, **options))

    assert names() == "abcdefg"
    assert names(names="c, a") == "ac", "in the order of the list"
    assert names(indices="0-2,5") == "abcf"
    assert names(indices="1-6:2") == "bdf"
    assert names(names="a,b,f", indices="0-3") == "ab"
    assert [names(shard=(share, 3)) for share in (1, 2, 3)] == ["adg", "be", "cf"]
    assert names(indices="0", shard=(2, 2)) == ""
    with pytest.raises(FarmError, match="--select: got 'z', want a shot of the list; it has a, b, c, d, e and 2 more"):
        names(names="a,z")


@pytest.mark.parametrize("text", ["", "7", "0-7", "3-1", "-1", "1-", "a", "0-3:0", "1,,2", "9" * 12, "0x1"])
def test_indices_outside_the_list_are_refused(text: str):
    with pytest.raises(FarmError, match="--index: got"):
        parse_indices(text, 7)
