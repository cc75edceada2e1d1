"""The VAEs with every fused kernel, in their forms for a CPU: the values, caches and weights of plain PyTorch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomise
from torch import Tensor

from swifti2v.engine import vae_layers
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile, VAEConfig
from swifti2v.engine.state import SegmentState
from swifti2v.engine.vae import VAE
from swifti2v.engine.vae_layers import Up, VaeCache
from swifti2v.kernels.dispatch import ChoiceTable
from swifti2v.kernels.kernel_set import EAGER, fused
from swifti2v.kernels.subpixel import subpixel_weights
from swifti2v.runtime.farm_state import Saved, load_state, save_state
from swifti2v.runtime.fused import give_kernels, graph_calls, twin

FUSED = fused(ChoiceTable(), "cpu")
TINY = get_profile("tiny")
KINDS = {"8x8x4": TINY.stage1.vae, "16x16x4": TINY.stage2.vae}
WAYS = ("encode", "decode")


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest) -> VAEConfig:
    return KINDS[request.param]


def pair(config: VAEConfig) -> tuple[VAE, VAE]:
    """A VAE of plain PyTorch, and one with the same weights and fused kernels."""
    plain = VAE(config)
    randomise(plain, 1)
    other = twin(plain)
    give_kernels({"vae": other}, FUSED)
    assert isinstance(other, VAE)
    return plain, other


def clip(config: VAEConfig, way: str) -> tuple[Tensor, ...]:
    """What a stream of six calls takes, of 3 x 5 cells."""
    generator, cell = torch.Generator().manual_seed(2), config.spatial
    if way == "decode":
        return torch.randn(1, config.latent_channels, 6, 3, 5, generator=generator).split(1, dim=2)
    video = torch.rand(1, 3, 1 + 5 * config.time, 3 * cell, 5 * cell, generator=generator) * 2 - 1
    return video.split((1, *(config.time,) * 5), dim=2)


def caller(vae: VAE, way: str) -> Callable[..., tuple[Tensor, VaeCache]]:
    return vae.encode_chunk if way == "encode" else vae.decode_chunk


def near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want.double()).norm()) <= 1e-5 * float(want.double().norm())


@torch.inference_mode()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("together", [1, 2**20], ids=["one frame at a time", "together"])
def test_every_call_gives_what_plain_pytorch_gives(
    config: VAEConfig, way: str, together: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vae_layers, "TOGETHER", together)
    plain, other = pair(config)
    want_caches = caches = None
    for x in clip(config, way):
        want, want_caches = caller(plain, way)(x, want_caches)
        old, (got, caches) = caches, caller(other, way)(x, caches, donate=True)
        near(got, want)
        for new, same in zip(caches, want_caches, strict=True):
            assert new.untyped_storage().nbytes() == new.nbytes
            near(new, same)
        assert old is None or [c.data_ptr() for c in caches] == [c.data_ptr() for c in old], "donated"


@torch.inference_mode()
@pytest.mark.parametrize("way", WAYS)
def test_a_stream_goes_on_with_other_kernels(config: VAEConfig, way: str):
    """Caches are the same whatever made them, so that a saved state may go on anywhere."""
    plain, other = pair(config)
    want_caches = caches = None
    for index, x in enumerate(clip(config, way)):
        want, want_caches = caller(plain, way)(x, want_caches)
        got, caches = caller((plain, other)[index % 2], way)(x, caches)
        near(got, want)


@torch.inference_mode()
def test_a_saved_state_keeps_its_layouts(config: VAEConfig, tmp_path: Path):
    """With them it goes on to the same bits: convolutions of other layouts add up in another order."""
    _, other = pair(config)
    first, *_ = clip(config, "encode")
    _, caches = other.encode_chunk(first, None)
    motion, anchor, latents, reference = (torch.zeros(1, 2, 1, 3, 5) for _ in range(4))
    state = SegmentState(1, anchor, latents, reference, (), caches, ())
    save_state(tmp_path / "state", Saved(motion, state))
    loaded = load_state(tmp_path / "state", torch.device("cpu"), torch.float32).state.reference_cache
    assert all(torch.equal(a, b) for a, b in zip(loaded, caches, strict=True))
    got, want = ([c.is_contiguous(memory_format=torch.channels_last_3d) for c in some] for some in (loaded, caches))
    assert got == want
    assert set(want) == {True, False}, "some of each"


@torch.inference_mode()
def test_tensors_stay_in_the_layout_that_convolutions_want(config: VAEConfig):
    """What leaves a residual block has the layout of its convolution, not that of its first input."""
    _, other = pair(config)
    block = other.decoder.middle.block1
    x = torch.randn(2, block.conv1.in_channels, 1, 3, 5)  # of one clip, a CPU takes a convolution that has one layout
    y = block(x, vae_layers.Tape(None))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


def test_weights_are_folded_once_and_only_for_the_kernel(config: VAEConfig):
    plain, other = pair(config)
    ups, others = ([m for m in vae.modules() if isinstance(m, Up)] for vae in (plain, other))
    assert len(ups) == len(config.temporal)
    assert all(up.folded is None for up in ups)
    for up, one in zip(ups, others, strict=True):
        assert one.folded is not None
        assert torch.equal(one.folded, subpixel_weights(up.conv.weight))
    before = [one.folded for one in others]
    with torch.inference_mode():
        other.decode(torch.randn(1, config.latent_channels, 3, 1, 2))
    assert all(one.folded is kept for one, kept in zip(others, before, strict=True))
    assert other.state_dict().keys() == plain.state_dict().keys()
    shared = [m for m in twin(other).modules() if isinstance(m, Up)]
    assert all(a.folded is b.folded for a, b in zip(shared, others, strict=True)), "a twin has no copies"
    give_kernels({"vae": other}, replace(EAGER, norm_silu_conv=FUSED.norm_silu_conv))
    assert all(one.folded is None for one in others)
    give_kernels({"vae": other}, EAGER)
    x = torch.randn(1, config.latent_channels, 2, 1, 2)
    with torch.inference_mode():
        assert torch.equal(other.decode(x), plain.decode(x))


def test_calls_are_those_of_every_stream(make_modules):
    profile: Profile = get_profile("tiny")
    modules = {name: module for name, module in make_modules(profile).items() if name.startswith("vae")}
    calls = graph_calls(profile, modules, torch.float32)
    assert {call.op for call in calls} == {"norm_silu_conv", "upsample_conv"}
    of_norms = [call for call in calls if call.op == "norm_silu_conv"]
    histories = {call.arguments[4] is None for call in of_norms}
    assert histories == {True, False}, "the first call of a stream, and later ones"
    inputs = next(call for call in calls if call.op == "upsample_conv").inputs(torch.device("cpu"))
    assert torch.equal(inputs[3], subpixel_weights(inputs[1]))
    near(FUSED.upsample_conv(*inputs), EAGER.upsample_conv(*inputs))


@torch.inference_mode()
def test_graphs_run_with_the_chosen_kernels(make_modules):
    """The executable module of a VAE graph takes and gives what its spec says, whatever kernels it runs with."""
    modules = make_modules(TINY)
    graph = profile_graphs(TINY, torch.float32)["decode_next"]
    torch.manual_seed(0)
    feed = [torch.randn(tensor.shape) for tensor in graph.spec.inputs]
    want = graph.build(modules["vae2"], False)(*feed)
    give_kernels(modules, FUSED)
    got = graph.build(modules["vae2"], False)(*feed)
    assert [tuple(tensor.shape) for tensor in got] == [tensor.shape for tensor in graph.spec.outputs]
    near(got[0], want[0])
