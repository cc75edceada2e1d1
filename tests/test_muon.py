"""Muon: orthogonal updates, which weights get them, and that it trains and resumes."""

from pathlib import Path

import torch
from torch import nn

from swifti2v.training.checkpoint import load_ema
from swifti2v.training.muon import Muon, layer_weights, orthogonal
from swifti2v.training.trainer import TrainConfig, train


def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values():
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6), (8, 8)):
        matrix = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ orthogonal(matrix) @ v.T
        assert (inner - inner.diag().diag()).norm() < 1e-3 * inner.norm(), "the same singular vectors"
        assert inner.diag().min() > 0.5
        assert inner.diag().max() < 1.3


def test_the_first_step_is_the_orthogonal_gradient():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, 2))
    before, gradient = weight.detach().clone(), torch.randn(4, 3, 2)
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1).step()
    want = orthogonal(gradient.flatten(1)).view(4, 3, 2)
    assert torch.allclose(before - weight.detach(), 0.1 * want, atol=1e-5)


def test_weights_of_one_shape_step_as_each_alone():
    torch.manual_seed(0)
    starts, gradients = torch.randn(2, 2, 4, 6).unbind(0)
    gradients = gradients * torch.tensor([1.0, 50.0])[:, None, None]
    together, alone = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    for weights in (together, alone):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
    Muon(together, lr=0.1).step()
    for weight in alone:
        Muon([weight], lr=0.1).step()
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert not torch.allclose(together[0] - starts[0], together[1] - starts[1], atol=1e-3)


def test_which_weights_it_takes():
    module = nn.Sequential(nn.Linear(3, 4), nn.Conv3d(2, 2, 3), nn.Embedding(5, 2), nn.LayerNorm(4), nn.Conv2d(1, 1, 1))
    module[1].weight.requires_grad_(True)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert [id(weight) for weight in layer_weights([module, frozen])] == [id(module[0].weight), id(module[1].weight)]


class Fit:
    """Learns a fixed linear map."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.modules = {"layer": self.layer}
        self.map = torch.randn(3, 6)

    def loss(self, step: int, seed: int):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed))
        return (self.layer(x) - x @ self.map.T).square().mean(), {}


def test_training_with_muon_lowers_the_loss_and_resumes_bit_by_bit(tmp_path: Path):
    config = TrainConfig(steps=40, lr=1e-2, muon=0.05, warmup=5, log_every=1, save_every=20)
    whole, parts = Fit(), Fit()
    losses: list[float] = []
    train(whole, config, tmp_path / "whole", lambda record: losses.append(record["loss"]))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])

    def stop(record) -> None:
        if record["step"] == 25:
            raise KeyboardInterrupt

    try:
        train(parts, config, tmp_path / "parts", stop)
    except KeyboardInterrupt:
        parts = Fit()
    train(parts, config, tmp_path / "parts")
    for a, b in zip(whole.layer.parameters(), parts.layer.parameters(), strict=True):
        assert torch.equal(a, b)
    averaged = Fit()
    assert load_ema(tmp_path / "parts", averaged.modules) == 40
