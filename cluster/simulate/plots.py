"""Results as pictures: distributions of TTFT and ITL, hit rate over time, load of each worker over time.

Knows figures and matplotlib, which is the optional extra `plots`; no simulation.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cluster.simulate.asked import Asked
    from cluster.simulate.compare import Result
    from cluster.simulate.constants import Slo

_INCHES = (8.0, 4.5)
_TALL_INCHES = (8.0, 6.5)
_DOTS = 130
_COLOURS = ("#4c78a8", "#f58518", "#72b7b2", "#e45756", "#b279a2", "#9d755d", "#222222")


class NoPlots(RuntimeError):
    """matplotlib is not installed."""


def write_plots(folder: Path, results: Sequence[Result], slo: Slo) -> list[Path]:
    """The PNGs it wrote. Raises NoPlots, with the way out."""
    figure_of = _figures()
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        _distribution(figure_of, folder / "ttft.png", results, _ttft, "time to first token, seconds", log=True),
        _distribution(
            figure_of,
            folder / "itl.png",
            results,
            _itl,
            "mean time between tokens, ms",
            limit=1000 * slo.mean_itl_seconds,
        ),
        _hit_rates(figure_of, folder / "hits.png", results),
    ]
    return [*written, *(_loads(figure_of, folder, result) for result in results)]


def check_plots() -> None:
    """Raises NoPlots before anybody waits for figures that could not be drawn."""
    _figures()


def _figures() -> Callable[..., Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoPlots("--plot needs matplotlib: pip install 'diptych[plots]', or pip install matplotlib") from error
    return Figure


# ---- figures ---------------------------------------------------------------------------------------


def _distribution(
    figure_of: Callable[..., Any],
    file: Path,
    results: Sequence[Result],
    value: Callable[[Asked], float | None],
    what: str,
    *,
    log: bool = False,
    limit: float | None = None,
) -> Path:
    """Share of requests below each value; those without one are above all."""
    figure, axes = _axes(figure_of)
    highest = 0.0
    for result, style in zip(results, _styles(results), strict=True):
        values = sorted(found for asked in result.run.asked if (found := value(asked)) is not None)
        shares = [100 * (place + 1) / len(result.run.asked) for place in range(len(values))]
        axes.step(values, shares, where="post", label=_label(result), **style)
        highest = max(highest, values[int(0.995 * len(values))] if values else 0.0)
    if limit is not None:
        axes.axvline(limit, color="#888888", linestyle="--", linewidth=1)
        axes.annotate(f"SLO {limit:g}", (limit, 3), textcoords="offset points", xytext=(4, 0), color="#666666")
        axes.set_xlim(0, max(highest, 1.2 * limit))
    if log:
        axes.set_xscale("log")
    axes.set(xlabel=what, ylabel="requests, %", ylim=(0, 101))
    return _save(figure, axes, file)


def _hit_rates(figure_of: Callable[..., Any], file: Path, results: Sequence[Result]) -> Path:
    """Of the requests that arrived within a twentieth of the run."""
    figure, axes = _axes(figure_of)
    for result, style in zip(results, _styles(results), strict=True):
        axes.plot(*zip(*_hits_over_time(result.run.asked), strict=True), label=_label(result), **style)
    axes.set(xlabel="arrival, share of the trace, %", ylabel="prompt tokens found cached, %", ylim=(0, None))
    return _save(figure, axes, file)


def _hits_over_time(asked: Sequence[Asked]) -> Iterator[tuple[float, float]]:
    width = max(1, len(asked) // 20)
    for start in range(0, len(asked), width):
        window = asked[start : start + width]
        prompt_tokens = sum(one.content.prompt_tokens for one in window)
        middle = 100 * (start + len(window) / 2) / len(asked)
        yield middle, 100 * sum(one.cached_tokens for one in window) / prompt_tokens


def _loads(figure_of: Callable[..., Any], folder: Path, result: Result) -> Path:
    """A line for each worker: what it has to compute, and how many it decodes."""
    figure = figure_of(figsize=_TALL_INCHES, dpi=_DOTS, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    looks, workers = result.run.looks, result.run.workers
    times = [look.at for look in looks]
    computing = [place for place, worker in enumerate(workers) if worker.role != "decode"]
    decoding = [place for place, worker in enumerate(workers) if worker.role != "prefill"]
    _lines(above, times, [[look.waiting_tokens[place] / 1000 for look in looks] for place in computing])
    _lines(below, times, [[float(look.running[place]) for look in looks] for place in decoding])
    above.set(ylabel="1,000 prompt tokens to compute\nby each prefill worker", title=_label(result))
    below.set(xlabel="seconds", ylabel="sequences decoding\non each decode worker")
    for axes in (above, below):
        _plain(axes)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize="small", loc="upper right")
    file = folder / f"load-{re.sub('[^a-z0-9.]+', '-', _label(result).lower())}.png"
    figure.savefig(file)
    return file


def _lines(axes: Any, times: Sequence[float], loads: Sequence[Sequence[float]]) -> None:  # noqa: ANN401
    """Each worker's, and what they amount to."""
    for load in loads:
        axes.plot(times, load, linewidth=0.6, color="#4c78a8", alpha=0.35)
    axes.plot([], [], linewidth=0.6, color="#4c78a8", label="a worker")
    means = [sum(at) / len(at) for at in zip(*loads, strict=True)] if loads else [0.0] * len(times)
    axes.plot(times, means, linewidth=1.8, color="#222222", label="mean")


# ---- parts -----------------------------------------------------------------------------------------


def _axes(figure_of: Callable[..., Any]) -> tuple[Any, Any]:
    figure = figure_of(figsize=_INCHES, dpi=_DOTS, layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axes: Any, file: Path) -> Path:  # noqa: ANN401  (matplotlib's)
    _plain(axes)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(file)
    return file


def _plain(axes: Any) -> None:  # noqa: ANN401  (matplotlib's)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _styles(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """A colour for each policy, a line for each of its speeds; ours is drawn boldest."""
    policies = list(dict.fromkeys(result.policy for result in results))
    drawn: dict[str, int] = {}
    for result in results:
        turn = drawn[result.policy] = drawn.get(result.policy, -1) + 1
        ours = result.policy == "ours"
        yield {
            "color": _COLOURS[-1] if ours else _COLOURS[policies.index(result.policy) % (len(_COLOURS) - 1)],
            "linestyle": ("-", "--", ":", "-.")[turn % 4],
            "linewidth": 2.0 if ours else 1.2,
        }


def _label(result: Result) -> str:
    return f"{result.policy} {result.speed:.4g}x"


def _ttft(asked: Asked) -> float | None:
    return asked.ttft_seconds


def _itl(asked: Asked) -> float | None:
    return None if asked.itl_seconds is None else 1000 * asked.itl_seconds
