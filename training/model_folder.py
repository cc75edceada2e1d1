"""The folder of models that a LoRA is trained over, with the entries that `swifti2v generate --model-dir` reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine.checkpoint import find_entry, find_experts
from ..engine.dit import DiT
from ..engine.errors import WeightsError
from ..engine.profile import DiTConfig
from ..engine.vae import VAE
from ..engine.weights import fingerprint, load_dit, load_vae, read_dit_config
from .flow import Expert

Merged = Mapping[str, Sequence[tuple[Path, float]]]  # LoRA files and their strengths by stage1, stage1_low, stage2


@dataclass(frozen=True)
class ModelFolder:
    """Models of one dtype on one device; the LoRAs of `merged`, such as few-step ones, are part of their DiTs."""

    root: Path
    dtype: torch.dtype
    device: str
    merged: Merged = field(default_factory=dict)

    def find(self, name: str) -> Path | None:
        """NAME/ or NAME.safetensors, the experts stage1 (high noise) and stage1_low also inside stage1/."""
        experts = find_experts(self.root / "stage1")
        if experts is not None and name in ("stage1", "stage1_low"):
            return experts[0] if name == "stage1" else experts[1]
        return find_entry(self.root, name)

    def path(self, name: str) -> Path:
        """The entry of that name. WeightsError where there is none."""
        path = self.find(name)
        if path is None:
            raise WeightsError(
                f"{self.root}: got no {name}, want {name}/ or {name}.safetensors; put it there, or a link"
            )
        return path

    def dit(self, name: str) -> DiT:
        """The DiT, frozen."""
        loras = self.merged.get(name, ())
        return load_dit(self.path(name), dtype=self.dtype, device=self.device, loras=loras)

    def vae(self, name: str) -> VAE:
        """The VAE, frozen."""
        return load_vae(self.path(name), dtype=self.dtype, device=self.device)

    def config(self, name: str) -> DiTConfig:
        """The sizes of a DiT, from its file's header."""
        return read_dit_config(self.path(name))

    def expert(self, choice: Expert | None) -> str:
        """The entry of Stage I to train: the one there is, of two the chosen one. WeightsError where that is open."""
        two = self.find("stage1_low") is not None
        if two and choice is None:
            raise WeightsError(
                f"{self.root}: got two experts of Stage I, want one at a time, as each has its own LoRA; "
                "pass --expert high or --expert low"
            )
        if choice is not None and not two:
            raise WeightsError(f"{self.root}: got --expert {choice} and one DiT of Stage I, want two; leave it out")
        return "stage1_low" if choice == "low" else "stage1"

    def identity(self, *names: str) -> dict[str, Any]:
        """What a resumed run must share of these entries, and of the LoRAs merged into them.

        WeightsError for LoRAs of other entries, which nobody would read.
        """
        unused = sorted(set(self.merged) - set(names))
        if unused:
            dits = ", ".join(name for name in names if not name.startswith("vae"))
            raise WeightsError(f"LoRAs: got some for {', '.join(unused)}, want only for {dits}; leave them out")
        settings: dict[str, Any] = {"models": fingerprint(*map(self.path, names))}
        if self.merged:
            merged = {
                name: [[fingerprint(file), strength] for file, strength in self.merged[name]] for name in self.merged
            }
            settings["merged"] = merged
        return settings
