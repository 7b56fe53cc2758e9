"""The `diptych` command before it reaches a cluster: help, configuration, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cluster.cli.main import SUBCOMMANDS, diptych
from cluster.config import Config, values

TREE = Path(__file__).resolve().parents[3]
SCREEN_LINES = 24
SCREEN_COLUMNS = 80


def run(*words: str, **environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(diptych, words, env=environment, prog_name="diptych")
    return result.exit_code, result.output


@pytest.mark.parametrize("name", list(SUBCOMMANDS))
def test_help_fits_a_screen_and_shows_an_example(name: str) -> None:
    code, told = run(name, "--help")
    lines = told.splitlines()
    assert code == 0
    assert "Example:" in told
    assert f"diptych {name}" in told.partition("Example:")[2]
    assert len(lines) <= SCREEN_LINES, f"{len(lines)} lines"
    assert max(map(len, lines)) <= SCREEN_COLUMNS


def test_the_list_of_commands_says_what_each_commands_own_help_says() -> None:
    with click.Context(diptych) as context:
        for name, listed in SUBCOMMANDS.items():
            command = diptych.get_command(context, name)
            assert command is not None
            assert command.get_short_help_str(limit=100) == listed.summary


def test_help_loads_none_of_what_the_commands_need() -> None:
    heavy = ("ray", "grpc", "pydantic", "rich", "torch", "tokenizers")
    script = (
        "import sys; from cluster.cli.main import diptych; diptych(['--help'], standalone_mode=False);"
        f"print('loaded', [name for name in {heavy} if name in sys.modules])"
    )
    environment = {"PYTHONPATH": f"{TREE}:{TREE / 'proto'}"}
    told = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert told.endswith("loaded []\n")
    assert all(name in told for name in SUBCOMMANDS)


def test_config_shows_every_key_with_its_origin(tmp_path: Path) -> None:
    file = tmp_path / "diptych.toml"
    file.write_text("[kv]\nblock_size = 32\n")
    flags = ("--prefill", "2", "--set", "kv.verify=all")
    code, told = run("config", str(file), *flags, "--json", DIPTYCH_MODEL__DTYPE="fp32")
    shown = json.loads(told)
    assert code == 0
    assert shown.keys() == values(Config()).keys()
    assert shown["kv.block_size"] == {"value": 32, "origin": str(file)}
    assert shown["pools.prefill.workers"] == {"value": 2, "origin": "--prefill"}
    assert shown["kv.verify"] == {"value": "all", "origin": "--set"}
    assert shown["model.dtype"] == {"value": "fp32", "origin": "environment DIPTYCH_MODEL__DTYPE"}
    assert shown["kv.wire"] == {"value": "native", "origin": "default"}


def test_config_prints_a_table_for_people() -> None:
    code, told = run("config", "--decode", "3")
    row = next(line for line in told.splitlines() if line.startswith("pools.decode.workers"))
    assert code == 0
    assert row.split() == ["pools.decode.workers", "3", "--decode"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "kv.wires=int8"], "the nearest is kv.wire"),
        (["--set", "kv.wire"], "should be KEY=VALUE"),
        (["--prefill", "many"], "pools.prefill.workers = 'many' (--prefill)"),
        (["--prefil", "2"], "--prefill"),
        (["nowhere.toml"], "nowhere.toml can't be read"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "config"])
def test_a_mistake_is_said_in_words_and_ends_with_status_2(command: str, words: list[str], told: str) -> None:
    code, output = run(command, *words)
    assert code == 2
    assert told in output
    assert "Traceback" not in output


def test_pull_says_where_a_model_lies_and_what_is_no_model(tmp_path: Path) -> None:
    code, told = run("pull", str(tmp_path / "nothing.gguf"))
    assert code == 1
    assert "no model" in told
    assert run("pull", "random:tiny") == (0, "random:tiny\n")
    code, told = run("pull", "random:tiny", "--json")
    assert code == 0
    assert {"name", "path", "digest"} <= json.loads(told).keys()
