"""Checkpoint fingerprints, remembered: hashing tens of gigabytes for every clip would cost more than the clip.

A remembered one counts while the files keep their names, sizes and modification times.
"""

import contextlib
import hashlib
import json
from pathlib import Path

from ..engine.weights import fingerprint
from .encoders import clip_fingerprint
from .image import part_of
from .model_paths import ModelPaths
from .models import Loaded


def fingerprints(paths: ModelPaths, loaded: Loaded, cache: Path) -> dict[str, str]:
    """What every model and LoRA of a run was, by name; encoders have fingerprints of their own."""
    if not loaded.trained:
        return {"all": loaded.prompts.fingerprint}
    found = {}
    for name, path in paths.given.items():
        if name in ("text", "embeddings"):
            found[name] = loaded.prompts.fingerprint
        elif name == "image_encoder":
            found[name] = clip_fingerprint(path)
        else:
            found[name] = known_fingerprint(path, cache)
    for name, loras in paths.loras.items():
        for number, (path, strength) in enumerate(loras, 1):  # the order counts, and names may be equal
            found[f"{name} + {number}. {strength!r} * {path.name}"] = known_fingerprint(path, cache)
    return found


def known_fingerprint(path: Path, cache: Path) -> str:
    """SHA-256 (hex) of a checkpoint, from the folder `cache` where it is known, else computed and written there."""
    if path.is_dir():
        files = sorted(path.iterdir())
    elif path.name.endswith(".index.json"):
        files = sorted(path.parent.iterdir())  # its shards
    else:
        files = [path, path.with_name("config.json")]
    seen = [
        (file.name, stat.st_size, stat.st_mtime_ns)
        for file in files
        if file.suffix in (".safetensors", ".json") and file.is_file() and (stat := file.stat())
    ]
    key = hashlib.sha256(json.dumps([str(path.resolve()), seen]).encode()).hexdigest()
    entry = cache / "fingerprints" / key
    with contextlib.suppress(OSError):
        text = entry.read_text(encoding="ascii")
        if len(text) == 64:
            return text
    value = fingerprint(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the result
        entry.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(entry)
        part.write_text(value, encoding="ascii")
        part.replace(entry)
    return value
