"""From the command to the first token, the model on disk: ours and `vllm serve` in turn, `make bench-cold`."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import defaultdict

from endpoints import endpoint
from open_loop import Endpoint, Wanted
from results import figure, report


async def first_token(http: str) -> float:
    """When it came."""
    async with Endpoint(http) as server:
        said = await server.ask(Wanted(0.0, 32, 2), 1)
    if said.error:
        raise SystemExit(said.error)
    return said.came[0]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--servers", default="disaggregated;vllm")
    given = asked.parse_args()
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(given.rounds):
        for name in given.servers.split(";"):
            began = time.perf_counter()
            with endpoint(name) as http:
                seconds[name].append(asyncio.run(first_token(http)) - began)
            print(f"{name}: {seconds[name][-1]:.1f} s")
    report("cold", [figure(name, "command to first token", "s", took) for name, took in seconds.items()])


if __name__ == "__main__":
    main()
