"""Renders kustomizations and says what is wrong with them: schemas, then our rules. Applies nothing.

Usage: python -m tests.k8s.check k8s/overlays/NAME...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tests.k8s import schema
from tests.k8s.lint import kuberay, objects, ours, pods
from tests.k8s.manifests import Doc, render

RULES = {rule.__name__: rule for module in (pods, objects, kuberay, ours) for rule in module.RULES}


def schema_problems(docs: list[Doc]) -> Iterator[str]:
    """Over every supported version of Kubernetes; each problem once."""
    told: set[str] = set()
    for version in schema.versions():
        for doc in docs:
            for problem in schema.problems(doc, version):
                if problem not in told:
                    told.add(problem)
                    yield f"{problem} (Kubernetes {version})"


def lint_problems(docs: list[Doc]) -> Iterator[str]:
    for name, rule in RULES.items():
        yield from (f"{name}: {problem}" for problem in rule(docs))


def main(folders: list[str]) -> int:
    bad = False
    for folder in folders:
        docs = render(Path(folder))
        problems = [*schema_problems(docs), *lint_problems(docs)]
        bad = bad or bool(problems)
        print(f"{folder}: {len(docs)} objects, {len(problems)} problems", *problems, sep="\n  ")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
