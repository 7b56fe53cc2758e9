"""Where a front places a request while no scheduler answers: spread, in every way that is allowed, within bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.front.fallback import Own, place_alone
from cluster.scheduler.costs import RequestShape, Rule
from diptych.types import KvLayout, Placement, RequestId, Role, WorkerId, WorkerInfo

SHAPE = RequestShape(request=RequestId("r"), granules=(), prompt_tokens=60, max_tokens=40)
LAYOUT = KvLayout(layers=1, kv_heads=1, block_size=16, head_dim=8, dtype="fp32")


def worker(name: str, *, blocks: int = 100, max_context: int = 1000) -> WorkerInfo:
    roles: dict[str, Role] = {"p": "prefill", "d": "decode", "m": "mixed"}
    return WorkerInfo(
        id=WorkerId(name),
        role=roles[name[0]],
        epoch=0,
        build="b",
        model_digest="d",
        layout=LAYOUT,
        blocks=blocks,
        max_context=max_context,
        device="cpu",
        host="h",
        pid=1,
        threads=1,
    )


def placed(*names: str, how: Rule = "auto", count: int = 1) -> list[tuple[str, str | None, str]]:
    """So many requests, one after the other, as (decode, prefill, how)."""
    workers, own = [worker(name) for name in names], list[Own]()
    for _ in range(count):
        placement = place_alone(SHAPE, workers, own, how)
        if placement is None:
            break
        own.append(Own(placement, SHAPE.context))
    return [(one.placement.decode, one.placement.prefill, one.placement.how) for one in own]


@pytest.mark.parametrize(
    ("names", "how", "where"),
    [
        (("p0", "d0"), "auto", ("d0", "p0", "remote")),
        (("p0", "d0"), "remote", ("d0", "p0", "remote")),
        (("p0", "d0"), "local", ("d0", None, "local")),
        (("d0",), "auto", ("d0", None, "local")),
        (("m0",), "auto", ("m0", None, "mixed")),
        (("m0",), "local", ("m0", None, "mixed")),
        (("p0", "m0"), "auto", ("m0", None, "mixed")),
    ],
)
def test_it_goes_a_way_that_there_is(names: tuple[str, ...], how: Rule, where: tuple[str, str | None, str]) -> None:
    assert placed(*names, how=how) == [where]


@pytest.mark.parametrize(("names", "how"), [((), "auto"), (("p0",), "auto"), (("d0",), "remote")])
def test_where_there_is_no_way_it_waits(names: tuple[str, ...], how: Rule) -> None:
    assert placed(*names, how=how) == []


def test_the_fronts_own_requests_are_spread() -> None:
    decodes, prefills, _ = zip(*placed("p0", "p1", "d0", "d1", "d2", count=6), strict=True)
    assert sorted(decodes) == ["d0", "d0", "d1", "d1", "d2", "d2"]
    assert sorted(prefills) == ["p0"] * 3 + ["p1"] * 3


def test_no_more_is_sent_than_fits() -> None:
    assert len(placed("p0", "d0", "d1", count=100)) == 2 * (100 * 16 // 100)


def test_a_request_longer_than_a_workers_context_does_not_go_there() -> None:
    small, large = worker("d0", max_context=50), worker("d1")
    assert place_alone(SHAPE, [small, large], [], "auto") == Placement(
        decode=large.id,
        prefill=None,
        how="local",
        reason="no scheduler answered: where this front has fewest requests of its own",
    )
    assert place_alone(replace(SHAPE, max_tokens=5000), [small, large], [], "auto") is None
