"""A simulated request names its granules as a real one does: distinct, chained, a block by its last one."""

from __future__ import annotations

import pytest

from cluster.simulate.asked import Namer
from cluster.simulate.trace import TraceRequest
from diptych.hashing import block_hashes


def content(prompt_tokens: int, *blocks: int) -> TraceRequest:
    return TraceRequest(arrival=0.0, prompt_tokens=prompt_tokens, output_tokens=600, blocks=blocks)


@pytest.mark.parametrize("prompt_tokens", [1, 15, 16, 511, 512, 513, 527, 528, 1040])
def test_every_full_granule_has_a_name_of_its_own(prompt_tokens: int) -> None:
    asked = Namer(512).ask(3, content(prompt_tokens, *range(-(-prompt_tokens // 512))), 0.0)
    granules = asked.shape().granules
    assert len(granules) == len(set(granules)) == prompt_tokens // 16
    assert block_hashes(granules, 512) == asked.names[: prompt_tokens // 512]


def test_prompts_share_the_names_of_the_content_they_share_and_no_others() -> None:
    namer = Namer(512)
    one, other = (namer.ask(place, content(1200, 7, 8, 100 + place), 0.0) for place in range(2))
    mine, theirs = set(one.shape().granules), set(other.shape().granules)
    assert len(mine & theirs) == 64
    assert not set(one.names[2:]) & set(other.names[2:])
