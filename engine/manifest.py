"""What a bundle is: a folder with manifest.json and the artifacts that it answers for. docs/BUNDLE.md is the format.

Reading is strict: a key more, a key less, a wrong type or a changed byte is refused, in one line that names the
command which repairs it.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import torch

from .errors import BundleError, EnvironmentMismatch, ProfileError
from .plain import PlainError, from_plain, to_plain
from .presets import PROFILES, get_profile
from .profile import Profile
from .spec import GraphSpec

FORMAT = 1
MANIFEST = "manifest.json"
PART = ".part"  # of a bundle that is being built
# What graphs take and give; fp8 is inside of graphs that are bf16 outside.
EAGER_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {**EAGER_PRECISIONS, "fp8": torch.bfloat16}

Precision = Literal["fp32", "bf16", "fp16", "fp8"]
Origin = Literal["shipped", "given", "untrained"]


@dataclass(frozen=True)
class WeightsRecord:
    """Which weights a bundle was built from: SHA-256 (hex) by the weights name of the graphs."""

    source: Origin
    sha256: dict[str, str]


@dataclass(frozen=True)
class Artifact:
    """One file of a bundle; the path is relative to its folder, with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class GraphRecord:
    """One compiled graph. `key` is a hash of all that decides its artifacts; equal keys are not built again.

    `parity` is the largest relative error of an output against eager in the same precision, when it was built; None
    where it was built for another machine, so that nobody has seen it run.
    """

    spec: GraphSpec
    weights: str
    key: str
    parity: float | None
    artifacts: tuple[Artifact, ...]

    @property
    def bytes(self) -> int:
        return sum(artifact.bytes for artifact in self.artifacts)


class Recipe(NamedTuple):
    """What has to be asked for to build a bundle; `command` says it as a command line."""

    profile: Profile
    backend: str
    precision: str
    source: str
    arch: str = ""  # of GPUs it is named, such as sm89; a CPU is the one that it is built on

    def command(self, folder: Path | None = None) -> str:
        """The `swifti2v-export` command that builds this, to `folder` or to the user's cache."""
        words = [f"swifti2v-export --profile {self.profile.name}", *_overrides(self.profile)]
        if self.source == "given":
            words.append("--weights DIR")
        words += [f"--backend {self.backend}", f"--precision {self.precision}"]
        if self.arch.startswith("sm"):
            words.append(f"--arch {self.arch}")
        return " ".join(words if folder is None else [*words, f"-o {folder}"])

    def repair(self, folder: Path) -> str:
        """What to do about a bundle. LoRAs are known by hashes alone, so it cannot name them."""
        said = f"run {self.command(folder)}"
        return f"{said} with your --weights and --lora options" if self.source == "given" else said


@dataclass(frozen=True)
class Manifest:
    """All that has to be known of a bundle to run it, and to say why it cannot be run."""

    profile: Profile
    backend: str
    precision: Precision
    arch: str  # what the artifacts were compiled for; several are separated by commas
    versions: dict[str, str]  # must be equal where the bundle runs
    built_with: dict[str, str]  # for the reader only
    weights: WeightsRecord
    graphs: dict[str, GraphRecord]
    seconds: dict[str, float]  # by graph; no part of the digest

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything but timings: builds of the same input have the same one."""
        return _digest(to_plain(self))

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.profile, self.backend, self.precision, self.weights.source, self.arch)

    @property
    def archs(self) -> tuple[str, ...]:
        """The architectures that the artifacts run on, any of them."""
        return tuple(self.arch.split(","))


@dataclass(frozen=True)
class Bundle:
    """A folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def repair(self) -> str:
        """What to do about a bundle that cannot be used."""
        return self.manifest.recipe.repair(self.folder)

    def files(self, graph: str) -> tuple[Path, ...]:
        """The artifacts of a graph, in the manifest's order."""
        return tuple(self.folder / artifact.path for artifact in self.manifest.graphs[graph].artifacts)


def read_bundle(folder: Path) -> Bundle:
    """A bundle by its manifest; `check_artifacts` looks at the files. BundleError for what is not a whole bundle."""
    folder = folder.absolute()  # `.` has no name that another could stand beside
    part = folder.parent / (folder.name + PART)
    if not folder.is_dir():
        if part.is_dir():
            raise BundleError(
                f"{folder}: got only {part.name} of an interrupted build, want the finished bundle; "
                f"run the same swifti2v-export command again, with -o {folder}"
            )
        raise BundleError(f"{folder}: got no such folder, want a bundle; check the path, or build it with -o {folder}")
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder}: got no {MANIFEST}, want a finished bundle; "
            "copy it again whole, or build it with swifti2v-export to another folder"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: got {error}, want readable UTF-8; {_rebuild(folder)}") from error
    return Bundle(folder, parse_manifest(text, path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest so that it appears whole or not at all."""
    write_text(folder / MANIFEST, format_manifest(manifest))


def write_text(path: Path, text: str) -> None:
    """Write beside the file, then rename."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")  # another process may write the same file
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def format_manifest(manifest: Manifest) -> str:
    """The text of manifest.json. PlainError for what could not be read again."""
    manifest = from_plain(Manifest, to_plain(manifest), "manifest")  # a whole number is a float where one is meant
    head = {"format": FORMAT, "digest": manifest.digest}
    return json.dumps({**head, **to_plain(manifest)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_manifest(text: str, path: Path) -> Manifest:
    """The manifest in the text of the file at `path`. BundleError for all that is not exactly one."""
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{path}: got unreadable JSON ({error}), want a manifest; {_rebuild(path.parent)}") from error
    if not isinstance(plain, dict):
        raise BundleError(f"{path}: got {type(plain).__name__}, want a manifest; {_rebuild(path.parent)}")
    repair = _rebuild(path.parent, plain)
    if plain.get("format") != FORMAT:
        raise EnvironmentMismatch(f"{path} format: got {plain.get('format')!r}, want {FORMAT}; {repair}")
    fields = {name: value for name, value in plain.items() if name not in ("format", "digest")}
    if plain.get("digest") != _digest(fields):
        raise BundleError(f"{path}: got contents of digest {_digest(fields)}, want {plain.get('digest')}; {repair}")
    try:
        manifest = from_plain(Manifest, fields, "manifest")
    except (PlainError, ProfileError) as error:
        raise BundleError(f"{path} {str(error).split(';')[0]}; {repair}") from error
    except ArithmeticError as error:
        raise BundleError(f"{path} profile: got sizes of 0 ({error}), want more; {repair}") from error
    _check(manifest, path, repair)
    return manifest


def check_artifacts(bundle: Bundle, hashes: bool = True) -> None:
    """Refuse artifacts that are missing, cut off, changed, or outside the folder; without `hashes` sizes only."""
    for record in bundle.manifest.graphs.values():
        for artifact in record.artifacts:
            reason = damage(bundle.folder, artifact, hashes)
            if reason:
                raise BundleError(f"{bundle.folder / artifact.path}: {reason}; {bundle.repair}")


def damage(folder: Path, artifact: Artifact, hashes: bool = True) -> str:
    """What is wrong with an artifact, as `got X, want Y`; empty if nothing is."""
    path = folder / artifact.path
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"got a link to {path.resolve()}, want a file in the bundle"
    if not path.is_file():
        return "got no such file, want an artifact of the bundle"
    size = path.stat().st_size
    if size != artifact.bytes:
        return f"got {size} bytes, want {artifact.bytes}"
    if hashes and (got := sha256_of(path)) != artifact.sha256:
        return f"got SHA-256 {got}, want {artifact.sha256}"
    return ""


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(plain: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in plain.items() if name != "seconds"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _check(manifest: Manifest, path: Path, repair: str) -> None:
    """Refuse a manifest whose parts contradict one another or lead out of its folder."""
    for name, record in manifest.graphs.items():
        if record.spec.name != name or record.weights not in manifest.weights.sha256 or not record.artifacts:
            raise BundleError(
                f"{path} graphs.{name}: got spec {record.spec.name!r}, weights {record.weights!r} and "
                f"{len(record.artifacts)} artifacts, want one whole graph; {repair}"
            )
        for artifact in record.artifacts:
            plain = PurePosixPath(artifact.path)
            if plain.is_absolute() or ".." in plain.parts or "\\" in artifact.path or ":" in artifact.path:
                raise BundleError(
                    f"{path} graphs.{name}: got path {artifact.path!r}, want one inside the bundle; {repair}"
                )


def _rebuild(folder: Path, plain: Mapping[str, Any] | None = None) -> str:
    """The command for a bundle whose manifest may be unreadable: as much of it as can be told."""
    recipe = None
    with suppress(PlainError, ProfileError, KeyError, TypeError, ValueError, ArithmeticError):
        plain = plain or {}
        profile = from_plain(Profile, plain["profile"], "profile")
        backend, precision, arch = (str(plain[name]) for name in ("backend", "precision", "arch"))
        recipe = Recipe(profile, backend, precision, str(plain["weights"]["source"]), arch)
    return f"run swifti2v-export --profile P --backend B -o {folder}" if recipe is None else recipe.repair(folder)


def _overrides(profile: Profile) -> list[str]:
    """Options that turn the named profile into this one, as far as graphs depend on them."""
    if profile.name not in PROFILES:
        return []
    named = get_profile(profile.name)
    words = [
        f"--{name} {getattr(profile, name)}"
        for name in ("frames", "noisy", "neighbours")
        if getattr(profile, name) != getattr(named, name)
    ]
    if (profile.width, profile.height) != (named.width, named.height):
        words.append(f"--size {profile.width}x{profile.height}")
    words += ["--reuse-context"] if profile.reuse_context else []
    return words
