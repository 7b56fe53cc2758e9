"""The default model in two pools: the questions every user asks first, and what a hand-off costs."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Cluster

pytestmark = pytest.mark.e2e

MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
EXTENSION = {
    "how",
    "prefill_worker",
    "decode_worker",
    "prompt_tokens_computed",
    "cached_tokens",
    "kv_blocks_sent",
    "kv_bytes_sent",
}
BLOCK_BYTES = 30 * 2 * 3 * 16 * 64 * 2
"""Layers, keys and values, KV heads, tokens, head dimension, bytes of bf16."""


@pytest.fixture
def api(served: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{served.http}/v1", api_key="none", max_retries=0) as api:
        yield api


# ---- one real answer ------------------------------------------------------------------------------------


def test_paris_over_http_with_openais_client_streaming(served: Cluster, api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Paris" in text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    extension = last.usage.model_extra["diptych"]
    assert extension.keys() >= EXTENSION
    assert (extension["how"], extension["prefill_worker"], extension["decode_worker"]) == (
        "remote",
        "prefill-0",
        "decode-0",
    )
    assert extension["prompt_tokens_computed"] + extension["cached_tokens"] == last.usage.prompt_tokens
    assert last.usage.prompt_tokens_details.cached_tokens == extension["cached_tokens"]
    print(f"\n1a: {text!r}, from a cluster that took {served.started_seconds:.1f} s to start")


def test_paris_over_grpc_with_diptych_ask(served: Cluster) -> None:
    command = [sys.executable, "-m", "cluster", "ask", QUESTION, "--grpc", served.grpc]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Paris" in made.stdout
    print(f"\n1b: {made.stdout!r}")


def test_paris_over_grpc_with_our_client_is_what_http_says(served: Cluster, api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    answer = served.answer(messages=MESSAGES, ignore_eos=False)
    assert "Paris" in answer.text
    assert whole.choices[0].message.content == answer.text
    assert {field.name for field in answer.served.DESCRIPTOR.fields} >= EXTENSION


def test_a_prompt_of_token_ids_has_one_answer_over_http_and_grpc(served: Cluster, api: openai.OpenAI) -> None:
    tokens = served.client.tokenize("The capital of Sweden is")
    over_http = api.completions.create(model=MODEL, prompt=list(tokens), temperature=0, max_tokens=8)
    over_grpc = served.answer(tokens=tokens, max_tokens=8, ignore_eos=False)
    assert over_http.choices[0].text == over_grpc.text
    assert over_http.usage is not None
    assert over_http.usage.prompt_tokens == len(tokens) == over_grpc.complete.usage.prompt_tokens


def test_it_lists_its_model_over_http_and_grpc(served: Cluster, api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == [MODEL]
    assert [model.id for model in served.client.models()] == [MODEL]


def test_it_says_that_it_is_healthy_and_what_it_does(served: Cluster, api: openai.OpenAI) -> None:
    served.answer(prompt="Hello", max_tokens=2)
    live, ready = (httpx.get(f"http://{served.http}/health/{what}") for what in ("live", "ready"))
    assert (live.status_code, ready.status_code) == (200, 200)
    families = text_string_to_metric_families(httpx.get(f"http://{served.http}/metrics").text)
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    assert samples["vllm:generation_tokens_total"] >= 2
    assert samples["diptych_scheduler_up"] == 1
    assert samples["diptych_leaked_blocks_total"] == 0


def test_its_terminal_shows_each_request_without_its_words_and_nothing_of_ray(served: Cluster) -> None:
    answer = served.answer(messages=MESSAGES, request_id="of-the-log", max_tokens=5)

    def lines() -> list[str]:
        return served.log.read_text().splitlines()

    served.until(lambda _: any("request ends request_id=of-the-log" in line for line in lines()), "it is logged")
    [ends] = [line for line in lines() if "request ends request_id=of-the-log" in line]
    assert f"status=OK finish=length prompt_tokens={answer.complete.usage.prompt_tokens}" in ends
    assert "how=remote prefill_worker=prefill-0 decode_worker=decode-0" in ends
    assert "France" not in "".join(lines())
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3} ", line) for line in lines())


def test_status_shows_both_workers(served: Cluster) -> None:
    command = [sys.executable, "-m", "cluster", "status", "--json", "--grpc", served.grpc]
    status = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert status["ready"] is True
    assert {worker["info"]["id"]: worker["alive"] for worker in status["workers"]} == {
        "prefill-0": True,
        "decode-0": True,
    }
    assert len({worker["info"]["pid"] for worker in status["workers"]} | {str(os.getpid())}) == 3


# ---- what a hand-off costs --------------------------------------------------------------------------------


def test_a_thousand_tokens_cross_once_and_the_second_time_hardly_at_all(served: Cluster) -> None:
    prompt = random.Random(4).choices(range(1000, 40000), k=1000)
    before = served.at_rest()
    first = served.answer(tokens=prompt, max_tokens=4)
    between = served.at_rest()
    second = served.answer(tokens=prompt, max_tokens=4)
    after = served.at_rest()  # every block is free or cached, on both sides

    assert first.tokens == second.tokens
    for answer, cached, computed, blocks, start, end in (
        (first, 0, 1000, 63, before, between),
        (second, 992, 8, 1, between, after),
    ):
        told = answer.served
        assert (told.how, told.cached_tokens, told.prompt_tokens_computed) == ("remote", cached, computed)
        assert (told.kv_blocks_sent, told.kv_bytes_sent) == (blocks, blocks * BLOCK_BYTES)

        def grown(worker: str, counter: str, start: dict = start, end: dict = end) -> int:
            return getattr(end[worker].counters, counter) - getattr(start[worker].counters, counter)

        assert grown("prefill-0", "prompt_tokens_computed") == computed
        assert grown("decode-0", "prompt_tokens_computed") == 0
        assert grown("prefill-0", "blocks_sent") == grown("decode-0", "blocks_received") == blocks
        assert grown("prefill-0", "bytes_sent") == grown("decode-0", "bytes_received") == blocks * BLOCK_BYTES
        assert grown("decode-0", "transfers_committed") == 1
        print(f"\n4: {computed} prompt tokens computed by prefill, 0 by decode; {blocks} blocks sent,", end="")
        print(f" {blocks * BLOCK_BYTES:,} bytes", end="")
    print()


# ---- beside another -------------------------------------------------------------------------------------


def test_a_taken_port_is_named_at_once(served: Cluster) -> None:
    for what, taken in (("http", served.http), ("grpc", served.grpc)):
        other = {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0", what: taken}
        command = [sys.executable, "-m", "cluster", "serve", "--http", other["http"], "--grpc", other["grpc"]]
        made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert made.returncode == 1
        assert f"can't listen on {taken}" in made.stderr
        assert "Ray" not in made.stderr, "nothing was started"
    assert served.answer(prompt="Still", max_tokens=2).tokens
