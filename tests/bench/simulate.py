"""What placement is worth: the highest speed of a real trace that each policy bears, the others at their best weights.

    python -m tests.bench.simulate [--requests N]      (`make bench-simulate`)

Virtual time: figures don't depend on the machine, only on code and seed. Needs ../shared/traces and ../shared/tools.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.simulate.compare import POLICIES, Comparison, Result, compare
from cluster.simulate.constants import read_constants
from cluster.simulate.readers import read_trace
from cluster.simulate.tables import against, result_table, weights_used
from tests.bench.results import ROOT, Figure, figure, report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OTHERS = ("round_robin", "least_loaded", "queue_plus_uncached", "dynamo", "llm-d")
STARVED = "single-turn:512"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="the folder of traces and tools")
    parser.add_argument("--requests", type=int, help="only so many of the trace")
    parser.add_argument("--policies", default=",".join((*OTHERS, "ours")))
    args = parser.parse_args()
    trace, constants = args.shared / "traces/mooncake_conversation.jsonl", args.shared / "tools/pd_constants.json"
    if not trace.exists() or not constants.exists():
        sys.exit(f"MISSING {trace} or {constants}: nothing was measured")
    read = read_trace(str(trace))
    read = (read.head(args.requests) if args.requests else read).spread(seed=0)
    rates = read_constants(str(constants))
    comparison = Comparison(trace=read, constants=rates, tell=_tell)
    results = list(compare(comparison, args.policies.split(","), (), highest=True, tune=True))
    starved = _starved()
    _print([*results, starved])
    report("simulate", [*_figures(results), *_starvation(starved)])


def _starved() -> Result:
    """1 prefill and 5 decode workers under 512 requests that share nothing."""
    constants = read_constants(None, {"workers.prefill": "1", "workers.decode": "5"})
    comparison = Comparison(trace=read_trace(STARVED), constants=constants, tell=_tell)
    return comparison.at(POLICIES["ours"], 1.0)


def _print(results: Sequence[Result]) -> None:
    console = Console(width=200, highlight=False)
    console.print(result_table(results))
    console.print(*weights_used(results), *against(results), sep="\n", markup=False)


def _figures(results: Sequence[Result]) -> Iterator[Figure]:
    speeds = {result.policy: result.speed for result in results}
    for result in results:
        yield figure(result.policy, "highest speed", "x", [result.speed])
        yield figure(result.policy, "hit rate", "%", [100 * result.summary.hit_rate])
        yield figure(result.policy, "KV sent", "GB", [result.summary.sent_bytes / 1e9])
        for how, count in result.summary.how.items():
            yield figure(result.policy, how, "requests", [count])
    ours = speeds.pop("ours", None)
    if ours and speeds:
        yield figure("ours", "speed over the best of the others", "x", [ours / max(speeds.values())])
        if "round_robin" in speeds:
            yield figure("ours", "speed over round_robin", "x", [ours / speeds["round_robin"]])


def _starvation(result: Result) -> Iterator[Figure]:
    yield figure("1 P + 5 D, 512 single turns", "decode load, max/min", "x", [result.summary.decode_load])
    yield figure("1 P + 5 D, 512 single turns", "decode requests, max/min", "x", [result.summary.decode_requests])


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
