"""What steps and hand-offs took reaches the scheduler: every one of them, in few numbers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from diptych.types import Report, StepSample
from workers.samples import STEP_SAMPLES, StepSamples, fold_steps, sample_of

Make = Callable[..., Any]


def total(samples: Sequence[StepSample]) -> list[float]:
    """Of each column, all steps together."""
    columns = range(1, len(StepSample._fields))
    return [sum(each.steps for each in samples), *(sum(each.steps * each[at] for each in samples) for at in columns)]


def some_steps(count: int) -> list[StepSample]:
    chance = random.Random(3)
    return [
        StepSample(1, chance.choice([0, 16, 400, 2048]), 7.0, chance.randrange(64), 50.0, chance.random())
        for _ in range(count)
    ]


def test_every_step_counts_once_however_few_samples_stand_for_them() -> None:
    steps = some_steps(1000)
    samples = StepSamples()
    for step in steps:
        samples.add(step)
    told = samples.take()
    assert len(told) <= STEP_SAMPLES
    assert total(told) == pytest.approx(total(steps))
    assert samples.take() == ()


def test_a_step_of_prompts_is_not_lost_among_those_that_only_decode() -> None:
    decoding = StepSample(1, 0, 0, 4, 400, 0.01)
    prompt = StepSample(1, 500, 125_250, 0, 0, 0.3)
    assert set(fold_steps([decoding] * 50 + [prompt])) == {decoding._replace(steps=50), prompt}


def test_samples_of_untold_snapshots_stay_few() -> None:
    samples: tuple[StepSample, ...] = ()
    steps = some_steps(300)
    for at in range(0, 300, 10):
        samples = fold_steps(samples + fold_steps(steps[at : at + 10]))
        assert len(samples) <= STEP_SAMPLES
    assert total(samples) == pytest.approx(total(steps))


def test_a_sample_says_what_the_step_computed(bench: Make, prompt: Make, request_for: Make) -> None:
    engine = bench(max_batch_tokens=48)
    sequence = engine.sequence(request_for(prompt(60)))
    engine.add(sequence)
    seen = []
    for _ in range(4):
        plan = engine.plan()
        seen.append(sample_of(plan, 0.5)[1:])
        engine.execute(plan)
    # Positions looked at: 1 + 2 + … + 48, then 49 + … + 60; the first decoded token is the 61st of its sequence.
    assert seen == [(48, 1176, 0, 0, 0.5), (12, 654, 0, 0, 0.5), (0, 0, 1, 61, 0.5), (0, 0, 1, 62, 0.5)]


def test_telling_of_a_step_costs_under_20_microseconds(bench: Make, prompt: Make, request_for: Make) -> None:
    engine = bench()
    for _ in range(64):
        engine.add(engine.sequence(request_for(prompt(8))))
    for _ in range(2):
        engine.step()
    plan, samples, rounds = engine.plan(), StepSamples(), 640
    assert len(plan.decodes) == 64
    began = time.thread_time()
    for _ in range(rounds):
        samples.add(sample_of(plan, 0.01))
    samples.take()
    assert (time.thread_time() - began) / rounds < 20e-6


@pytest.mark.parametrize("link", ["gloo", "loopback"])
def test_the_receiver_of_a_prompt_and_of_a_prefix_tells_how_fast_it_came(
    run: Make, pair: Make, prompt: Make, request_for: Make, link: str
) -> None:
    async def test() -> None:
        async with pair(link=link) as two:
            reports: list[Report] = []

            async def hear(report: Report) -> bool:
                reports.append(report)
                return False

            two.d.report_to(hear)
            await two.answers(request_for(prompt(300)))
            # One token: prefill answers alone, and decode lacks the prefix of what follows.
            await two.answers(request_for(prompt(200, seed=1), max_tokens=1))
            borrows = replace(two.local, prefix_from="p")
            await two.answers(request_for((*prompt(200, seed=1), *prompt(50))), placement=borrows)
            # A prompt that is there already: nothing moves, and nothing is learned.
            await two.answers(request_for(prompt(300)), placement=two.local)
            await two.settle()
            await two.until(two.d, lambda _: sum(report.counters.requests_finished == 4 for report in reports) > 0)
            transfers = [sample for report in reports for sample in report.transfers]
            assert [(each.sender, each.link, each.nbytes) for each in transfers] == [
                ("p", link, 19 * 8192),
                ("p", link, 12 * 8192),
            ]
            assert all(min(each.seconds, each.exposed_seconds) >= 0 for each in transfers)
            steps = [sample for report in reports for sample in report.steps]
            computed = sum(sample.steps * sample.prompt_tokens for sample in steps)
            assert computed == pytest.approx(reports[-1].counters.prompt_tokens_computed)
            assert sum(sample.steps for sample in steps) == reports[-1].counters.steps

    run(test())
