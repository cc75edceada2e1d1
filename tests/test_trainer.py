"""The training loop: it learns, resumes to the bit, refuses what is not its own, and keeps its log straight."""

import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import TINY, same
from torch import Tensor, nn

from swifti2v.engine.dit import DiT
from swifti2v.engine.errors import Cancelled, EnvironmentMismatch, NumericsError, SwiftError
from swifti2v.engine.text import WordEncoder
from swifti2v.engine.weights import load_dit, load_words
from swifti2v.training.checkpoint import CHECKPOINT, load_ema
from swifti2v.training.log import CURVE, LOG, TrainingError, read_log
from swifti2v.training.trainer import TrainConfig, ema_decay, learning_rate, ship, step_seed, train

CONFIG = TrainConfig(steps=20, lr=3e-3, warmup=4, save_every=10, log_every=1, ema=0.9)


class Denoise:
    """A tiny DiT that learns the velocity of noise over a constant; with a dropout that draws global randomness."""

    def __init__(self, seed: int = 0, spoil: Callable[[int], bool] = lambda step: False) -> None:
        torch.manual_seed(seed)
        self.dit, self.spoil = DiT(TINY), spoil
        self.modules: dict[str, nn.Module] = {"dit": self.dit}
        self.settings = {"kind": "denoise", "dim": TINY.dim, "rates": (0.1, 0.2)}

    def loss(self, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, TINY.in_channels, 2, 4, 6, generator=generator)
        sigma = torch.rand(1, 2, generator=generator)
        level = sigma[:, None, :, None, None]
        x = nn.functional.dropout((1 - level) * 0.5 + level * noise, 0.1)
        text = torch.randn(1, TINY.text_len, TINY.text_dim, generator=generator)
        error = (self.dit.denoise(x, 1000 * sigma, text) - (noise - 0.5)).square().mean()
        return (error * float("nan") if self.spoil(step) else error), {"sigma": float(sigma.mean())}


def interrupt(at: int):
    def on_log(record: dict) -> None:
        if record["step"] == at:
            raise Cancelled(f"stopped at {at}")

    return on_log


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Denoise, Path]:
    """A run of 20 steps without a break."""
    folder, task = tmp_path_factory.mktemp("whole"), Denoise()
    assert train(task, CONFIG, folder) == 20
    return task, folder


def test_twenty_steps_lower_the_loss(whole: tuple[Denoise, Path]):
    losses = [record["loss"] for record in read_log(whole[1])]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_resumed_run_equals_an_uninterrupted_one(whole: tuple[Denoise, Path], tmp_path: Path):
    with pytest.raises(Cancelled):
        train(Denoise(), CONFIG, tmp_path, interrupt(13))
    assert [record["step"] for record in read_log(tmp_path)] == list(range(1, 14))
    task = Denoise(seed=9)  # other initial weights: all must come from the checkpoint
    torch.manual_seed(77)
    seen: list[int] = []
    train(task, CONFIG, tmp_path, lambda record: seen.append(record["step"]))
    assert seen == list(range(11, 21))
    same(task.dit, whole[0].dit)
    ours, theirs = load_file(tmp_path / CHECKPOINT), load_file(whole[1] / CHECKPOINT)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("ema.") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    drop = ("seconds",)
    logs = [[{k: v for k, v in r.items() if k not in drop} for r in read_log(f)] for f in (tmp_path, whole[1])]
    assert logs[0] == logs[1]
    assert [record["step"] for record in logs[0]] == list(range(1, 21))


def test_a_finished_run_does_nothing_more(whole: tuple[Denoise, Path]):
    before = (whole[1] / CHECKPOINT).read_bytes()
    task = Denoise(seed=4)
    assert train(task, CONFIG, whole[1]) == 20
    assert (whole[1] / CHECKPOINT).read_bytes() == before
    same(task.dit, whole[0].dit)


def test_more_steps_extend_a_run(tmp_path: Path):
    train(Denoise(), replace(CONFIG, steps=3), tmp_path)
    assert train(Denoise(), replace(CONFIG, steps=5), tmp_path) == 5
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    with pytest.raises(TrainingError, match="steps 5, want steps 4"):
        train(Denoise(), replace(CONFIG, steps=4), tmp_path)


def test_the_callers_random_state_is_left_alone(tmp_path: Path):
    torch.manual_seed(5)
    want = torch.rand(3)
    task = Denoise()
    torch.manual_seed(5)
    train(task, replace(CONFIG, steps=1), tmp_path)
    assert torch.equal(torch.rand(3), want)


class Line:
    """One weight and one bias with gradients known by hand: loss = 3 w + b, and a frozen part."""

    def __init__(self) -> None:
        self.layer, self.frozen = nn.Linear(2, 2, bias=True), nn.Linear(1, 1).requires_grad_(False)
        with torch.no_grad():
            self.layer.weight.fill_(1.0)
            self.layer.bias.fill_(2.0)
        self.modules: dict[str, nn.Module] = {"layer": self.layer, "frozen": self.frozen}

    def loss(self, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        return 3 * self.layer.weight.sum() + self.layer.bias.sum(), {}


def test_ema_and_adam_by_hand(tmp_path: Path):
    task = Line()
    config = TrainConfig(steps=3, lr=0.1, warmup=3, weight_decay=0.5, ema=0.15, clip=1.0, log_every=3)
    train(task, config, tmp_path)
    # Adam's step is the rate itself while gradients are constant; rates are 1/30, 2/30 and 0.1; biases do not decay.
    weight, bias, mean, decays = 1.0, 2.0, 1.0, (0.1, 0.15, 0.15)  # 1/10, then min(0.15, 2/11) and min(0.15, 3/12)
    for rate, decay in zip((0.1 / 3, 0.2 / 3, 0.1), decays, strict=True):
        weight = weight * (1 - rate * 0.5) - rate
        bias -= rate
        mean = decay * mean + (1 - decay) * weight
    torch.testing.assert_close(task.layer.weight.detach(), torch.full((2, 2), weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(task.layer.bias.detach(), torch.full((2,), bias), rtol=1e-5, atol=1e-6)
    other = Line()
    assert load_ema(tmp_path, other.modules) == 3
    torch.testing.assert_close(other.layer.weight.detach(), torch.full((2, 2), mean), rtol=1e-5, atol=1e-6)
    names = set(load_file(tmp_path / CHECKPOINT))
    assert not any("frozen" in name for name in names)
    assert read_log(tmp_path)[0]["grad_norm"] == pytest.approx((4 * 9 + 2) ** 0.5)
    assert [record["step"] for record in read_log(tmp_path)] == [3]


def test_schedule():
    config = TrainConfig(steps=110, lr=1.0, warmup=10)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == learning_rate(config, 10) == 1.0
    assert learning_rate(config, 60) == pytest.approx(0.5)
    assert learning_rate(config, 109) < 0.001
    assert learning_rate(config, 10, spent=0.5) == pytest.approx(0.5), "by the clock, where that is further"
    assert learning_rate(config, 60, spent=0.1) == pytest.approx(0.5)
    assert learning_rate(config, 20, spent=1.0) == learning_rate(config, 20, spent=1.2) == 0
    assert learning_rate(config, 4, spent=0.5) == pytest.approx(0.25), "the clock may run out while it rises"
    assert ema_decay(config, 0) == 0.1
    assert ema_decay(config, 10**6) == config.ema
    assert len({step_seed(seed, step) for seed in range(3) for step in range(50)}) == 150
    assert step_seed(1, 2) == step_seed(1, 2) < 2**63


def refusal(task: object, config: TrainConfig, folder: Path, error: type[SwiftError] = TrainingError) -> str:
    with pytest.raises(error) as caught:
        train(task, config, folder)  # type: ignore[arg-type]
    text = str(caught.value)
    assert re.search(r": got .+, want .+; .+", text), text
    return text


def test_other_runs_are_refused(whole: tuple[Denoise, Path], tmp_path: Path):
    folder = whole[1]
    before = (folder / LOG).read_bytes()
    text = refusal(Denoise(), replace(CONFIG, lr=1e-3, seed=4), folder)
    assert "lr 0.003, seed 0, want lr 0.001, seed 4" in text
    task = Denoise()
    task.settings = {**task.settings, "dim": 48}
    assert "task.dim 24, want task.dim 48" in refusal(task, CONFIG, folder)
    task = Denoise()
    task.dit.head.head = nn.Linear(TINY.dim, 8)
    assert "model.dit.head.head.bias (24,)" in refusal(task, CONFIG, folder)
    assert (folder / LOG).read_bytes() == before, "a refusal changes nothing"
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    assert "unreadable" in refusal(Denoise(), CONFIG, tmp_path)
    with pytest.raises(TrainingError, match=r"ema\.dit\.blocks"):
        load_ema(folder, {"dit": nn.Linear(2, 2)})
    with pytest.raises(TrainingError, match="no such file"):
        load_ema(tmp_path / "none", {})


def test_configs_that_cannot_work_are_refused(tmp_path: Path):
    for wrong in ({"steps": 0}, {"ema": 1.0}, {"clip": 0.0}):
        with pytest.raises(TrainingError, match=r": got .+, want .+; .+"):
            replace(CONFIG, **wrong)
    task = Denoise()
    task.dit.half()
    assert "not fp32" in refusal(task, CONFIG, tmp_path)
    task.dit.requires_grad_(False)
    assert "got 0" in refusal(task, CONFIG, tmp_path)
    refusal(Denoise(), replace(CONFIG, device="tpu"), tmp_path, EnvironmentMismatch)


def test_values_that_are_not_finite_stop_the_run(tmp_path: Path):
    text = refusal(Denoise(spoil=lambda step: step >= 12), CONFIG, tmp_path, NumericsError)
    assert text.startswith("step 13: got loss nan")
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == 10
    assert train(Denoise(), CONFIG, tmp_path) == 20


def test_a_few_overflows_are_passed_over_and_counted(tmp_path: Path):
    config = replace(CONFIG, steps=8, skips=2, log_every=8)
    task = Denoise(spoil=lambda step: step in (0, 1, 5))
    train(task, config, tmp_path)
    records = read_log(tmp_path)
    assert [(r["step"], r["skipped"], r["loss"] is None) for r in records] == [
        (1, 1, True),
        (2, 2, True),
        (6, 3, True),
        (8, 3, False),
    ]
    assert all(bool(parameter.isfinite().all()) for parameter in task.dit.parameters())
    refusal(Denoise(spoil=lambda step: step in (2, 3, 4)), config, tmp_path / "three", NumericsError)
    assert TrainConfig(steps=1).allowed_skips == 0
    assert TrainConfig(steps=1, device="cuda", bf16=True).allowed_skips == 3


def test_time_budget_stops_saves_and_resumes(whole: tuple[Denoise, Path], tmp_path: Path):
    assert train(Denoise(), replace(CONFIG, minutes=0.0), tmp_path) == 1
    assert (tmp_path / CURVE).is_file()
    task = Denoise(seed=3)
    assert train(task, replace(CONFIG, minutes=60.0), tmp_path) == 20
    same(task.dit, whole[0].dit)


def test_a_timed_run_ends_at_a_rate_of_nothing(tmp_path: Path):
    """With far more steps than the time allows, the rate falls all the same."""
    config = replace(CONFIG, steps=10**6, minutes=2 / 60, timed=True, save_every=10**6)
    done = train(Denoise(), config, tmp_path)
    rates = [record["lr"] for record in read_log(tmp_path)]
    assert 10 < done == len(rates) < 10**5
    assert rates[-1] < 0.1 * max(rates) < max(rates) == pytest.approx(CONFIG.lr, rel=0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[CONFIG.warmup :]))


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    train(Line(), TrainConfig(steps=1), tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / (CHECKPOINT + ".part")).mkdir()
    assert "while writing" in refusal(Line(), TrainConfig(steps=2), tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_log_and_curve(whole: tuple[Denoise, Path], tmp_path: Path):
    record = read_log(whole[1])[-1]
    assert record.keys() == {"step", "loss", "sigma", "lr", "grad_norm", "seconds", "skipped"}
    assert (whole[1] / CURVE).read_bytes().startswith(b"\x89PNG")
    assert not list(whole[1].glob("*.part"))
    (tmp_path / LOG).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [r["step"] for r in read_log(tmp_path)] == [1], "a line cut short by a crash is left out"
    (tmp_path / LOG).write_text('{"ste\n{"step": 2}\n')
    with pytest.raises(TrainingError, match="line 1"):
        read_log(tmp_path)


def test_without_matplotlib_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "swifti2v[train]" in refusal(Denoise(), CONFIG, tmp_path / "run", EnvironmentMismatch)
    assert not (tmp_path / "run").exists()


def test_shipping(tmp_path: Path):
    dit, words = DiT(TINY), WordEncoder(16, 8, 4)
    ship(dit, tmp_path / "dit")
    ship(words, tmp_path / "words")
    loaded = load_dit(tmp_path / "dit")
    assert loaded.layers[0].ffn[0].weight.dtype == torch.bfloat16
    assert loaded.head.modulation.dtype == torch.float32
    assert dit.layers[0].ffn[0].weight.dtype == torch.float32, "the trained one is left alone"
    torch.testing.assert_close(loaded.layers[0].ffn[0].weight.float(), dit.layers[0].ffn[0].weight, rtol=0.01, atol=0)
    torch.testing.assert_close(load_words(tmp_path / "words").positions, words.positions, rtol=0.01, atol=1e-6)
    with pytest.raises(TrainingError, match="want a VAE"):
        ship(nn.Linear(1, 1), tmp_path)
