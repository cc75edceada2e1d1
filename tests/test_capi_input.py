"""Flat calls with wrong input: one status and one line of text for each, and the session goes on."""

import json
import re

import pytest
from capi_support import PICTURE, SMALL, pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.runtime import capi
from swifti2v.runtime.capi import Pixels, Status
from swifti2v.runtime.capi_json import Ask, Config


@pytest.mark.parametrize(
    ("request_", "rows", "words"),
    [
        ("{}", None, "got no image"),
        ('{"image": "x.png"}', pixels(), "a path and RGB bytes"),
        ('{"image": "/nowhere/x.png"}', None, "no such file"),
        ("{}", Pixels(b"\0" * 100, 128, 64), "got 100 bytes, want 24576"),
        ("{}", Pixels(bytes(PICTURE) + b"\0", 128, 64), "got 24577 bytes"),
        ("{}", Pixels(PICTURE.tobytes(), 0, 64), "got 0x64"),
        ("{}", Pixels(PICTURE.tobytes(), 2**32, 2**32), "at most 89,478,485"),
        ("{}", Pixels(PICTURE.tobytes(), 128, 64, 100), "100 bytes a row"),
        ('{"fit": "exact"}', Pixels(bytes(32 * 32 * 3), 32, 32), "got 32x32, want 128x64"),
    ],
)
def test_wrong_images_are_refused(handle: int, request_: str, rows: Pixels | None, words: str):
    assert capi.submit(handle, request_, rows) == (Status.INVALID_IMAGE, None)
    text = str(capi.last_error(handle)[1])
    assert words in text
    assert re.fullmatch(r".+: got .+, want .+; .+", text)
    assert capi.last_error() == (Status.OK, text)


@pytest.mark.parametrize(
    ("config", "status", "words"),
    [
        ('{"profile": "tiny", "frames": 34}', Status.INVALID_JSON, "the nearest is 33"),
        ('{"profile": "tiny", "frames": 4000000001}', Status.INVALID_JSON, "want 0 to 100001"),
        ('{"profile": "tiny", "size": [128]}', Status.INVALID_JSON, "want [width, height]"),
        ('{"profile": "tiny", "device": "tpu"}', Status.INVALID_JSON, "want auto, cpu, cuda"),
        ('{"profile": "tiny", "device": "cuda:99"}', Status.ENVIRONMENT, "want one this machine has"),
        ('{"profile": "tiny", "device": "cuda:256"}', Status.ENVIRONMENT, "want one this machine has"),
        ('{"profile": "tiny", "device": "cuda:999"}', Status.ENVIRONMENT, "want one this machine has"),
        ('{"profile": "tiny", "model_dir": "/nowhere"}', Status.MODEL, "want a folder"),
        ('{"profile": "tiny", "models": {"stage3": "x"}}', Status.INVALID_JSON, "got stage3"),
        ('{"profile": "tiny", "loras": {"stage2": [{"path": "x"}]}}', Status.INVALID_JSON, "missing ['strength']"),
        ('{"profile": "wan-2k"}', Status.MODEL, "got none, want checkpoints"),
        ('{"version": 2, "profile": "tiny"}', Status.INVALID_JSON, "got 2, want 1"),
        ("{}", Status.INVALID_JSON, "neither a bundle nor a profile"),
        ('{"profile": "tiny", "profile": "nano"}', Status.INVALID_JSON, "a field twice"),
        ('{"profile": "tiny", "shift": 1e999}', Status.INVALID_JSON, "want one that is finite"),
        (f'{{"profile": "tiny", "shift": 1{"0" * 400}}}', Status.INVALID_JSON, "want a number"),
        ('{"profile": "tiny", "cache": "\\u0000"}', Status.INVALID_JSON, "NUL"),
        ("[" * 100_000, Status.INVALID_JSON, "no valid JSON"),
        (b'{"profile": "\xff"}', Status.INVALID_JSON, "no valid JSON"),
        ('{"profile": "' + "x" * (1 << 20) + '"}', Status.INVALID_JSON, "want at most 1,048,576"),
        (7, Status.INVALID_JSON, "got int, want JSON text"),
    ],
)
def test_wrong_configs_are_refused(config: str | bytes, status: Status, words: str):
    assert capi.create(config) == (status, None)
    text = str(capi.last_error()[1])
    assert words in text
    assert re.fullmatch(r".+: got .+, want .+; .+", text), text


FIELDS = sorted(set(Ask.__dataclass_fields__) | {"colour", "Seed", ""})
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(
    request_=st.one_of(
        st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=4).map(json.dumps),
        JUNK.map(json.dumps),
        st.text(max_size=60),
        st.binary(max_size=60),
        st.text(max_size=20).map(lambda text: '{"seed": 3, "prompt": "' + text),
    )
)
def test_200_malformed_requests_give_a_status_and_a_text(shared_handle: int, request_: str | bytes):
    status, result = capi.submit(shared_handle, request_, pixels())
    if status == Status.OK:  # a dictionary can be right by chance
        assert set(json.loads(request_)) <= set(Ask.__dataclass_fields__)
        capi.cancel(shared_handle)
        return
    assert result is None
    assert status in (Status.INVALID_JSON, Status.INVALID_IMAGE)
    text = str(capi.last_error(shared_handle)[1])
    assert re.search(r": got .+, want .+", text, re.DOTALL), text
    assert "\n" not in text
    assert capi.poll(shared_handle)[0] == Status.OK


@settings(max_examples=100)
@given(field=st.sampled_from(sorted(set(Config.__dataclass_fields__) - {"profile"})), value=JUNK)
def test_malformed_configs_give_a_status_and_a_text(field: str, value: object):
    status, handle = capi.create(json.dumps({**SMALL, "frames": 13, field: value}))
    if handle is not None:
        capi.destroy(handle)
        return
    assert status in (Status.INVALID_JSON, Status.MODEL), capi.last_error()
    assert "got " in str(capi.last_error()[1])
