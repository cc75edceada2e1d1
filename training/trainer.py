"""One loop for every training: AdamW, a cosine schedule, EMA, one checkpoint file, a log and a loss curve.

A step is a function of its number and the seed alone, so a run that was interrupted and resumed is the same run: on the
CPU bit by bit, on a GPU up to the order in which its kernels add. A `timed` run is not: its clock is that of each call.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.errors import EnvironmentMismatch, NumericsError
from ..engine.layouts import stays_fp32
from ..engine.text import WordEncoder
from ..engine.vae import VAE
from ..engine.weights import save_dit, save_vae, save_words
from .checkpoint import CHECKPOINT, FORMAT, check_identity, check_shapes, read_checkpoint
from .log import LOG, Record, TrainingError, curve_figures, draw_curve, read_log
from .muon import Muon, layer_weights

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "average")  # of AdamW and Muon
# These may differ when a run is resumed; `steps` may only grow.
# What a run began with matters no more once it has a checkpoint.
FREE = ("minutes", "timed", "save_every", "log_every", "device", "bf16", "skips", "curve", "task.start")
Parts = Mapping[str, float | Tensor]


class Task(Protocol):
    """What is trained. Parameters that require gradients are; the others are left alone and not saved.

    `loss` draws its own batch as a pure function of its arguments; `seed` differs from step to step. The global random
    state is seeded before each call too. A task may have `settings`, a mapping of JSON values that a resumed run must
    share.
    """

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...

    def loss(self, step: int, seed: int) -> tuple[Tensor, Parts]: ...


@dataclass(frozen=True)
class TrainConfig:
    """One run. The rate rises for `warmup` steps, then falls to 0 at `steps`; raised ones give another cosine."""

    steps: int
    batch: int = 1  # clips of a step; read by the task that draws them
    lr: float = 3e-4
    muon: float = 0.0  # the rate of Muon, for the weights of layers; 0 = AdamW for all
    warmup: int = 100
    weight_decay: float = 0.01  # on matrices and kernels, not on biases and norms
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # largest norm of all gradients together; inf = off
    ema: float = 0.999
    seed: int = 0
    save_every: int = 500
    log_every: int = 10
    device: str = "cpu"
    bf16: bool = False  # autocast; weights, EMA and optimizer stay fp32
    minutes: float | None = None  # stop and save when this much time has passed in this call
    timed: bool = False  # the rate falls to 0 at the end of `minutes` if that comes before `steps`
    curve: bool = True  # draw loss.png, which needs matplotlib
    skips: int | None = None  # non-finite steps in a row to pass over; None: 3 under bf16, else 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name}: got {getattr(self, name)}, want 1 or more; the nearest is 1")
        if not (0 <= self.ema < 1 and self.lr > 0 and self.clip > 0 and self.warmup >= 0):
            raise TrainingError(
                f"training: got ema {self.ema}, lr {self.lr}, clip {self.clip}, warmup {self.warmup}, "
                "want 0 <= ema < 1, lr and clip above 0, warmup 0 or more; change them"
            )

    @property
    def allowed_skips(self) -> int:
        return (3 if self.bf16 else 0) if self.skips is None else self.skips


def step_seed(seed: int, *labels: int | str) -> int:
    """A seed in 0 .. 2^63 - 1 that is a function of `seed` and the labels (a step, what is drawn)."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *labels)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def autocast(config: TrainConfig) -> torch.autocast:
    """bf16 where the run wants it. Casts are not kept: samples are made on a thread beside, some without gradients."""
    device = torch.device(config.device).type
    return torch.autocast(device, torch.bfloat16, enabled=config.bf16, cache_enabled=False)


def learning_rate(config: TrainConfig, step: int, spent: float = 0.0) -> float:
    """The rate of step 0, 1, ...: a linear rise over `warmup` steps, then a cosine towards 0 at `steps`.

    `spent` is the share of the time that has passed, where that ends the run; it may end before the rise does.
    """
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    part = max(spent, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def ema_decay(config: TrainConfig, updates: int) -> float:
    """How much of the average an update keeps, after `updates` earlier ones: little at first."""
    return min(config.ema, (1 + updates) / (10 + updates))


def train(task: Task, config: TrainConfig, folder: Path, on_log: Callable[[Record], None] | None = None) -> int:
    """Train from the folder's checkpoint, or from the start if it has none; returns the steps that are done.

    Writes checkpoint.safetensors (at save points and at the end), log.jsonl and loss.png into `folder`; the modules end
    with the trained weights, see `load_ema` for the averaged ones. An exception from `on_log` ends the run at once, and
    the last save point stands. TrainingError for a checkpoint of another run; NumericsError for values that are not
    finite, with nothing saved after the last save point.
    """
    _check_device(config.device)
    figures = curve_figures() if config.curve else None
    folder.mkdir(parents=True, exist_ok=True)
    devices = [config.device] if config.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        run = _Run(task, config, folder)
        run.resume()
        started, limit = time.monotonic(), 60 * (config.minutes or math.inf)
        while run.step < config.steps:
            record = run.advance((time.monotonic() - started) / limit if config.timed else 0.0)
            if record is not None and on_log is not None:
                on_log(record)
            done = run.step == config.steps
            late = config.minutes is not None and time.monotonic() - started >= 60 * config.minutes
            if done or late or run.step % config.save_every == 0:
                run.save()
                if figures is not None:
                    draw_curve(folder, figures)
            if late:
                break
    return run.step


class _Run:
    """The moving parts of a training: parameters, their average, the optimizer, and where the run stands."""

    def __init__(self, task: Task, config: TrainConfig, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder
        for module in task.modules.values():
            module.to(config.device).train()
        self.parameters = _trained(task.modules)
        self.ema = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizers = _optimizers(task.modules, list(self.parameters.values()), config)
        self.step = self.skipped = self.passed = 0  # steps done; how many of them were skipped, and the last in a row
        self.seconds = 0.0  # of training, over all calls

    def advance(self, spent: float = 0.0) -> Record | None:
        """Do one step, `spent` of the run's time having passed; its record where it is logged."""
        config, start = self.config, time.monotonic()
        seed = step_seed(config.seed, self.step)
        torch.manual_seed(seed)
        rate = learning_rate(config, self.step, spent)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate / config.lr
            optimizer.zero_grad()
        with autocast(config):
            loss, parts = self.task.loss(self.step, seed)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), config.clip)
        value, length = loss.item(), norm.item()
        finite = math.isfinite(value) and math.isfinite(length)
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
            decay = ema_decay(config, self.step - self.skipped)
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)
            self.passed = 0
        elif self.passed == config.allowed_skips:
            raise NumericsError(
                f"step {self.step + 1}: got loss {value} and gradient norm {length}, want finite values; "
                "lower lr or clip, and resume from the last save point"
            )
        else:
            self.skipped, self.passed = self.skipped + 1, self.passed + 1
        self.step += 1
        self.seconds += time.monotonic() - start
        if finite and self.step % config.log_every and self.step != config.steps:
            return None
        record = {"step": self.step, "loss": value, **{name: _number(part) for name, part in parts.items()}}
        record |= {"lr": rate, "grad_norm": length, "seconds": round(self.seconds, 3), "skipped": self.skipped}
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        return record

    def identity(self) -> Record:
        """What a checkpoint and the run that resumes it must share, as JSON gives it back."""
        settings = {f"task.{name}": value for name, value in dict(getattr(self.task, "settings", {})).items()}
        shared = {name: value for name, value in {**asdict(self.config), **settings}.items() if name not in FREE}
        return json.loads(json.dumps(shared))

    def save(self) -> None:
        """Write the checkpoint beside the old one, then rename."""
        tensors = {f"model.{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, value in self.parameters.items():
            for optimizer in self.optimizers:
                for key, state in optimizer.state.get(value, {}).items():
                    tensors[f"state.{key}.{name}"] = state
        state = {"step": self.step, "skipped": self.skipped, "passed": self.passed, "seconds": self.seconds}
        metadata = {"swifti2v_training": FORMAT, "state": json.dumps(state), "config": json.dumps(self.identity())}
        path = self.folder / CHECKPOINT
        part = path.with_name(path.name + ".part")
        try:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, part, metadata)
            part.replace(path)
        except (SafetensorError, OSError) as error:
            with suppress(OSError):
                part.unlink()
            raise TrainingError(
                f"{path}: got an error while writing ({error}), want the whole file; free space and resume"
            ) from error

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if there is one, and cut the log to it."""
        path = self.folder / CHECKPOINT
        if path.is_file():
            tensors, metadata = read_checkpoint(path)
            state = json.loads(metadata["state"])
            check_identity(path, json.loads(metadata["config"]), self.identity())
            want = {f"model.{name}": tuple(value.shape) for name, value in self.parameters.items()}
            check_shapes(path, {n: tuple(t.shape) for n, t in tensors.items() if n.startswith("model.")}, want)
            with torch.no_grad():
                for name, value in self.parameters.items():
                    value.copy_(tensors[f"model.{name}"])
                    self.ema[name].copy_(tensors[f"ema.{name}"])
            for optimizer in self.optimizers:
                names = {id(value): name for name, value in self.parameters.items()}
                for value in (value for group in optimizer.param_groups for value in group["params"]):
                    keys = [key for key in STATE_KEYS if f"state.{key}.{names[id(value)]}" in tensors]
                    # AdamW's count of steps stays where the optimizer keeps it, on the CPU.
                    for key in keys:
                        saved = tensors[f"state.{key}.{names[id(value)]}"].clone()
                        optimizer.state[value][key] = saved.to("cpu" if key == "step" else value.device)
            self.step, self.skipped, self.passed = state["step"], state["skipped"], state["passed"]
            self.seconds = state["seconds"]
        log = self.folder / LOG
        kept = [record for record in read_log(self.folder) if record["step"] <= self.step]
        part = log.with_name(log.name + ".part")
        part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        part.replace(log)


def ship(module: nn.Module, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a trained VAE, DiT or word encoder in `dtype` with its config.json; what Wan keeps in fp32 stays fp32."""
    copy = deepcopy(module)
    for name, parameter in copy.named_parameters():
        if not (isinstance(copy, DiT) and stays_fp32(name)):
            parameter.data = parameter.data.to(dtype)
    if isinstance(copy, VAE):
        return save_vae(copy, folder)
    if isinstance(copy, DiT):
        return save_dit(copy, folder)
    if isinstance(copy, WordEncoder):
        return save_words(copy, folder)
    raise TrainingError(f"model: got {type(module).__name__}, want a VAE, DiT or WordEncoder; pass one of them")


def _number(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else float(value)


def _optimizers(
    modules: Mapping[str, nn.Module], parameters: Sequence[nn.Parameter], config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """AdamW, without weight decay on biases and norms; with `config.muon`, Muon for the weights of layers instead."""
    optimizers: list[torch.optim.Optimizer] = []
    if config.muon:
        hidden = layer_weights(modules.values())
        # Its iteration mends its own rounding, and costs as much as the rest of a small step.
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        optimizers.append(Muon(hidden, config.muon, dtype=dtype))
        taken = {id(value) for value in hidden}
        parameters = [value for value in parameters if id(value) not in taken]
    matrices = [value for value in parameters if sum(n > 1 for n in value.shape) > 1]
    chosen = {id(value) for value in matrices}
    others = [value for value in parameters if id(value) not in chosen]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, config.lr, config.betas, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _check_device(device: str) -> None:
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise EnvironmentMismatch(f"device: got {device!r}, want cpu, or cuda where there is a GPU; pass cpu")


def _trained(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """`module.parameter` -> every parameter that requires gradients, each once."""
    found: dict[str, nn.Parameter] = {}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and not any(parameter is other for other in found.values()):
                found[f"{prefix}.{name}"] = parameter
    wrong = [name for name, parameter in found.items() if parameter.dtype != torch.float32]
    if wrong or not found:
        raise TrainingError(
            f"trained parameters: got {len(found)}, {len(wrong)} of them not fp32 {wrong[:3]}, want some and all fp32; "
            "load in fp32 and call requires_grad_(True)"
        )
    return found
