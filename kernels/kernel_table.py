"""What was measured of the kernels on a GPU: attention by shape, every other op beside the eager form it replaces."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from .dispatch import DTYPES, ChoiceTable, lasting

SHORT = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class OpTiming:
    """One op on the shapes of one call: milliseconds of both forms, taken in turns, or why the fused one is refused."""

    op: str
    call: str  # its arguments, as call_text writes them
    gpu: str
    versions: Mapping[str, str]
    eager: tuple[float, ...] = ()
    fused: tuple[float, ...] = ()
    error: float | None = None  # relative, of the fused form from the eager one
    refused: str = ""

    @property
    def lasts(self) -> bool:
        """As `lasting`."""
        return lasting(self.refused)

    @property
    def wins(self) -> bool:
        """Whether the fused form takes no longer, by the medians."""
        if self.refused or not self.eager or not self.fused:
            return False
        return statistics.median(self.fused) <= statistics.median(self.eager)


def choose(timings: Iterable[OpTiming]) -> tuple[tuple[str, str], ...]:
    """The calls whose fused form takes no longer, by op and arguments, in alphabetical order."""
    return tuple(sorted((timing.op, timing.call) for timing in timings if timing.wins))


def call_text(arguments: Iterable[Any]) -> str:
    """Arguments in words, such as `bf16 1x4x101x48, fp32 1x4x48, 1e-06`; calls with equal ones are alike."""
    return ", ".join(_words(argument) for argument in arguments)


def _words(argument: Any) -> str:
    if not isinstance(argument, Tensor):
        return str(argument)
    dtype = SHORT.get(argument.dtype, str(argument.dtype).removeprefix("torch."))
    return f"{dtype} {'x'.join(map(str, argument.shape))}"


@dataclass(frozen=True)
class KernelTable:
    """Measurements of any number of GPUs; adding some gives a new table."""

    attention: ChoiceTable = field(default_factory=ChoiceTable)
    ops: tuple[OpTiming, ...] = ()

    def find(self, op: str, call: str, gpu: str) -> OpTiming | None:
        """What was measured of a call on this GPU, if anything was."""
        return next((timing for timing in self.ops if (timing.op, timing.call, timing.gpu) == (op, call, gpu)), None)

    def add(self, *timings: OpTiming) -> "KernelTable":
        """With these in place of older ones of the same calls and GPU."""
        new = {(timing.op, timing.call, timing.gpu) for timing in timings}
        kept = (timing for timing in self.ops if (timing.op, timing.call, timing.gpu) not in new)
        return KernelTable(self.attention, (*kept, *timings))

    def without_stale(self, gpu: str, versions: Mapping[str, str]) -> "KernelTable":
        """Without what was measured on this GPU with other versions of `installed`."""
        choices = (c for c in self.attention.choices if c.gpu != gpu or c.versions == versions)
        ops = (timing for timing in self.ops if timing.gpu != gpu or timing.versions == versions)
        return KernelTable(ChoiceTable(tuple(choices)), tuple(ops))

    def lasting(self) -> "KernelTable":
        """Without what was refused for want of memory: the next start measures it again."""
        choices = (c for c in self.attention.choices if all(timing.lasts for timing in c.timings))
        return KernelTable(ChoiceTable(tuple(choices)), tuple(timing for timing in self.ops if timing.lasts))

    def to_plain(self) -> dict[str, Any]:
        """Lists, dicts, strings and numbers only, as JSON holds them."""
        return {"attention": self.attention.to_plain(), "ops": [asdict(timing) for timing in self.ops]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "KernelTable":
        """The inverse of to_plain. Raises TypeError or KeyError for anything else."""
        ops = []
        for item in plain["ops"]:
            samples = {form: tuple(map(float, item[form])) for form in ("eager", "fused")}
            ops.append(OpTiming(**{**item, "versions": dict(item["versions"]), **samples}))
        return cls(ChoiceTable.from_plain(plain["attention"]), tuple(ops))
