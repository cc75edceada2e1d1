"""Prompts and embeddings on disk: cleaning, the cache, files of ready embeddings. No encoder of Wan is needed here."""

import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from swifti2v.engine.errors import EnvironmentMismatch, NumericsError, WeightsError
from swifti2v.runtime.conditioning import (
    CachedEncoder,
    EmbeddingCache,
    Embeddings,
    clean_prompt,
    load_embeddings,
    save_embeddings,
)


def test_clean_prompt_repairs_unescapes_and_collapses():
    assert clean_prompt("  a\t\n cat &amp;amp; a  dog ") == "a cat & a dog"
    assert clean_prompt("cafÃ©") == "café"
    assert clean_prompt("&nbsp; zoom &lt;in&gt; ") == "zoom <in>"
    assert clean_prompt("镜头  推进") == "镜头 推进"
    assert clean_prompt("") == ""


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)  # what Python itself does for a package that cannot be imported
    with pytest.raises(EnvironmentMismatch, match=r"pip install 'swifti2v\[wan\]'"):
        clean_prompt("zoom")


@dataclass(eq=False)
class LetterEncoder:
    """A real, tiny PromptEncoder: one row per letter; it writes down what it was asked."""

    fingerprint: str
    asked: list[str] = field(default_factory=list)

    def encode_all(self, prompts: Sequence[str]) -> list[Tensor]:
        return [self.encode(prompt) for prompt in prompts]

    def encode(self, prompt: str) -> Tensor:
        self.asked.append(prompt)
        rows = torch.zeros(1, 8, 3)
        for i, letter in enumerate(prompt[:8]):
            rows[0, i] = torch.tensor([ord(letter) / 7, i, 1.0])
        return rows


def opener(fingerprint: str = "letters") -> tuple[Callable[[], LetterEncoder], list[list[str]], list[weakref.ref]]:
    """A factory, the prompts each opened encoder was asked, and weak references to the opened encoders."""
    asked: list[list[str]] = []
    opened: list[weakref.ref] = []

    def make() -> LetterEncoder:
        encoder = LetterEncoder(fingerprint)
        asked.append(encoder.asked)
        opened.append(weakref.ref(encoder))
        return encoder

    return make, asked, opened


def test_the_encoder_opens_once_for_all_misses_and_is_freed(tmp_path: Path):
    make, asked, opened = opener()
    encoder = CachedEncoder(make, "letters", EmbeddingCache(tmp_path / "cache"))
    first, negative, again = encoder.encode_all(["zoom  in", "blurry", " zoom in"])
    assert asked == [["zoom in", "blurry"]]
    assert opened[0]() is None
    assert torch.equal(first, again)
    assert torch.equal(negative, LetterEncoder("").encode("blurry"))
    assert torch.equal(encoder.encode_all(["zoom in"])[0], first)
    assert len(opened) == 1
    assert torch.equal(
        CachedEncoder(make, "letters", EmbeddingCache(tmp_path / "cache")).encode_all(["blurry"])[0], negative
    )
    assert len(opened) == 1


def test_another_encoder_does_not_see_the_entries(tmp_path: Path):
    cache = EmbeddingCache(tmp_path)
    cache.put("one", "zoom", torch.ones(1, 8, 3))
    assert cache.get("two", "zoom") is None
    assert cache.get("one", "zooms") is None
    assert cache.get("one", "zoom") is not None


def test_an_encoder_with_another_fingerprint_is_refused(tmp_path: Path):
    make, _, _ = opener("new")
    with pytest.raises(WeightsError, match="got fingerprint new, want old"):
        CachedEncoder(make, "old", EmbeddingCache(tmp_path)).encode_all(["zoom"])[0]
    assert list(tmp_path.iterdir()) == []


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def empty(content: bytes) -> bytes:
    return b""


def garbage(content: bytes) -> bytes:
    return b"\xff" * len(content)


@pytest.mark.parametrize("damage", [truncated, flipped, empty, garbage])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: Callable[[bytes], bytes]):
    make, asked, _ = opener()
    cache = EmbeddingCache(tmp_path)
    encoder = CachedEncoder(make, "letters", cache)
    good = encoder.encode_all(["zoom"])[0]
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert cache.get("letters", "zoom") is None
    assert not entry.exists()
    assert torch.equal(encoder.encode_all(["zoom"])[0], good)
    assert len(asked) == 2
    assert [path.name for path in tmp_path.iterdir()] == [entry.name]


def test_an_entry_under_another_layout_is_made_again(tmp_path: Path):
    cache = EmbeddingCache(tmp_path)
    save_file({"other": torch.ones(1)}, cache.path("f", "zoom"))
    assert cache.get("f", "zoom") is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("not a folder")
    make, _, _ = opener()
    encoder = CachedEncoder(make, "letters", EmbeddingCache(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encoder.encode_all(["zoom"])[0], LetterEncoder("").encode("zoom"))
    assert "want a writable folder" in caplog.text


def test_embeddings_survive_the_round_trip(tmp_path: Path):
    torch.manual_seed(0)
    prompt, image = torch.randn(1, 8, 5), torch.randn(1, 257, 1280)
    wanted = Embeddings(prompt, prompt, image)  # shared storage is fine
    save_embeddings(tmp_path / "deep" / "e.safetensors", wanted)
    got = load_embeddings(tmp_path / "deep" / "e.safetensors", text_dim=5, text_len=8)
    assert got.negative is not None
    assert got.image is not None
    assert torch.equal(got.prompt, prompt)
    assert torch.equal(got.negative, prompt)
    assert torch.equal(got.image, image)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["e.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_text_is_filled_with_zeros(tmp_path: Path, dtype: torch.dtype):
    rows = torch.ones(3, 5, dtype=dtype)
    save_file({"prompt": rows, "negative": torch.ones(1, 8, 5)}, tmp_path / "e.safetensors")
    got = load_embeddings(tmp_path / "e.safetensors", text_dim=5, text_len=8)
    assert got.prompt.dtype == torch.float32
    assert got.prompt.shape == (1, 8, 5)
    assert torch.equal(got.prompt[0, :3], rows.float())
    assert not got.prompt[0, 3:].any()
    assert got.image is None


PROMPT = {"prompt": torch.ones(3, 5)}


@pytest.mark.parametrize(
    ("tensors", "error", "text"),
    [
        ({"prompt": torch.ones(9, 5)}, WeightsError, r"got shape \(9, 5\), want \(1, 1 to 8, 5\)"),
        ({"prompt": torch.ones(0, 5)}, WeightsError, r"got shape \(0, 5\)"),
        ({"prompt": torch.ones(3, 4)}, WeightsError, r"got shape \(3, 4\)"),
        ({"prompt": torch.ones(2, 3, 5)}, WeightsError, r"got shape \(2, 3, 5\)"),
        ({"prompt": torch.ones(5)}, WeightsError, r"got shape \(5,\)"),
        ({"prompt": torch.ones(3, 5, dtype=torch.int32)}, WeightsError, "got torch.int32, want float32"),
        ({"prompt": torch.ones(3, 5, dtype=torch.float64)}, WeightsError, "got torch.float64"),
        ({"prompt": torch.full((3, 5), float("nan"))}, NumericsError, "got 15 values that are NaN or infinite"),
        ({**PROMPT, "negative": torch.full((3, 5), float("inf"))}, NumericsError, "negative: got 15 values"),
        ({**PROMPT, "image": torch.ones(1, 256, 1280)}, WeightsError, r"want \(1, 257, 1280\)"),
        ({**PROMPT, "promt": torch.ones(3, 5)}, WeightsError, r"got tensors \['prompt', 'promt'\]"),
        ({"negative": torch.ones(3, 5)}, WeightsError, r"got tensors \['negative'\], want prompt"),
    ],
)
def test_wrong_embeddings_are_refused(tmp_path: Path, tensors: dict[str, Tensor], error: type, text: str):
    save_file(tensors, tmp_path / "e.safetensors")
    with pytest.raises(error, match=text):
        load_embeddings(tmp_path / "e.safetensors", text_dim=5, text_len=8)


def test_image_shape_can_be_that_of_another_model(tmp_path: Path):
    save_embeddings(tmp_path / "e.safetensors", Embeddings(torch.ones(1, 8, 5), image=torch.ones(1, 5, 6)))
    assert load_embeddings(tmp_path / "e.safetensors", 5, 8, image_shape=(5, 6)).image is not None


def test_files_that_are_not_safetensors_are_refused(tmp_path: Path):
    torch.save({"prompt": torch.ones(3, 5)}, tmp_path / "e.pt")
    with pytest.raises(WeightsError, match="want a safetensors file"):
        load_embeddings(tmp_path / "e.pt", 5, 8)
    with pytest.raises(WeightsError, match="want a safetensors file"):
        load_embeddings(tmp_path / "absent.safetensors", 5, 8)


def test_saving_refuses_what_loading_would(tmp_path: Path):
    with pytest.raises(NumericsError):
        save_embeddings(tmp_path / "e.safetensors", Embeddings(torch.full((1, 8, 5), float("nan"))))
    with pytest.raises(WeightsError, match=r"got torch\.int64"):
        save_embeddings(tmp_path / "e.safetensors", Embeddings(torch.ones(1, 8, 5, dtype=torch.int64)))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WeightsError, match="want a place to write"):
        save_embeddings(tmp_path / "file" / "e.safetensors", Embeddings(torch.ones(1, 8, 5)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
