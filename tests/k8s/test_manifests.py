"""Every kustomization renders to manifests that the schemas and our rules have nothing against."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.k8s.manifests import TREE, load, render

FOLDERS = ["base", "plain", "jobs", *sorted(f"overlays/{path.name}" for path in (TREE / "k8s/overlays").iterdir())]
BAD = Path(__file__).parent / "bad"


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_renders_and_nothing_is_wrong_with_it(folder: str) -> None:
    from tests.k8s.check import lint_problems, schema_problems

    docs = render(TREE / "k8s" / folder)
    assert docs
    assert [*schema_problems(docs), *lint_problems(docs)] == []


def test_every_component_is_in_some_overlay() -> None:
    said = "".join(file.read_text() for file in (TREE / "k8s/overlays").glob("*/kustomization.yaml"))
    components = [path.name for path in (TREE / "k8s/components").iterdir()]
    assert [name for name in components if f"components/{name}" not in said] == []


def test_every_rule_has_a_manifest_that_fails_it() -> None:
    from tests.k8s.check import RULES

    assert sorted(file.stem for file in BAD.glob("*.yaml")) == sorted(RULES)


@pytest.mark.parametrize("file", sorted(BAD.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_rule_says_what_is_wrong(file: Path) -> None:
    from tests.k8s.check import RULES

    told = "\n".join(RULES[file.stem](load(file.read_text())))
    assert expected(file) in told


@pytest.mark.parametrize("file", sorted(BAD.glob("schemas/*.yaml")), ids=lambda file: file.stem)
def test_a_schema_says_what_is_wrong(file: Path) -> None:
    from tests.k8s.check import schema_problems

    assert expected(file) in "\n".join(schema_problems(load(file.read_text())))


def expected(file: Path) -> str:
    """Its first line."""
    return file.read_text().splitlines()[0].removeprefix("# ")


def test_supported_versions_of_kubernetes_begin_with_1_30() -> None:
    from tests.k8s.schema import versions

    assert versions()[0] == "1.30"
    assert len(versions()) > 4


def test_names_of_metrics_are_found_in_promql_and_in_the_code() -> None:
    from tests.k8s.lint.ours import exported, metrics_in

    assert metrics_in('sum by (role) (rate(diptych_blocks{state="free"}[5m])) > on (a) up') == {"diptych_blocks", "up"}
    assert {"vllm:time_to_first_token_seconds_bucket", "diptych_blocks", "diptych_leaked_blocks_total"} <= exported()
