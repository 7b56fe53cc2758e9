"""What a run amounts to: goodput, percentiles, hits, balance. Knows requests that ended, no events."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.simulate.asked import Asked
    from cluster.simulate.constants import Slo
    from cluster.simulate.run import Run
    from diptych.types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Shares are 0 … 1, times seconds."""

    requests: int
    goodput: float
    """Share of requests with both TTFT and mean ITL within the SLO."""
    ttft_missed: float
    """Share of requests whose first token came too late or never."""
    itl_missed: float
    rejected: float
    hit_rate: float
    """Prompt tokens not computed by whoever computed the prompt."""
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    how: dict[str, int]
    """How often each way was chosen."""
    sent_bytes: int
    unsent_bytes: int
    """KV of prompts computed where they are decoded: not sent."""
    decode_load: float
    """Tokens generated, most of a decoding worker over least."""
    decode_requests: float
    """Requests, most of a decoding worker over least."""
    prefill_load: float
    """Prompt tokens computed, most of a prefill worker over mean."""
    busy: dict[str, float]
    """Share of the run that the workers of each role computed; 0 where there are none."""


def summarise(run: Run, slo: Slo, kv_bytes_per_token: int) -> Summary:
    """Of all requests."""
    asked = run.asked
    ways = Counter(each.placement.how for each in asked if each.placement)
    alone = [each for each in asked if each.placement and each.placement.how != "remote"]
    prompt_tokens = sum(each.content.prompt_tokens for each in asked)
    ttft = sorted(each.ttft_seconds for each in asked if each.ttft_seconds is not None)
    itl = sorted(each.itl_seconds for each in asked if each.itl_seconds is not None)
    count = len(asked)
    return Summary(
        requests=count,
        goodput=sum(is_good(each, slo) for each in asked) / count,
        ttft_missed=sum(not _spoke_in_time(each, slo) for each in asked) / count,
        itl_missed=sum((each.itl_seconds or 0.0) > slo.mean_itl_seconds for each in asked) / count,
        rejected=sum(bool(each.error) for each in asked) / count,
        hit_rate=sum(each.cached_tokens for each in asked) / prompt_tokens,
        ttft_p50=percentile(ttft, 50),
        ttft_p99=percentile(ttft, 99),
        itl_p50=percentile(itl, 50),
        itl_p99=percentile(itl, 99),
        how={how: ways[how] for how in ("remote", "local", "mixed") if ways[how]},
        sent_bytes=sum(each.sent_bytes for each in asked),
        unsent_bytes=kv_bytes_per_token * sum(each.content.prompt_tokens for each in alone),
        decode_load=_spread(_emitted(run)),
        decode_requests=_spread(_decoded(run)),
        prefill_load=_peak(_computed(run)),
        busy=_busy(run),
    )


def is_good(asked: Asked, slo: Slo) -> bool:
    """Answered whole, in time and fast enough; an answer of one token has no ITL."""
    return not asked.error and _spoke_in_time(asked, slo) and (asked.itl_seconds or 0.0) <= slo.mean_itl_seconds


def _spoke_in_time(asked: Asked, slo: Slo) -> bool:
    return asked.ttft_seconds is not None and asked.ttft_seconds <= slo.ttft_limit(asked.content.prompt_tokens)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The least of these that so many percent don't exceed; 0 of none."""
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0


def _emitted(run: Run) -> list[float]:
    return [count for worker, count in zip(run.workers, run.tokens_emitted, strict=True) if worker.role != "prefill"]


def _decoded(run: Run) -> list[float]:
    count = Counter(each.placement.decode for each in run.asked if each.placement)
    return [count[worker.id] for worker in run.workers if worker.role != "prefill"]


def _computed(run: Run) -> list[float]:
    roles: tuple[Role, ...] = ("prefill", "mixed")
    tokens: Counter[str] = Counter()
    for each in run.asked:
        if each.placement:
            tokens[each.placement.prefill or each.placement.decode] += each.computed_tokens
    return [tokens[worker.id] for worker in run.workers if worker.role in roles]


def _busy(run: Run) -> dict[str, float]:
    roles: tuple[Role, ...] = ("prefill", "decode", "mixed")
    shares: dict[str, float] = {}
    for role in roles:
        seconds = [busy for worker, busy in zip(run.workers, run.busy_seconds, strict=True) if worker.role == role]
        shares[role] = sum(seconds) / (len(seconds) * run.seconds) if seconds and run.seconds else 0.0
    return shares


def _spread(loads: Sequence[float]) -> float:
    return max(loads) / min(loads) if loads and min(loads) else float("inf")


def _peak(loads: Sequence[float]) -> float:
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 0.0
