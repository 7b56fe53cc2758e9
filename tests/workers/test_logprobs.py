"""Log-probabilities of answers and prompts: those of `transformers`, however they came about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.types import Emission, ModelSource, Request, TokenLogprobs
from workers.engine.sequence import Sequence

Make = Callable[..., Any]
CLOSE = 1e-3


class Reference:
    """A tiny model of transformers, saved as a folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.4,
        )
        self._model = LlamaForCausalLM(config).eval()
        self._model.save_pretrained(folder)
        self.source = ModelSource(name="reference", path=str(folder), digest="d" * 64)

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[tokens - 1, vocabulary]: row i is about tokens[i + 1]."""
        return self._model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"))


def assert_scored(given: TokenLogprobs, token: int, logprobs: torch.Tensor, count: int) -> None:
    assert given.logprob == pytest.approx(float(logprobs[token]), abs=CLOSE)
    # By value: two that are closer than the tolerance may change places.
    better, as_good = (logprobs > logprobs[token] + CLOSE).sum(), (logprobs >= logprobs[token] - CLOSE).sum()
    assert better < given.rank <= as_good
    assert len(given.top) == len(given.top_logprobs) == count
    assert list(given.top_logprobs) == pytest.approx(logprobs.topk(count).values.tolist(), abs=CLOSE)
    assert list(given.top_logprobs) == pytest.approx(logprobs[list(given.top)].tolist(), abs=CLOSE)


def assert_request_scored(request: Request, said: dict[int, Emission], reference: Reference) -> None:
    answer = [said[index].token for index in range(len(said))]
    logprobs = reference.logprobs([*request.tokens, *answer])
    for index, token in enumerate(answer):
        given = said[index].logprobs
        assert given is not None
        assert_scored(given, token, logprobs[len(request.tokens) - 1 + index], request.params.logprobs or 0)
    of_prompt = said[0].prompt_logprobs
    if request.params.prompt_logprobs is None:
        assert of_prompt is None
        return
    assert of_prompt is not None
    assert all(said[index].prompt_logprobs is None for index in range(1, len(said)))
    assert len(of_prompt) == len(request.tokens) - 1
    for at, given in enumerate(of_prompt):
        assert_scored(given, request.tokens[at + 1], logprobs[at], request.params.prompt_logprobs)


def test_remote_cached_and_local_log_probabilities_are_transformers(
    run: Make, pair: Make, prompt: Make, request_for: Make, reference: Reference
) -> None:
    def requests() -> list[Request]:
        counts = ((0, 0), (5, None), (20, 3), (1, 20))
        return [
            request_for(
                prompt(length, seed=length), 10, logprobs=each, prompt_logprobs=of_prompt, temperature=0.8, seed=length
            )
            for length, (each, of_prompt) in zip((1, 17, 333, 64), counts, strict=True)
        ]

    async def test() -> None:
        async with pair(model=reference.source) as two:
            rounds: list[list[dict[int, Emission]]] = []
            for placement in (two.remote, two.remote, two.local, two.local):
                batch = requests()
                await two.answers(*batch, placement=placement)
                rounds.append([two.front.said[request.id] for request in batch])
                for request, said in zip(batch, rounds[-1], strict=True):
                    assert_request_scored(request, said, reference)
        told = [
            [[(*each[3:6], *each[7:]) for _, each in sorted(said.items())] for said in answers] for answers in rounds
        ]
        assert told[0] == told[1] == told[2] == told[3]

    run(test())


def test_a_scored_prompt_is_computed_whole_on_prefill_and_only_what_decode_lacks_is_sent(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair() as two:
            tokens = prompt(500)
            await two.answers(request_for(tokens))
            scored = request_for(tokens, prompt_logprobs=1)
            await two.answers(scored)
            served = two.front.served(scored.id)
            assert (served.prompt_tokens_computed, served.cached_tokens, served.kv_blocks_sent) == (500, 0, 1)
            after = request_for(tokens)
            await two.answers(after)
            assert two.front.served(after.id).prompt_tokens_computed == 4

    run(test())


def test_a_hand_off_that_breaks_before_the_first_token_scores_the_prompt_again_where_it_goes_on(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair() as two:
            tokens = prompt(300)
            [whole], wanted = (
                await two.answers(request := request_for(tokens, logprobs=2, prompt_logprobs=2)),
                request.id,
            )

            async def refuse(*_: object) -> None:
                from diptych.errors import TransferFailed

                raise TransferFailed("no")

            two.to_p.before["run"] = refuse
            broken = request_for(tokens, logprobs=2, prompt_logprobs=2)
            [recovered] = await two.answers(broken)
            assert recovered == whole
            assert two.front.served(broken.id).how == "local"
            assert two.front.said[broken.id][0].prompt_logprobs == two.front.said[wanted][0].prompt_logprobs

    run(test())


def test_a_migrated_answer_goes_on_under_its_penalties(bench: Make, prompt: Make, request_for: Make) -> None:
    engine = bench()
    request = request_for(
        prompt(40), 30, temperature=0.7, repetition_penalty=1.4, frequency_penalty=1.1, bad_words=((3, 4),)
    )
    [whole] = engine.answers(request)
    resumed: Sequence = engine.sequence(request)
    for token, _ in whole[:11]:
        resumed.accept(token)
    other = bench()
    other.add(resumed)
    said = []
    while len(said) < 19:
        said += [sampled.token for sampled in other.step().sampled]
    assert said == [token for token, _ in whole[11:]]
