"""diffusers' modules beside ours, where ours has what they have not."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from swifti2v.benchmarks.clock import Timing
from swifti2v.benchmarks.items import Bench, vae_items
from swifti2v.benchmarks.models import open_models
from swifti2v.benchmarks.peak import Peak
from swifti2v.benchmarks.peers import Peer, network_of
from swifti2v.benchmarks.rows import measure_items
from swifti2v.benchmarks.variants import eager_variant
from swifti2v.engine.presets import get_profile
from swifti2v.engine.vae import VAE


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_peer_computes_the_network_beside_linear_maps(direction: Literal["encode", "decode"]):
    """Both stages get them, so that our own result must not be what the peer's is compared with."""
    profile = get_profile("tiny").override(frames=13)
    stage = profile.stage2
    vae = replace(stage.vae, mult=(1, 2, 2), res_blocks=1, temporal=(True, True), linear=True)
    models = open_models(replace(profile, stage2=replace(stage, vae=vae)), None, torch.device("cpu"))
    variant, peer = eager_variant(models, torch.float32), Peer(torch.float32)
    items = vae_items(Bench(models, {variant.name: variant}, [peer]), direction)
    (clip,) = (item for item in items if item.apart)
    ((theirs, ours),) = measure_items([clip], models.device, lambda _: Peak(1e9, "any"), Timing(1, 0))
    assert (theirs.variant, ours.variant) == (peer.name, "eager_fp32")
    assert theirs.parity is not None
    assert 0 < theirs.parity < 1e-5
    assert "does not compute them" in theirs.note
    assert peer.name in ours.ratios
    results = [clip.works[name].call() for name in (peer.name, variant.name)]
    assert isinstance(results[0], torch.Tensor)
    assert isinstance(results[1], torch.Tensor)
    assert float((results[1] - results[0]).norm() / results[0].norm()) > 1e-2, "the maps change nothing"


def test_a_vae_without_linear_maps_is_its_own_network():
    vae = VAE(get_profile("tiny").stage2.vae)
    assert network_of(vae) is vae
