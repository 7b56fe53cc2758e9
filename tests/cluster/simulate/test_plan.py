"""The smallest pools that keep an SLO: found on any edge, and proven by the runs around them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli.main import diptych
from cluster.simulate.plan import Pools, TooMuch, smallest

if TYPE_CHECKING:
    from pathlib import Path


@given(prefill=st.integers(1, 40), decode=st.integers(1, 40), work=st.integers(2, 80))
@settings(max_examples=200, deadline=None)
def test_the_fewest_workers_are_found_wherever_the_edge_lies(prefill: int, decode: int, work: int) -> None:
    """Each role has a least size, and together they have a least size: decode helps prefill out."""

    def keeps(pools: Pools) -> bool:
        return pools.prefill >= prefill and pools.decode >= decode and pools.total >= work

    found = smallest(keeps)
    assert keeps(found)
    assert found.total == max(prefill + decode, work)


def test_what_no_pools_keep_is_said_so() -> None:
    with pytest.raises(TooMuch, match="asks for too much"):
        smallest(lambda _: False)


def test_the_plan_shows_the_pools_that_keep_and_that_one_less_does_not(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    words = ["simulate", "single-turn:60", "--plan", "--speeds", "4", "--json", str(file)]
    result = CliRunner().invoke(diptych, words, prog_name="diptych")
    assert result.exit_code == 0, result.output
    assert "keeps the SLO" in result.output
    chosen, *smaller = json.loads(file.read_text())["plans"]
    assert chosen["chosen"]
    assert chosen["goodput"] >= 0.9
    assert all(one["goodput"] < 0.9 for one in smaller)
