"""Now against an earlier record: an interval on the ratio of every time, and which ones have got worse."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import MediaError, ProfileError
from .statistics import Interval, ratio_of_medians

TOLERANCE = 0.05  # a time within 5 % of the earlier one is no regression, however sure
COHORT = ("device", "profile", "case", "clock")  # what must be equal for times to be comparable


@dataclass(frozen=True)
class Change:
    """The time of one row over its earlier one."""

    name: str
    variant: str
    ratio: Interval

    @property
    def regressed(self) -> bool:
        """Whether it is slower by more than the tolerance, with 95 %."""
        return self.ratio.low is not None and self.ratio.low > 1 + TOLERANCE

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "variant": self.variant,
            "time_vs_baseline": self.ratio.as_json(),
            "regressed": self.regressed,
        }


def read_record(path: Path) -> dict[str, Any]:
    """A record that an earlier run wrote. MediaError for any other file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MediaError(f"record {path}: got '{error}', want one that --json wrote; check the path") from error
    if not isinstance(record, dict) or record.get("format") != 1 or "rows" not in record:
        raise MediaError(f"record {path}: got another JSON file, want one that --json wrote; check the path")
    return record


def compare(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[Change]:
    """The change of every row that both have. ProfileError where they were not measured alike, or too few times."""
    for name, (a, b) in _cohorts(now, before).items():
        if a != b:
            raise ProfileError(f"baseline {name}: got {b}, want {a} as now; compare with a record made alike")
    earlier = {(row["name"], row["variant"]): row["samples"] for row in before["rows"]}
    changes = []
    for row in now["rows"]:
        old = earlier.get((row["name"], row["variant"]))
        if old is None or min([*old, *row["samples"]]) <= 0:  # what is left over may be nothing
            continue
        ratio = ratio_of_medians(old, row["samples"])
        if ratio.low is None:
            raise ProfileError(
                f"baseline: got {len(old)} and {len(row['samples'])} runs, want 7 or more of each for an interval; "
                "pass --runs 7"
            )
        changes.append(Change(row["name"], row["variant"], ratio))
    if not changes:
        raise ProfileError("baseline: got no row in common, want at least one; pass the same variants")
    return changes


def _cohorts(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    def facts(record: Mapping[str, Any]) -> dict[str, Any]:
        device = record["identity"]["device"]
        return {
            "case": record["case"],
            "profile": record["profile"],
            "device": (device["name"], device.get("threads")),
            "clock": record["timer"]["clock"],
        }

    a, b = facts(now), facts(before)
    return {name: (a[name], b[name]) for name in COHORT}
