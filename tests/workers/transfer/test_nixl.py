"""KV over NIXL, where the package is: UCX moves host memory, so no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest

from diptych.errors import InvalidRequest
from diptych.types import WorkerSpec
from workers.worker import Worker

Make = Callable[..., Any]
has_nixl = pytest.mark.skipif(find_spec("nixl") is None, reason="needs the nixl package: pip install diptych[nixl]")


@has_nixl
@pytest.mark.parametrize(("prefill_block", "decode_block"), [(16, 16), (16, 32)])
def test_answers_have_the_bits_of_a_local_run(
    run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make, prefill_block: int, decode_block: int
) -> None:
    prompts = [prompt(length, seed=length) for length in (5, 96, 300)]
    clean = bench().answers(*(request_for(each) for each in prompts))

    async def test() -> None:
        sizes = {"prefill": {"block_size": prefill_block}, "decode": {"block_size": decode_block}}
        async with pair(link="nixl", max_batch_tokens=96, **sizes) as two:
            requests = [request_for(each) for each in prompts]
            assert await two.answers(*requests) == clean
            assert {two.front.served(each.id).how for each in requests} == {"remote"}

    run(test())


@has_nixl
def test_blocks_that_were_given_away_are_not_used(
    run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make
) -> None:
    clean = bench().answers(request_for(prompt(100)))

    async def test() -> None:
        async with pair(link="nixl") as two:

            async def reuse(sender: str, parcel: Any) -> None:
                del sender

                def take(roles: Any) -> None:
                    roles.engine.pool._generations[parcel.source.blocks[-1]] += 1

                await two.see(two.p, take)

            two.to_d.before["expect"] = reuse
            request = request_for(prompt(100))
            assert await two.answers(request) == clean
            assert two.front.served(request.id).how == "local"

    run(test())


@pytest.mark.skipif(find_spec("nixl") is not None, reason="the nixl package is here")
def test_without_the_package_a_worker_says_what_to_install(run: Make, spec: WorkerSpec) -> None:
    async def test() -> None:
        worker = Worker(replace(spec, link="nixl"))
        with pytest.raises(InvalidRequest, match=r"No module named 'nixl'.*install diptych\[nixl\]"):
            await worker.start()

    run(test())
