"""What tests share: tiny real models, every parameter random, on the CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from capi_support import opened
from hypothesis import HealthCheck, settings
from torch import nn

from swifti2v.engine.dit import DiT
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile
from swifti2v.engine.text import WordEncoder
from swifti2v.engine.vae import VAE
from swifti2v.engine.weights import save_dit, save_vae, save_words
from swifti2v.runtime import capi
from swifti2v.runtime.backend_eager import open_eager
from swifti2v.runtime.prompts import WordPrompts
from swifti2v.runtime.session import Session

settings.register_profile(  # a busy machine is no failure
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("untimed")


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("av", "diffusers", "onnx", "onnxruntime", "onnxscript", "tensorrt_rtx")))
"""


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Give every parameter a random value of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("gamma", "norm_q.weight", "norm_k.weight", "norm3.weight")):
            parameter.data = 1 + 0.1 * noise
        elif parameter.ndim > 1 and not name.endswith("modulation"):
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.1 * noise
    return module.requires_grad_(False).eval()


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """What frames should be: pixels [1, 3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3], rounded and clipped, by NumPy."""
    levels = np.rint((pixels[0].float().numpy() + np.float32(1)) * np.float32(127.5))  # [3, T, H, W]
    return levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 3, 0)


def tiny_modules(profile: Profile) -> dict[str, nn.Module]:
    """Random modules for every weights name of a profile."""
    experts = [f"stage1_{name}" if name else "stage1" for name in profile.stage1.experts]
    modules = {name: randomise(DiT(profile.stage1.dit), seed) for seed, name in enumerate(experts, 10)}
    modules["stage2"] = randomise(DiT(profile.stage2.dit), 2)
    modules["vae1"] = randomise(VAE(profile.stage1.vae), 3)
    modules["vae2"] = randomise(VAE(profile.stage2.vae), 4)
    return modules


def tiny_session(
    profile: Profile,
    spoil: str = "",
    image_encoder: Callable[[np.ndarray], torch.Tensor] | None = None,
) -> Session:
    """An eager fp32 session on random modules; those called `spoil` get a NaN."""
    modules = tiny_modules(profile)
    if spoil:
        next(modules[spoil].parameters()).view(-1)[0] = float("nan")
    dit = profile.stage1.dit
    words = WordEncoder(profile.text.vocabulary, dit.text_dim, dit.text_len)
    randomise(words, 5)
    graphs = open_eager(profile, modules, torch.float32)
    return Session(profile, graphs, WordPrompts(words, "tests"), image_encoder=image_encoder)


# Tests run beside each other, and on a shared machine threads that wait for one another cost far more than they give.
torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Profile:
    return get_profile("tiny")


@pytest.fixture
def make_session():
    """Builds sessions from profiles: `make_session(profile)`."""
    return tiny_session


@pytest.fixture(scope="session")
def make_modules():
    """Makes random modules for a profile: `make_modules(profile)`."""
    return tiny_modules


@pytest.fixture(scope="session")
def save_models(make_modules):
    """Writes a model folder for a profile: `save_models(profile, folder)`."""

    def save(profile: Profile, folder: Path) -> Path:
        modules = make_modules(profile)
        for name, module in modules.items():
            (save_vae if name.startswith("vae") else save_dit)(module, folder / name)
        torch.manual_seed(0)
        dit = profile.stage1.dit
        save_words(WordEncoder(profile.text.vocabulary, dit.text_dim, dit.text_len), folder / "text")
        return folder

    return save


@pytest.fixture(scope="module")
def shared_handle() -> Iterator[int]:
    """A session of the flat calls that a module's tests share."""
    handle = opened()
    yield handle
    capi.destroy(handle)


@pytest.fixture
def handle(shared_handle: int) -> Iterator[int]:
    """A session without a request on its way."""
    yield shared_handle
    capi.cancel(shared_handle)


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A folder for PYTHONPATH with which Python lacks what a bare machine lacks."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITHOUT)
    return str(folder)
