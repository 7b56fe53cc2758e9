"""`diptych simulate` as it is typed: tables, JSON, pictures, and errors that help."""

from __future__ import annotations

import builtins
import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from cluster.cli.main import diptych

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ("single-turn:40", "--pools", "1:2")
PNG = b"\x89PNG"


def simulate(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(diptych, ["simulate", *words], prog_name="diptych")
    return result.exit_code, result.output


def test_every_policy_has_a_row_and_the_json_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    code, told = simulate(*SMALL, "--speeds", "1,2", "--json", str(file))
    assert code == 0, told
    results = json.loads(file.read_text())["results"]
    assert len(results) == 14
    for result in results:
        assert f"{result['policy']}  " in told
        assert result["goodput"] == 1.0
        assert sum(result["how"].values()) == 40


def test_the_highest_speed_keeps_the_slo_and_little_more_does_not(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = (*SMALL, "--policy", "round_robin", "--json", str(file))
    code, told = simulate(*words, "--highest")
    assert code == 0, told
    [found] = json.loads(file.read_text())["results"]
    assert found["highest"]
    assert found["goodput"] >= 0.9
    simulate(*words, "--speeds", str(1.05 * found["speed"]))
    [beyond] = json.loads(file.read_text())["results"]
    assert beyond["goodput"] < 0.9


def test_pictures_are_drawn_for_each_result(tmp_path: Path) -> None:
    code, told = simulate(*SMALL, "--policy", "ours", "--plot", str(tmp_path / "plots"))
    assert code == 0, told
    files = sorted((tmp_path / "plots").iterdir())
    assert [file.name for file in files] == ["hits.png", "itl.png", "load-ours-1x.png", "ttft.png"]
    for file in files:
        assert file.read_bytes().startswith(PNG)
        assert str(file) in told.replace("\n", "")


def test_without_matplotlib_pictures_are_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    code, told = simulate(*SMALL, "--plot", str(tmp_path))
    assert code == 1
    assert "pip install 'diptych[plots]'" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere.jsonl",), "nowhere.jsonl can't be read"),
        ((*SMALL, "--speeds", "fast"), "'fast' is not like 1 or 4,8,12"),
        ((*SMALL, "--speeds", "0"), "'0' is not like 1 or 4,8,12"),
        (("single-turn:4", "--pools", "16"), "'16' is not like 16:16 or 4:4:2"),
        ((*SMALL, "--kill", "decode-0"), "'decode-0' is not like decode-0@60"),
        ((*SMALL, "--kill", "decode-7@1"), "decode-7 is none of decode-0, decode-1, prefill-0"),
        ((*SMALL, "--set", "link.latency=1"), "link.latency is no constant; the nearest is link.latency_seconds"),
        ((*SMALL, "--set", "link.latency_seconds=soon"), "link.latency_seconds: Input should be a valid number"),
        ((*SMALL, "--set", "seed"), "'seed' is not like link.latency_seconds"),
        ((*SMALL, "--constants", "nowhere.json"), "nowhere.json can't be read"),
    ],
)
def test_what_is_wrong_is_told_with_the_way_out(words: tuple[str, ...], told: str) -> None:
    code, output = simulate(*words)
    assert code in (1, 2)
    assert told in " ".join(output.split())
    assert "Traceback" not in output


def test_workers_that_die_are_named_and_their_requests_end(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    code, told = simulate(*SMALL, "--policy", "ours", "--kill", "decode-0@2+1", "--json", str(file))
    assert code == 0, told
    [result] = json.loads(file.read_text())["results"]
    assert result["rejected"] == 0.0


def test_placement_alone_prints_hits_and_the_bound() -> None:
    code, told = simulate("single-turn:40", "--mode", "placement", "--policy", "ours")
    assert code == 0, told
    assert "pooled (bound)" in told
