"""The floors of the house: who may import whom. Reads every file, runs none (but the two tests that say so)."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TREE = Path(__file__).resolve().parents[2]
HOMES = {"cluster": TREE, "workers": TREE, "kernels": TREE, "diptych": TREE / "proto"}
TORCH_FREE_IN_WORKERS = (
    *(f"workers.engine.{name}" for name in ("blocks", "eviction", "batching", "sequence")),
    "workers.report_pace",
    "workers.samples",
)
TORCH_FREE = ("cluster", "diptych", "workers.actors", *TORCH_FREE_IN_WORKERS)
MAY_IMPORT = {
    "cluster": ("cluster", "diptych", "workers.actors"),
    "cluster.simulate": ("cluster", "diptych", *TORCH_FREE_IN_WORKERS),
    "workers": ("workers", "kernels", "diptych"),
    "kernels": ("kernels", "diptych.compiling"),
    "diptych": ("diptych",),
}
TENSORS = ("torch", "triton", "cupy", "transformers")


class Import(NamedTuple):
    """One import statement's target, as written, and where it stands."""

    by: str
    of: str
    line: int
    runs: bool
    """Not under `if TYPE_CHECKING`."""


def modules() -> dict[str, Path]:
    files = ((home, file) for name, home in HOMES.items() for file in sorted((home / name).rglob("*.py")))
    return {dotted(file.relative_to(home)): file for home, file in files}


def dotted(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str, file: Path) -> Iterator[Import]:
    """Every import, also those inside functions and under TYPE_CHECKING: a dependency is a dependency."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {id(node) for block in ast.walk(tree) if is_for_checkers(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        runs = id(node) not in typing_only
        match node:
            case ast.Import(names=names):
                yield from (Import(module, alias.name, node.lineno, runs) for alias in names)
            case ast.ImportFrom(module=str(origin), names=names, level=0):
                yield from (Import(module, resolved(origin, alias.name), node.lineno, runs) for alias in names)
            case ast.ImportFrom():
                pytest.fail(f"{file}:{node.lineno} imports relatively: say the whole name")
            case _:
                pass


def is_for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse


def resolved(origin: str, name: str) -> str:
    """`from a.b import c` imports the module a.b.c when there is one, else a.b."""
    return f"{origin}.{name}" if f"{origin}.{name}" in modules_by_name else origin


modules_by_name = modules()
ALL = [found for module, file in modules_by_name.items() for found in imports(module, file)]


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def floor_of(module: str) -> str:
    return max((floor for floor in MAY_IMPORT if is_within(module, floor)), key=len)


def test_the_reader_sees_imports_of_every_form(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "import torch.nn as nn\n"
        "def f():\n"
        "    from diptych import types\n"
        "if TYPE_CHECKING:\n"
        "    from diptych.types import How\n"
    )
    seen = [(found.of, found.line, found.runs) for found in imports("example", file)]
    assert sorted(seen) == [("diptych.types", 3, True), ("diptych.types", 5, False), ("torch.nn", 1, True)]


def test_every_floor_imports_only_what_lies_below_it() -> None:
    ours = [found for found in ALL if is_within(found.of, *HOMES)]
    assert {found.by.partition(".")[0] for found in ours} == set(HOMES)
    wrong = [found for found in ours if not is_within(found.of, *MAY_IMPORT[floor_of(found.by)])]
    assert not wrong, "\n".join(
        f"{w.by}:{w.line} imports {w.of}; it may only {MAY_IMPORT[floor_of(w.by)]}" for w in wrong
    )


def test_nobody_imports_the_source_root_whose_name_belongs_to_proto_plus() -> None:
    assert not [found for found in ALL if is_within(found.of, "proto")]


def test_torch_stays_on_the_data_plane() -> None:
    wrong = [found for found in ALL if is_within(found.by, *TORCH_FREE) and is_within(found.of, *TENSORS)]
    assert not wrong


def test_sub_packages_form_no_cycle() -> None:
    """cluster.front, workers.engine, ...: each package's rooms, by what runs: a type named across a seam is none."""
    graph: dict[str, set[str]] = {}
    for found in ALL:
        by, of = room(found.by), room(found.of)
        if found.runs and by and of and by != of:
            graph.setdefault(by, set()).add(of)
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = error.args[1]
        pytest.fail(f"{' ← '.join(circle)}")
    assert set(order) == set(chain(graph, *graph.values()))


def room(module: str) -> str | None:
    """The sub-package (or file) of ours that a module is in; None for others and for the packages' own roots."""
    top, _, rest = module.partition(".")
    return f"{top}.{rest.partition('.')[0]}" if top in HOMES and rest else None


def test_every_folder_of_code_is_a_package() -> None:
    """A folder without __init__.py works from a tree and is missing from other forms of installation."""
    folders = {file.parent for file in modules_by_name.values()}
    assert not [str(folder.relative_to(TREE)) for folder in folders if not (folder / "__init__.py").is_file()]


def test_every_package_says_it_is_typed() -> None:
    assert not [name for name, home in HOMES.items() if not (home / name / "py.typed").is_file()]


def test_tests_are_no_package() -> None:
    """Or tests/cluster would shadow cluster."""
    assert not list((TREE / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("floor", ["cluster", "diptych"])
def test_importing_every_module_of_a_torch_free_floor_loads_no_torch(floor: str) -> None:
    names = [name for name in modules_by_name if is_within(name, floor) and name != "cluster.__main__"]
    assert len(names) > 1
    assert loaded_tensors(names) == ""


def test_the_workers_bookkeeping_loads_no_torch() -> None:
    """What the simulator runs for real."""
    assert loaded_tensors([name for name in TORCH_FREE_IN_WORKERS if name in modules_by_name]) == ""


def loaded_tensors(names: list[str]) -> str:
    """Imports the modules in a fresh interpreter; which tensor libraries that loaded, separated by spaces."""
    script = f"import sys, {', '.join(names)}; print(*[name for name in {TENSORS} if name in sys.modules])"
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{TREE}:{TREE / 'proto'}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return told.stdout.strip()
