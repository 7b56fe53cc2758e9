"""The batching policy as exact plans: who computes which tokens, who waits, who gives way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from workers.engine.batching import MOST_OVERTAKES, Batcher, StepPlan
from workers.engine.blocks import BlockPool
from workers.engine.sequence import Sequence

Make = Callable[..., Any]


class Queue:
    """A batcher over `blocks` blocks of 16 tokens; sequences are named by their letter."""

    def __init__(self, request_for: Make, prompt: Make, blocks: int, max_batch_tokens: int, max_running: int) -> None:
        self.pool = BlockPool(blocks)
        self.batcher = Batcher(self.pool, block_size=16, max_batch_tokens=max_batch_tokens, max_running=max_running)
        self.letters: dict[Sequence, str] = {}
        self._request_for, self._prompt = request_for, prompt

    def add(
        self, letter: str, length: int, *, task: Any = "answer", seed: int | None = None, priority: int = 0
    ) -> Sequence:
        """Arrives in the order of the letters."""
        tokens = self._prompt(length, seed=ord(letter) if seed is None else seed)
        request = replace(self._request_for(tokens, max_tokens=1000), priority=priority)
        sequence = Sequence(request=request, attempt=0, task=task, arrival=ord(letter), block_size=16)
        self.letters[sequence] = letter
        self.batcher.add(sequence)
        return sequence

    def step(self) -> str:
        """Plans, tells it, and does it: "A B+48 | C waits" is a token of A, 48 of B's prompt, and C in the queue."""
        plan = self.batcher.plan()
        self._execute(plan)
        self.pool.check()
        return self._told(plan)

    def end(self, sequence: Sequence) -> None:
        self.batcher.remove(sequence)
        self.pool.release(sequence.ticket)
        self.pool.release(sequence.owner)

    def _execute(self, plan: StepPlan) -> None:
        for sequence in plan.decodes:
            sequence.computed += 1
        for sequence, start, count in plan.chunks:
            assert start == sequence.computed
            sequence.computed += count
        for sequence in plan.computing:
            for index in range(sequence.named, sequence.full_blocks):
                self.pool.name(sequence.blocks[index], sequence.names()[index], sequence.owner)
            sequence.named = max(sequence.named, sequence.full_blocks)
            if sequence.remaining == 0:
                sequence.accept(0)

    def _told(self, plan: StepPlan) -> str:
        parts = [self.letters[sequence] for sequence in plan.decodes]
        parts += [f"{self.letters[each.sequence]}+{each.count}" for each in plan.chunks]
        parts += [f"{self.letters[sequence]} granted" for sequence in plan.granted]
        parts += [f"{self.letters[sequence]} gives way" for sequence in plan.preempted]
        waiting = "".join(self.letters[sequence] for sequence in self.batcher.waiting)
        return " ".join(parts) + (f" | {waiting} waits" if waiting else "")


@pytest.fixture
def queue(request_for: Make, prompt: Make) -> Make:
    def make(blocks: int = 100, max_batch_tokens: int = 64, max_running: int = 8) -> Queue:
        return Queue(request_for, prompt, blocks, max_batch_tokens, max_running)

    return make


def test_every_running_sequence_decodes_and_prompts_share_what_is_left_in_whole_blocks(queue: Make) -> None:
    batch = queue()
    batch.add("A", 10)
    batch.add("B", 100)
    batch.add("C", 50)
    # 64 tokens: A's 10 and 48 of B, a whole number of blocks; a step of C would be for nothing.
    assert batch.step() == "A+10 B+48 | C waits"
    assert batch.step() == "A B+52"
    assert batch.step() == "A B C+50"
    assert batch.step() == "A B C"


def test_the_end_of_a_prompt_need_not_fill_a_block(queue: Make) -> None:
    batch = queue(max_batch_tokens=32)
    batch.add("A", 50)
    assert [batch.step() for _ in range(3)] == ["A+32", "A+18", "A"]


def test_the_first_prompt_gets_a_block_however_many_decode(queue: Make) -> None:
    batch = queue(max_batch_tokens=16, max_running=32)
    for letter in "ABCDEFGHIJKLMNOPQ":
        batch.add(letter, 1)
    batch.step()
    batch.step()
    decoding = " ".join("ABCDEFGHIJKLMNOPQ")
    assert batch.step() == decoding
    for letter in "ABC":
        batch.end(next(each for each, name in batch.letters.items() if name == letter))
    batch.add("X", 40)
    decoding = decoding.removeprefix("A B C ")
    assert [batch.step() for _ in range(3)] == [f"{decoding} X+16", f"{decoding} X+16", f"{decoding} X+8"]


def test_a_prompt_of_one_token_is_a_decode(queue: Make) -> None:
    batch = queue()
    batch.add("A", 1)
    assert batch.step() == "A"


def test_nobody_overtakes_the_one_who_waits_for_room(queue: Make) -> None:
    batch = queue(blocks=10)
    first = batch.add("A", 100)
    assert batch.step() == "A+64"
    batch.add("B", 64)
    batch.add("C", 1)
    assert batch.step() == "A+36 | BC waits"
    assert batch.step() == "A | BC waits"
    batch.end(first)
    assert batch.step() == "B+64 | C waits"
    assert batch.step() == "B C"


def test_no_more_run_than_may(queue: Make) -> None:
    batch = queue(max_running=2)
    first = batch.add("A", 5)
    batch.add("B", 5)
    batch.add("C", 5)
    assert batch.step() == "A+5 B+5 | C waits"
    batch.end(first)
    assert batch.step() == "B C+5"


def test_a_newcomer_leaves_a_block_to_each_who_runs(queue: Make) -> None:
    batch = queue(blocks=5)
    batch.add("A", 10)
    batch.add("B", 10)
    assert batch.step() == "A+10 B+10"
    batch.add("C", 20)
    # 3 blocks are free and C needs 2, but A and B will need one each before long.
    assert batch.step() == "A B | C waits"
    batch.end(next(each for each, name in batch.letters.items() if name == "B"))
    assert batch.step() == "A C+20"


def test_the_youngest_gives_way_and_comes_back_to_what_is_cached(queue: Make) -> None:
    batch = queue(blocks=5, max_batch_tokens=100)
    oldest = batch.add("A", 30)
    youngest = batch.add("B", 30)
    assert batch.step() == "A+30 B+30"
    assert [batch.step() for _ in range(2)] == ["A B", "A B"]
    # Both need a third block, one is left: the older one gets it.
    assert batch.step() == "A B gives way | B waits"
    assert (youngest.computed, youngest.blocks, youngest.admissions) == (0, [], 1)
    assert batch.step() == "A | B waits"
    batch.end(oldest)
    assert batch.step() == "B"  # all but its last token was still there
    assert youngest.admissions == 2


def test_the_oldest_runs_to_its_end_when_there_is_room_for_one(queue: Make) -> None:
    batch = queue(blocks=4, max_batch_tokens=100)
    for letter in "ABC":
        batch.add(letter, 14)
    order = []
    for _ in range(500):
        batch.step()
        for sequence, letter in batch.letters.items():
            if sequence.generated >= 45 and letter not in order:
                order.append(letter)
                batch.end(sequence)
        if len(order) == 3:
            break
    assert order == ["A", "B", "C"]
    assert batch.pool.held == 0


def test_the_most_important_is_admitted_first_and_equals_in_the_order_of_arrival(queue: Make) -> None:
    batch = queue(max_running=1)
    running = batch.add("A", 5)
    batch.step()
    batch.add("B", 5)
    batch.add("C", 5, priority=-1)
    batch.add("D", 5, priority=1)
    batch.add("E", 5, priority=-1)
    # Nobody who runs is stopped for somebody who waits.
    assert batch.step() == "A | CEBD waits"
    for letter, waiting in (("C", "EBD"), ("E", "BD"), ("B", "D"), ("D", "")):
        batch.end(running)
        assert batch.step() == f"{letter}+5" + (f" | {waiting} waits" if waiting else "")
        running = next(each for each, name in batch.letters.items() if name == letter)


def test_the_more_important_prompt_is_computed_first(queue: Make) -> None:
    batch = queue()
    batch.add("A", 100)
    assert batch.step() == "A+64"
    batch.add("B", 40, priority=-1)
    assert batch.step() == "B+40 A+16"
    assert batch.step() == "B A+20"


def test_the_least_important_gives_way_and_of_these_the_youngest(queue: Make) -> None:
    batch = queue(blocks=8, max_batch_tokens=200)
    important = batch.add("D", 30, priority=-1)
    batch.add("A", 30)
    batch.add("B", 30)
    assert batch.step() == "D+30 A+30 B+30"
    batch.add("C", 5, priority=5)
    assert [batch.step() for _ in range(2)] == ["D A B | C waits"] * 2
    # Two blocks are left, and three need one: the first in order get theirs, though D came last.
    assert batch.step() == "D A B gives way | BC waits"
    batch.end(important)
    assert batch.step() == "A B | C waits"


def test_a_preempted_one_waits_behind_more_important_newcomers_and_before_its_juniors(queue: Make) -> None:
    batch = queue(blocks=5, max_batch_tokens=100)
    oldest = batch.add("A", 30)
    batch.add("B", 30)
    batch.step()
    assert [batch.step() for _ in range(3)] == ["A B", "A B", "A B gives way | B waits"]
    batch.add("C", 40)
    newcomer = batch.add("D", 40, priority=-1)
    assert batch.step() == "A | DBC waits"
    batch.end(oldest)
    assert batch.step() == "D+40 | BC waits"
    batch.end(newcomer)
    assert batch.step().startswith("B")


def test_a_hand_off_is_granted_room_and_computes_nothing_until_it_joins(queue: Make) -> None:
    batch = queue(blocks=6)
    remote = batch.add("A", 40, task="decode")
    assert batch.step() == "A granted"
    assert (batch.pool.granted, batch.pool.held) == (3, 0)
    batch.add("B", 20)
    assert batch.step() == "B+20"
    batch.pool.commit(remote.ticket, remote.owner)
    remote.computed = 40
    remote.accept(0)
    batch.batcher.join(remote)
    assert batch.step() == "A B"


def test_a_hand_off_counts_among_those_who_may_run(queue: Make) -> None:
    batch = queue(max_running=1)
    remote = batch.add("A", 40, task="decode")
    batch.add("B", 20)
    assert batch.step() == "A granted | B waits"
    batch.end(remote)
    assert batch.step() == "B+20"


def test_a_hand_off_reuses_its_whole_prompt_and_others_leave_a_token_to_compute(queue: Make) -> None:
    batch = queue()
    first = batch.add("A", 32, seed=1)
    batch.step()
    again = batch.add("B", 32, seed=1)
    remote = batch.add("C", 32, seed=1, task="decode")
    assert batch.step() == "A B+16 C granted"
    assert (again.cached_tokens, remote.cached_tokens) == (16, 32)
    assert (remote.blocks, batch.pool.granted) == (first.blocks[:2], 0)


def test_what_was_removed_is_nowhere(queue: Make) -> None:
    batch = queue(max_running=1)
    gone = [batch.add("A", 5), batch.add("B", 5)]
    batch.step()
    for sequence in gone:
        batch.end(sequence)
        batch.end(sequence)
    assert batch.step() == ""
    assert not batch.batcher.has_work
    assert (batch.pool.free, batch.pool.held) == (100, 0)


def test_who_came_first_is_overtaken_so_often_and_no_more_however_many_important_ones_keep_coming(queue: Make) -> None:
    batch = queue(max_running=1)
    running = batch.add("A", 5)
    batch.step()
    batch.add("B", 5, priority=1)
    batch.add("C", 5, priority=1)
    order, later = "", (chr(letter) for letter in range(ord("a"), ord("a") + 100))
    for _ in range(3 * MOST_OVERTAKES):
        batch.add(next(later), 5, priority=-1)
        batch.end(running)
        batch.step()
        [running] = batch.batcher.running
        order += batch.letters[running]
    assert order.index("B") == MOST_OVERTAKES
    assert order.index("C") == 2 * MOST_OVERTAKES + 1
    assert sum(letter in "BC" for letter in order) == 2


def test_who_was_overtaken_too_often_gives_way_last(queue: Make) -> None:
    batch = queue(blocks=8, max_running=2)
    running = batch.add("A", 5)
    other = batch.add("B", 5, priority=-2)
    batch.step()
    waited = batch.add("C", 30, priority=1)
    for letter in range(MOST_OVERTAKES):
        batch.add(chr(ord("a") + letter), 5, priority=-1)
        batch.end(running)
        batch.step()
        running = batch.batcher.running[-1]
    batch.end(running)
    batch.step()
    assert waited in batch.batcher.running
    assert batch.batcher.running[0] is waited
    assert other in batch.batcher.running
