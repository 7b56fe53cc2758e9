"""The block pool: any history of owners leaves every block in exactly one place."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from diptych.types import BlockHash, BlockId, Evicted, KvEvent, Stored
from workers.engine.blocks import BlockPool

SIZE = 7
sequences = st.sampled_from(["r1", "r2", "r3"])
tickets = st.sampled_from(["t1", "t2"])
counts = st.integers(0, SIZE + 1)
# Chains that branch: a name tells its whole prefix, as the real ones do.
chains = st.sampled_from([tuple(BlockHash(text[:end].encode()) for end in (1, 2, 3)) for text in ("aaa", "aab", "abc")])


def fold(known: set[BlockHash], events: list[KvEvent]) -> set[BlockHash]:
    for event in events:
        match event:
            case Stored(hashes):
                known = known | set(hashes)
            case Evicted(hashes):
                known = known - set(hashes)
            case _:
                raise AssertionError(event)
    return known


class Histories(RuleBasedStateMachine):
    """Sequences and tickets come and go in any order; a listener folds the events."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(SIZE)
        self.known: set[BlockHash] = set()
        self.taken = [0] * SIZE
        self.held: dict[str, list[BlockId]] = {}

    def note(self, owner: str, blocks: list[BlockId] | None, *, fresh: bool) -> None:
        if blocks:
            self.held.setdefault(owner, []).extend(blocks)
            for block in blocks if fresh else ():
                self.taken[block] += 1

    @rule(owner=sequences, chain=chains)
    def prefill(self, owner: str, chain: tuple[BlockHash, ...]) -> None:
        self.pool.release(owner)
        self.held.pop(owner, None)
        expected = self.pool.match(chain)
        reused = self.pool.acquire(chain, owner)
        assert len(reused) == expected
        self.note(owner, reused, fresh=False)
        rest = self.pool.take(len(chain) - expected, owner)
        self.note(owner, rest, fresh=True)
        for block, name in zip(rest or [], chain[expected:], strict=bool(rest)):
            self.pool.name(block, name, owner)

    @rule(owner=sequences, count=counts)
    def grow(self, owner: str, count: int) -> None:
        available = self.pool.available
        blocks = self.pool.take(count, owner)
        assert (blocks is None) == (count > available)
        self.note(owner, blocks, fresh=True)

    @rule(ticket=tickets, count=counts)
    def grant(self, ticket: str, count: int) -> None:
        self.note(ticket, self.pool.grant(count, ticket), fresh=True)

    @rule(ticket=tickets, owner=sequences)
    def commit(self, ticket: str, owner: str) -> None:
        if self.pool.kind(ticket) == "ticket":
            self.note(owner, self.pool.commit(ticket, owner), fresh=False)
            del self.held[ticket]

    @rule(owner=sequences, kind=st.sampled_from(["sequence", "lease"]))
    def retag(self, owner: str, kind: str) -> None:
        self.pool.retag(owner, "lease" if kind == "lease" else "sequence")

    @rule(owner=sequences | tickets)
    def release(self, owner: str) -> None:
        assert self.pool.release(owner) == len(self.held.pop(owner, []))

    @rule(owner=sequences, keep=st.integers(0, 3))
    def release_tail(self, owner: str, keep: int) -> None:
        if owner in self.held:
            self.pool.release_blocks(self.held[owner][keep:], owner)
            self.held[owner] = self.held[owner][:keep]
            if not self.held[owner]:
                del self.held[owner]

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert self.pool.cached == 0

    @rule()
    def listen(self) -> None:
        self.known = fold(self.known, self.pool.events())
        assert self.known == set(self.pool.snapshot())

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        self.pool.check()
        pool = self.pool
        assert pool.free + pool.cached + pool.held + pool.granted + pool.lent == SIZE
        assert {owner: pool.blocks_of(owner) for owner in pool.owners()} == self.held
        assert [pool.generation(BlockId(block)) for block in range(SIZE)] == self.taken

    def teardown(self) -> None:
        for owner in self.pool.owners():
            self.pool.release(owner)
        self.pool.check()
        assert self.pool.available == SIZE, "leaked"


def _settings(histories: int) -> settings:
    return settings(
        max_examples=histories, stateful_step_count=10, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


@pytest.mark.parametrize("histories", [1_500, pytest.param(5_000, marks=pytest.mark.full)])
def test_any_history_leaves_every_block_in_one_place(histories: int) -> None:
    run_state_machine_as_test(Histories, settings=_settings(histories))  # pyright: ignore[reportUnknownMemberType]
