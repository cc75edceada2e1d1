"""A DiT for latents of more channels than it was trained on, which at first does what it did."""

from dataclasses import replace

import torch

from ..engine.dit import DiT
from ..engine.profile import DiTConfig
from .log import TrainingError


@torch.no_grad()
def grown(dit: DiT, config: DiTConfig) -> DiT:
    """The DiT with the channels of `config`, fp32: its own come first in a group, new ones have no velocity yet.

    Groups are the noisy latents, what else it reads (Stage I's mask), and latents again (first frame or reference). New
    ones are read at random, as strongly as its own: neither read nor made, they would never get a gradient.
    TrainingError if anything but channels differs, or there are fewer.
    """
    old = dit.config
    if old == config:
        return dit
    more = config.out_channels - old.out_channels
    if more < 0 or replace(old, in_channels=old.in_channels + 2 * more, out_channels=config.out_channels) != config:
        raise TrainingError(f"DiT to begin with: got {old}, want {config} with no more channels; begin anew")
    z, given, made = old.out_channels, DiT(config), dit.state_dict()
    own = made["patch_embedding.weight"]
    weight = given.patch_embedding.weight
    weight = weight * (own.norm() / own.numel() ** 0.5) / (weight.norm() / weight.numel() ** 0.5)
    weight[:, :z] = own[:, :z]
    rest = old.in_channels - z
    weight[:, config.out_channels : config.out_channels + rest] = own[:, z:]
    made["patch_embedding.weight"] = weight
    for name in ("head.head.weight", "head.head.bias"):
        rows = made[name].unflatten(0, (4, z))  # [4*z, ...] -> [4, z, ...], the channels of each of a patch's cells
        wide = rows.new_zeros(4, config.out_channels, *rows.shape[2:])
        wide[:, :z] = rows
        made[name] = wide.flatten(0, 1)
    given.load_state_dict(made)
    return given
