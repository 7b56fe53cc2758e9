"""The prefix index against a naive model, and its few exact promises."""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.scheduler.prefix_index import PrefixIndex
from diptych.hashing import block_hashes
from diptych.types import BlockHash, Cleared, Evicted, Stored, WorkerId

A, B, C = (WorkerId(name) for name in "abc")
SIZES = {A: 16, B: 16, C: 32}
CHAINS = [
    tuple(BlockHash(text[: end + 1].encode()) for end in range(len(text))) for text in ("aaaaaaaa", "aaaabbbb", "abcd")
]
ALL = sorted({name for chain in CHAINS for name in chain})

workers = st.sampled_from([A, B, C])
names = st.lists(st.sampled_from(ALL), max_size=6).map(tuple)


def granules(text: str) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(letter.encode()) for letter in text)


class AgainstDictOfSets(RuleBasedStateMachine):
    """Whatever workers say in whatever order, the index answers as a dict of sets would."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.model: dict[WorkerId, set[BlockHash]] = {}

    @rule(worker=workers)
    def join_or_leave(self, worker: WorkerId) -> None:
        if self.model.pop(worker, None) is None:
            self.index.add(worker, SIZES[worker])
            self.model[worker] = set()
        else:
            self.index.drop(worker)

    @rule(worker=workers, hashes=names | st.sampled_from(CHAINS))
    def store(self, worker: WorkerId, hashes: tuple[BlockHash, ...]) -> None:
        if worker in self.model:
            self.index.apply(worker, Stored(hashes))
            self.model[worker] |= set(hashes)

    @rule(worker=workers, hashes=names)
    def evict(self, worker: WorkerId, hashes: tuple[BlockHash, ...]) -> None:
        if worker in self.model:
            self.index.apply(worker, Evicted(hashes))
            self.model[worker] -= set(hashes)

    @rule(worker=workers, chain=st.sampled_from(CHAINS), size=st.integers(1, 3), first=st.integers(0, 3))
    def store_by_pieces(self, worker: WorkerId, chain: tuple[BlockHash, ...], size: int, first: int) -> None:
        for at in range(first, len(chain), size):
            self.store(worker, chain[at : at + size])

    @rule(worker=workers, chain=st.sampled_from(CHAINS), size=st.integers(1, 3), left=st.integers(0, 3))
    def evict_by_pieces(self, worker: WorkerId, chain: tuple[BlockHash, ...], size: int, left: int) -> None:
        """A worker evicts a chain's end first."""
        for at in reversed(range(left, len(chain), size)):
            self.evict(worker, chain[at : at + size])

    @rule(worker=workers)
    def clear(self, worker: WorkerId) -> None:
        if worker in self.model:
            self.index.apply(worker, Cleared())
            self.model[worker].clear()

    @invariant()
    def answers_agree(self) -> None:
        self.index.check()
        assert len(self.index) == len({name for held in self.model.values() for name in held})
        for chain in CHAINS:
            assert self.index.longest_prefix(chain) == self.naive(chain)

    def naive(self, chain: tuple[BlockHash, ...]) -> dict[WorkerId, int]:
        tokens: dict[WorkerId, int] = {}
        for worker, held in self.model.items():
            for depth, name in enumerate(block_hashes(chain, SIZES[worker]), start=1):
                if name not in held:
                    break
                tokens[worker] = depth * SIZES[worker]
        return tokens


TestAgainstDictOfSets = AgainstDictOfSets.TestCase
TestAgainstDictOfSets.settings = settings(max_examples=300, stateful_step_count=15, deadline=None)


def test_a_hit_ends_at_the_first_block_a_worker_lacks() -> None:
    index = PrefixIndex()
    index.add(A, 16)
    index.apply(A, Stored(granules("abd")))
    assert index.longest_prefix(granules("abcd")) == {A: 32}


def test_a_block_of_two_granules_is_found_by_the_name_of_its_second() -> None:
    index = PrefixIndex()
    index.add(A, 16)
    index.add(B, 32)
    index.apply(A, Stored(granules("abc")))
    index.apply(B, Stored(granules("b")))
    assert index.longest_prefix(granules("abc")) == {A: 48, B: 32}


def test_a_worker_of_another_block_size_is_no_holder_of_a_block_that_shares_a_name() -> None:
    index = PrefixIndex()
    index.add(A, 16)
    index.add(B, 32)
    index.apply(A, Stored(granules("b")))
    assert index.longest_prefix(granules("ab")) == {}


def test_a_departed_workers_bit_goes_to_the_next_without_its_blocks() -> None:
    index = PrefixIndex()
    index.add(A, 16)
    index.apply(A, Stored(granules("ab")))
    index.drop(A)
    assert len(index) == 0
    index.add(B, 16)
    index.check()
    assert index.longest_prefix(granules("ab")) == {}


class CountedName(bytes):
    """A block name that notes each time it is looked up."""

    looked_up = 0

    def __hash__(self) -> int:
        self.looked_up += 1
        return super().__hash__()


@pytest.mark.parametrize("workers", [2, 64])
def test_following_a_chain_looks_up_no_block_twice_however_many_workers_hold_it(workers: int) -> None:
    index = PrefixIndex()
    chain = granules("abcdefgh")
    for number in range(workers):
        index.add(WorkerId(str(number)), 16)
        index.apply(WorkerId(str(number)), Stored(chain[: 4 + number % 2]))
        index.apply(WorkerId(str(number)), Stored(chain[4:]))
    counted = [CountedName(name) for name in chain]
    assert len(index.longest_prefix([BlockHash(name) for name in counted])) == workers
    assert sum(name.looked_up for name in counted) <= 3, "a step for each stretch that is stored alike"


def test_blocks_that_came_one_by_one_are_found_in_one_step_once_a_prompt_had_them_in_a_row() -> None:
    index = PrefixIndex()
    mixed = [granules("abcdefgh"), granules("stuvwxyz")]
    for worker in (A, B):
        index.add(worker, 16)
        for both in zip(*mixed, strict=True):
            index.apply(worker, Stored(both))
    assert index.longest_prefix(mixed[0]) == {A: 128, B: 128}
    index.check()
    counted = [CountedName(name) for name in mixed[0]]
    assert index.longest_prefix([BlockHash(name) for name in counted]) == {A: 128, B: 128}
    assert sum(name.looked_up for name in counted) == 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_chain_that_two_workers_stored_by_pieces_is_found_in_few_steps_at_once(size: int) -> None:
    index = PrefixIndex()
    chains = [granules(text) for text in ("abcdefghijk", "lmnopqrstuv")]
    for chain, worker in product(chains, (A, B)):
        if worker not in index:
            index.add(worker, 16)
        for at in range(0, len(chain), size):
            index.apply(worker, Stored(chain[at : at + size]))
    index.check()
    for chain in chains:
        counted = [CountedName(name) for name in chain]
        assert index.longest_prefix([BlockHash(name) for name in counted]) == {A: 176, B: 176}
        assert sum(name.looked_up for name in counted) <= 2


def test_a_chain_that_left_one_worker_by_pieces_is_whole_at_the_other() -> None:
    index = PrefixIndex()
    chain = granules("abcdefghijk")
    for worker in (A, B):
        index.add(worker, 16)
        index.apply(worker, Stored(chain))
    for at in reversed(range(len(chain))):
        index.apply(B, Evicted(chain[at : at + 1]))
    index.check()
    counted = [CountedName(name) for name in chain]
    assert index.longest_prefix([BlockHash(name) for name in counted]) == {A: 176}
    assert sum(name.looked_up for name in counted) <= 2


def test_chains_that_part_inside_what_was_stored_at_once_are_told_apart() -> None:
    index = PrefixIndex()
    index.add(A, 16)
    index.apply(A, Stored(granules("abcdefgh")))
    for asked in ("abcdefgh", "abcxyz", "a", "abcdefghi", "abcdefgx"):  # the first one shows that this is a chain
        agreed = sum(mine == theirs for mine, theirs in zip("abcdefgh", asked, strict=False))
        assert index.longest_prefix(granules(asked)) == {A: 16 * agreed}


def test_blocks_that_leave_one_by_one_from_either_end_leave_nothing() -> None:
    chain = granules("abcdefgh")
    for order in (chain, chain[::-1], chain[1::2] + chain[::2]):
        index = PrefixIndex()
        for worker in (A, B):
            index.add(worker, 16)
            index.apply(worker, Stored(chain))
        for worker in (A, B):
            for name in order:
                index.apply(worker, Evicted((name,)))
                index.check()
        assert len(index) == 0
