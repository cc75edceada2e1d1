"""The list of shots of a farm job: strict JSON; docs/shots.schema.json is its schema."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..engine.plain import PlainError, from_plain
from .farm_errors import FarmError

MAX_BYTES = 32 << 20
MAX_SHOTS = 100_000
MAX_TEXT = 20_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # a folder's name, and the start of every file's
DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)\d", re.IGNORECASE)  # no folders on Windows
OPTIONAL: dict[str, Any] = {"prompt": "", "negative": None, "seed": 0, "fit": "crop"}


@dataclass(frozen=True)
class Shot:
    """One clip to make. `image` is relative to the list's folder there, and absolute here or from where the list is."""

    name: str
    image: str
    prompt: str
    negative: str | None
    seed: int
    fit: Literal["crop", "pad"]


def read_shots(path: Path) -> tuple[Shot, ...]:
    """The shots of a list. FarmError, in one line, for all that is not exactly one."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FarmError(f"{path}: got {path.stat().st_size:,} bytes, want at most {MAX_BYTES:,}; split the list")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FarmError(f"{path}: got '{error}', want a readable shot list in UTF-8; check the file") from error
    shots = parse_shots(text, str(path))
    return tuple(replace(shot, image=str(path.parent / shot.image)) for shot in shots)


def parse_shots(text: str, place: str) -> tuple[Shot, ...]:
    """The shots in the text of a list; images are as they stand there."""
    try:
        plain = json.loads(text, object_pairs_hook=_no_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise FarmError(f"{place}: got JSON that does not read ({reason}), want a shot list; correct it") from error
    if not isinstance(plain, dict) or plain.keys() != {"shots"} or not isinstance(plain["shots"], list):
        got = f"keys {sorted(plain)!s:.100}" if isinstance(plain, dict) else type(plain).__name__
        raise FarmError(f'{place}: got {got}, want {{"shots": [...]}} and nothing else; see docs/shots.schema.json')
    if not 0 < len(plain["shots"]) <= MAX_SHOTS:
        raise FarmError(
            f"{place}: got {len(plain['shots'])} shots, want 1 to {MAX_SHOTS:,}; add some or split the list"
        )
    shots = tuple(_read_shot(item, f"{place} shots[{index}]") for index, item in enumerate(plain["shots"]))
    seen: dict[str, int] = {}
    for index, shot in enumerate(shots):
        other = seen.setdefault(shot.name.lower(), index)  # some file systems do not know capitals
        if other != index:
            raise FarmError(f"{place}: got shots[{other}] and shots[{index}] both named {shot.name}; rename one")
    return shots


def pick_shots(
    shots: Sequence[Shot], names: str | None = None, indices: str | None = None, shard: tuple[int, int] | None = None
) -> tuple[Shot, ...]:
    """The shots of a worker: those named (`a,b`) or counted (`0-3,7`, from 0), then share i of n (from 1)."""
    picked = tuple(shots)
    if names is not None:
        wanted = {name.strip() for name in names.split(",")}
        known = [shot.name for shot in shots]
        for name in sorted(wanted - set(known)):
            raise FarmError(f"--select: got {name!r:.80}, want a shot of the list; it has {_some(known)}")
        picked = tuple(shot for shot in picked if shot.name in wanted)
    if indices is not None:
        numbers = parse_indices(indices, len(shots))
        counted = {shots[index].name for index in numbers}
        picked = tuple(shot for shot in picked if shot.name in counted)
    if shard is not None:
        picked = picked[shard[0] - 1 :: shard[1]]
    return picked


def parse_indices(text: str, count: int) -> set[int]:
    """Indices in Open Job Description's form, such as `0-3,7` or `0-8:2`. FarmError outside the list."""
    found: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?\s*", item)
        first, last, step = (int(part) if part else None for part in match.groups()) if match else (None,) * 3
        last = first if last is None else last
        if first is None or last is None or not first <= last < count or step == 0:
            raise FarmError(f"--index: got {item!r:.80}, want numbers from 0 to {count - 1}, such as 0-3,7; correct it")
        found.update(range(first, last + 1, step or 1))
    return found


def _read_shot(value: Any, place: str) -> Shot:
    try:
        shot = from_plain(Shot, {**OPTIONAL, **value} if isinstance(value, dict) else value, place)
    except PlainError as error:
        raise FarmError(f"{error!s:.300}; see docs/shots.schema.json") from error
    if not NAME.fullmatch(shot.name) or DEVICES.fullmatch(shot.name):
        raise FarmError(
            f"{place}.name: got {shot.name[:80]!r}, want 1 to 64 letters, digits, '_' and '-', "
            "a letter or digit first; it names a folder"
        )
    if not 0 <= shot.seed < 2**63:
        raise FarmError(f"{place}.seed: got {str(shot.seed)[:30]}, want 0 to 2^63-1; choose another")
    for name, text in (("image", shot.image), ("prompt", shot.prompt), ("negative", shot.negative or "")):
        if len(text) > MAX_TEXT or "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            got = f"{len(text):,} characters of which some may be no text"
            raise FarmError(f"{place}.{name}: got {got}, want at most {MAX_TEXT:,} of valid Unicode; correct it")
    if not shot.image:
        raise FarmError(f"{place}.image: got no name, want an image file; add one")
    return shot


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
        raise ValueError(f"key {twice[:40]!r} stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
