"""What a KV transfer costs, as ratios of one run: links beside the plainest copies, what of a transfer is not hidden
behind the prefill, and what it costs those who decode meanwhile.

make bench-transfer                  all of it
make bench-transfer ARGS=mapped      only that link's hand-offs; also links (nothing else), gloo
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import tempfile
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

import torch

from cluster.cache import cache_folder
from cluster.models import DEFAULT_MODEL, resolve
from diptych.types import Request, WorkerId, WorkerSpec
from tests.bench import timed_worker
from tests.bench.link_rates import rates
from tests.bench.results import Figure, figure, report
from tests.bench.timed_worker import RATE_FILE, Noted
from tests.workers.conftest import prompt_of, request_of
from tests.workers.crashes import conftest as crashes
from tests.workers.crashes.conftest import Member, Society

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROMPT_TOKENS, CHUNK_TOKENS = 2048, 512
RUNS, THROTTLED_RUNS, PAIRS = 5, 3, 7
STREAMS, BESIDE_TOKENS = 4, 1024
SEEDS = iter(range(1_000_000))


def main() -> None:
    parts = sys.argv[1:] or ["links", "mapped", "gloo"]
    figures: list[Figure] = []
    for part in parts:
        figures += rates() if part == "links" else asyncio.run(_with_workers(part))
        report("transfer", figures)


async def _with_workers(link: str) -> list[Figure]:
    async with _workers(link) as (society, prefill, decode, rate):
        await _hand_off(society, prefill, decode)  # what comes once: pages, pairs
        figures, prefill_seconds, nbytes = await _unthrottled(link, society, prefill, decode)
        rate.write_text(str(nbytes / (prefill_seconds / 2)))
        figures += await _throttled(link, society, prefill, decode, nbytes / (prefill_seconds / 2))
        rate.write_text("0")
        for one in figures:
            print(f"  {one.case}: {one.metric}: {one.value:.3f} ({one.low:.3f} to {one.high:.3f})")
        return figures + await _beside_decodes(link, society, prefill, decode)


@asynccontextmanager
async def _workers(link: str) -> AsyncIterator[tuple[Society, Member, Member, Path]]:
    spec = WorkerSpec(
        id=WorkerId("p"),
        role="mixed",
        epoch=0,
        model=resolve(DEFAULT_MODEL, progress=print),
        dtype="bf16",
        block_size=16,
        memory_bytes=600 << 20,
        max_batch_tokens=CHUNK_TOKENS,
        max_running=16,
        threads=1,
        device="cpu",
        host="127.0.0.1",
        link=link,  # type: ignore[arg-type]
        wire="native",
        verify="sample",
        secret=b"s" * 16,
        lease_seconds=20.0,
        cache=str(cache_folder() / "weights"),
    )
    with tempfile.TemporaryDirectory() as folder:
        rate = Path(folder) / "rate"
        rate.write_text("0")
        os.environ[RATE_FILE] = str(rate)
        crashes.serve = timed_worker.serve
        society = Society(multiprocessing.get_context("spawn"), spec, Path(folder))  # type: ignore[arg-type]
        try:
            prefill, decode = await asyncio.gather(society.start("p"), society.start("d"))
            await asyncio.gather(society.meet(prefill, decode), society.meet(decode, prefill))
            yield society, prefill, decode, rate
        finally:
            await society.close()


def _request(max_tokens: int, length: int = PROMPT_TOKENS) -> Request:
    return request_of(prompt_of(length, seed=next(SEEDS)), max_tokens=max_tokens, fingerprint=False)


async def _hand_off(
    society: Society, prefill: Member, decode: Member, max_tokens: int = 2
) -> tuple[list[Noted], list[Noted], Request]:
    """One prompt across: what prefill and decode noted."""
    for member in (prefill, decode):
        await member.line.take_notes()
    request = await society.submit(_request(max_tokens), decode, prefill)
    await society.answer(request)
    assert society.front.served(request.id).how == "remote"
    return await prefill.line.take_notes(), await decode.line.take_notes(), request


def _of(notes: list[Noted], what: str) -> list[Noted]:
    return [note for note in notes if note.what == what]


async def _unthrottled(link: str, society: Society, prefill: Member, decode: Member) -> tuple[list[Figure], float, int]:
    exposed, seconds, nbytes = [], [], 0
    for _ in range(RUNS):
        ours, theirs, request = await _hand_off(society, prefill, decode)
        steps = [note for note in _of(ours, "step") if note.size]
        seconds.append(steps[-1].ended - steps[0].begun)
        exposed.append((_of(theirs, "join")[0].ended - steps[-1].ended) / seconds[-1])
        nbytes = society.front.served(request.id).kv_bytes_sent
    case = f"{link}, {PROMPT_TOKENS} tokens"
    figures = [
        figure(case, "prefill", "s", seconds),
        figure(case, "exposed / prefill, at most 0.03", "", exposed),
    ]
    return figures, median(seconds), nbytes


async def _throttled(link: str, society: Society, prefill: Member, decode: Member, rate: float) -> list[Figure]:
    early, exposed = [], []
    for _ in range(THROTTLED_RUNS):
        ours, theirs, _request = await _hand_off(society, prefill, decode)
        steps = [note for note in _of(ours, "step") if note.size]
        lands, joined = _of(theirs, "land"), _of(theirs, "join")[0]
        end = steps[-1].ended
        early.append(sum(land.ended <= end for land in lands) / (len(lands) - 1))
        exposed.append((joined.ended - end) / (lands[-1].size / rate))
    print(f"{link}, the wire's time half of the prefill's: milliseconds after the prefill began")
    for at, (step, receive, land) in enumerate(zip(steps, _of(theirs, "receive"), lands, strict=True)):
        at_ms = [1e3 * (each - steps[0].begun) for each in (step.begun, step.ended, receive.begun, land.ended)]
        print("  chunk {}: computed {:6.0f} to {:6.0f}, on the wire from {:6.0f}, landed {:6.0f}".format(at, *at_ms))
    print(f"  decode can run at {1e3 * (joined.ended - steps[0].begun):6.0f}")
    case = f"{link}, wire time half of prefill"
    return [
        figure(case, "chunks landed before prefill ends, of all but the last: 1", "", early),
        figure(case, "exposed / wire time of the last chunk, at most 1.05", "", exposed),
    ]


async def _beside_decodes(link: str, society: Society, prefill: Member, decode: Member) -> list[Figure]:
    """Prompts computed elsewhere while streams decode here: handed over (b), or answered there (a, another a)."""
    streams = [await society.submit(_request(4000, 64), decode, None) for _ in range(STREAMS)]
    await society.front.wait_for(lambda: all(society.front.count(each.id) > 8 for each in streams))
    itl: dict[str, list[float]] = {"a": [], "b": [], "another a": []}
    waited, shares = 0, []
    for number in range(PAIRS):
        names = ("a", "b", "another a") if number % 2 else ("another a", "b", "a")
        for name in names:
            await decode.line.take_notes()
            request = await society.submit(_request(2 if name == "b" else 1, BESIDE_TOKENS), decode, prefill)
            await society.answer(request)
            notes = await decode.line.take_notes()
            steps = [note for note in _of(notes, "step") if note.decodes]
            gaps = [later.ended - step.ended for step, later in pairwise(steps)]
            itl[name].append(quantiles(gaps, n=100)[98])
            if name == "b":
                received = _of(notes, "receive")
                waited += sum(note.thread == steps[0].thread for note in received)
                cpu = sum(note.cpu_seconds for note in (*received, *_of(notes, "land")))
                shares.append(cpu / sum(note.cpu_seconds for note in steps))
    for stream in streams:
        await decode.line.cancel(stream.id, 0)
    case = f"{link}, {STREAMS} streams decode beside"
    pairs = list(zip(itl["a"], itl["b"], itl["another a"], strict=True))
    return [
        figure(case, "decode steps that waited on a receive: 0", "", [waited]),
        figure(case, "receive CPU / step CPU, at most 0.02", "", shares),
        figure(case, "ITL p99, receiving / not", "", [b / a for a, b, _ in pairs]),
        figure(case, "ITL p99, not receiving / not", "", [other / a for a, _, other in pairs]),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
