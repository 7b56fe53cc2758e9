"""What steps and transfers take, learned from samples as workers measure them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cluster.scheduler.rates import STEP_PRIOR, Residual, Shared, step_features
from diptych.types import StepSample

TRUE = np.array([0.005, 3.2e-5, 1.05e-9, 2e-5, 3.05e-8])
"""Of an 8B model on a large GPU; far from the prior."""


def prompt_step(drawn: random.Random, slower: float = 1.0) -> StepSample:
    tokens, cached = drawn.randint(16, 8192), drawn.choice([0, 0, 4096])
    return timed(drawn, slower, tokens, tokens * (cached + tokens / 2), 0, 0)


def decode_step(drawn: random.Random, slower: float = 1.0) -> StepSample:
    rows = drawn.randint(1, 256)
    return timed(drawn, slower, 0, 0, rows, rows * drawn.randint(500, 6000))


def timed(drawn: random.Random, slower: float, *work: float) -> StepSample:
    """5 % noise, and a stall now and then."""
    seconds = slower * float(TRUE @ np.array([1.0, *work])) * drawn.lognormvariate(0, 0.05)
    return StepSample(1, *work, 10 * seconds if drawn.random() < 0.02 else seconds)


def taught(rounds: int) -> Shared[str]:
    rates: Shared[str] = Shared(np.array(STEP_PRIOR))
    drawn = random.Random(1)
    for _ in range(rounds):
        rates.learn("p", "gpu", [step_features(prompt_step(drawn)) for _ in range(4)])
        rates.learn("d", "gpu", [step_features(decode_step(drawn, 1.5)) for _ in range(4)])
    return rates


def predicted(rates: Shared[str], worker: str, *work: float) -> float:
    return float(rates.of(worker, "gpu") @ np.array([1.0, *work]))


def test_a_worker_is_known_after_a_few_reports_in_spite_of_noise_and_stalls() -> None:
    rates = taught(30)
    prompt, decode = (4096, 4096 * 2048, 0, 0), (0, 0, 100, 300_000)
    assert predicted(rates, "p", *prompt) == pytest.approx(float(TRUE @ np.array([1.0, *prompt])), rel=0.05)
    assert predicted(rates, "d", *decode) == pytest.approx(1.5 * float(TRUE @ np.array([1.0, *decode])), rel=0.05)


def test_a_newcomer_and_a_worker_that_never_computed_a_prompt_have_their_kinds_mean() -> None:
    rates = taught(30)
    assert np.array_equal(rates.of("new", "gpu"), rates.mean("gpu"))
    prompt = (4096, 4096 * 2048, 0, 0)
    assert predicted(rates, "d", *prompt) == pytest.approx(predicted(rates, "p", *prompt), rel=0.5)
    assert np.array_equal(rates.of("new", "cpu"), STEP_PRIOR)


def test_the_first_sample_sets_the_size_of_what_only_the_prior_knows() -> None:
    rates: Shared[str] = Shared(np.array(STEP_PRIOR))
    step = StepSample(1, 1000.0, 500_000.0, 0.0, 0.0, 10 * (5e-3 + 0.1 + 5e-4))
    rates.learn("p", "gpu", [step_features(step)])
    assert rates.of("p", "gpu") == pytest.approx(10 * np.array(STEP_PRIOR), rel=0.01)


def test_a_machine_that_became_slower_is_followed() -> None:
    rates, drawn = taught(30), random.Random(2)
    for _ in range(500):
        rates.learn("p", "gpu", [step_features(prompt_step(drawn, 2.0)) for _ in range(4)])
    prompt = (4096, 4096 * 2048, 0, 0)
    assert predicted(rates, "p", *prompt) == pytest.approx(2 * float(TRUE @ np.array([1.0, *prompt])), rel=0.1)


def test_one_surprise_does_not_move_a_residual_that_many_agreed_on() -> None:
    residual = Residual()
    for place in range(50):
        residual.learn(0.3 + 0.01 * (place % 3), 0.2)
    before = residual.seconds
    assert before == pytest.approx(0.11, abs=0.01)
    residual.learn(60.0, 0.2)
    assert residual.seconds == pytest.approx(before, abs=0.01)
