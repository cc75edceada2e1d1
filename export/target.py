"""What a build is for: backend, architectures, versions; and whether its artifacts can be run here."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..engine.errors import EnvironmentMismatch, ProfileError
from ..engine.manifest import Precision
from ..runtime.backend_gpu import arch_device
from ..runtime.backend_registry import find_backend, versions_here
from ..runtime.backend_weights import Source
from .builders import find_builder
from .tensorrt import check_precision


@dataclass(frozen=True)
class Target:
    """What all graphs of a build have in common, beside their source."""

    backend: str
    arch: str
    versions: dict[str, str]
    built_with: dict[str, str]

    @property
    def archs(self) -> tuple[str, ...]:
        return tuple(self.arch.split(","))


def make_target(source: Source, backend: str, archs: Sequence[str] = ()) -> Target:
    """What is built: for this machine, or for the architectures that were asked for where the backend can do that.

    EnvironmentMismatch where the backend's packages are missing, or it does not build for them.
    """
    builder, found = find_builder(backend), find_backend(backend)
    if source.precision == "fp8" and not builder.fp8:
        raise ProfileError(f"precision: got fp8 for {backend}, want one that it builds in; pass another --precision")
    built_with, versions = builder.built_with(), versions_here(backend)
    device = target_device(backend, source.device, archs)
    if builder.archs is None:
        here = found.arch(device)
        if archs and tuple(archs) != (here,):
            raise EnvironmentMismatch(
                f"arch: got {','.join(archs)}, want {here}: {backend} builds for the machine it is on; "
                "leave --arch out, or build there"
            )
        check_precision(here, source.precision)
        return Target(backend, here, versions, built_with)
    if not archs and not torch.cuda.is_available():
        raise ProfileError(
            f"arch: got none and no GPU here, want to know what {backend} is to build for; pass --arch sm89 or so"
        )
    checked = builder.archs(archs or (found.arch(device),), source.precision)
    return Target(backend, ",".join(checked), versions, built_with)


def target_device(backend: str, device: torch.device, archs: Sequence[str] = ()) -> torch.device:
    """The kind of device that artifacts run on: what the architectures are of, where the backend builds for it.

    Without them it is `device`, where the weights are while they are built, or else the backend's usual one.
    """
    devices = find_builder(backend).devices
    wanted = arch_device(archs[0]) if archs else device
    return wanted if wanted.type in devices else torch.device(devices[0])


def run_device(target: Target) -> torch.device | None:
    """Where artifacts can be run here, to compare them with eager; None if this machine is not one of theirs."""
    device = arch_device(target.arch)
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    return device if find_backend(target.backend).arch(device) in target.archs else None


def pick_device(backend: str, asked: str | None, archs: Sequence[str]) -> torch.device:
    """The kind of device to build for: the one asked for, if the backend builds for it, else that of `archs`."""
    device = target_device(backend, torch.device("cpu"), archs) if asked is None else torch.device(asked)
    devices = find_builder(backend).devices
    if device.type not in devices:
        raise ProfileError(
            f"device: got {device.type} for {backend}, want {' or '.join(devices)}; pass another --device or --backend"
        )
    other = [arch for arch in archs if arch_device(arch) != device]
    if asked is not None and other:
        raise ProfileError(f"arch: got {other[0]} for {device.type}, want one of its own; leave out --arch or --device")
    return device


def archs_here(backend: str, device: torch.device) -> list[str]:
    """What has to be said to build for a GPU that is here; nothing where the backend knows, or asks."""
    builder = find_builder(backend)
    return [find_backend(backend).arch(device)] if device.type == "cuda" and "cpu" in builder.devices else []


def pick_precision(backend: str, asked: Precision | None, device: torch.device) -> Precision:
    """The precision asked for, if the backend has it there, else the one it is best in."""
    device = target_device(backend, device)
    builder = find_builder(backend)
    has = builder.precisions or find_backend(backend).precisions(device)
    if not has:
        find_backend(backend).arch(device)  # says what is missing
    elif builder.fp8:
        has = (*has, "fp8")
    if not has or (asked is not None and asked not in has):
        raise ProfileError(
            f"precision: got {asked}, want one of {', '.join(has) or 'none'} for {backend} on {device.type}; "
            "pass one of these"
        )
    return asked or has[0]
