"""What a benchmark found, as a table for a person and as `.bench/NAME.json`. Knows no benchmark."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The median of `n` measurements, and how far they lie apart."""

    case: str
    metric: str
    value: float
    unit: str
    low: float
    high: float
    n: int


def figure(case: str, metric: str, unit: str, measured: Sequence[float]) -> Figure:
    """Median, least and greatest of what was measured."""
    return Figure(
        case=case,
        metric=metric,
        value=median(measured),
        unit=unit,
        low=min(measured),
        high=max(measured),
        n=len(measured),
    )


def report(name: str, figures: Sequence[Figure]) -> None:
    """Prints the table and writes the file: a list of figures, each with the hardware and the commit beside it."""
    table = Table("case", "metric", title=name, box=None, title_justify="left")
    for column in ("median", "low", "high", "n"):
        table.add_column(column, justify="right")
    for one in figures:
        numbers = (f"{number:.4g}" for number in (one.value, one.low, one.high))
        table.add_row(one.case, f"{one.metric} [{one.unit}]", *numbers, str(one.n))
    Console(highlight=False, markup=False).print(table)
    where = {"hardware": hardware(), "commit": commit()}
    file = ROOT / ".bench" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps([{**asdict(one), **where} for one in figures], indent=1) + "\n")
    print(f"\n{where['hardware']}, commit {where['commit']}; written to {file.relative_to(ROOT)}")


def hardware() -> str:
    """As in "2 cores, AMD EPYC 9V74"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores, {names[0] if names else platform.machine()}"


def commit() -> str:
    """The tree's commit, marked when files differ from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or "unknown"
