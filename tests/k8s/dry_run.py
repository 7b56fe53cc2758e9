"""Asks a real API server what it has against the custom resources of kustomizations. Stores nothing there but the CRDs.

Usage: python -m tests.k8s.dry_run --kubeconfig FILE --crds FOLDER k8s/overlays/NAME...

Any server that serves CustomResourceDefinitions will do: a cluster of your own, kind, or apiextensions-apiserver alone
with etcd (docs/deploy.md, "What was tried where"). The last knows no core kinds: they are left out, and counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.k8s.manifests import TREE, Doc, load, name_of, render

if TYPE_CHECKING:
    from collections.abc import Iterator

BAD = TREE / "tests/k8s/bad/schemas"
WAIT_SECONDS = 60


class Server:
    """By its kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        self._kubeconfig = kubeconfig

    def send(self, verb: str, path: str, doc: Doc | None = None) -> tuple[bool, str]:
        """Whether it was taken, and what was said."""
        command = ["kubectl", "--kubeconfig", str(self._kubeconfig), verb, "--raw", path]
        if doc is None:
            return self._run(command)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(json.dumps(doc))
            file.flush()
            return self._run([*command, "-f", file.name])

    def serve(self, crd: Doc) -> str:
        """From now on; returns the path of its objects."""
        self.send("create", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd)  # or it is there
        spec = crd["spec"]
        [version] = [each["name"] for each in spec["versions"] if each["storage"]]
        path = f"/apis/{spec['group']}/{version}/namespaces/diptych/{spec['names']['plural']}"
        deadline = time.monotonic() + WAIT_SECONDS
        while not (answer := self.send("get", path))[0]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} isn't served after {WAIT_SECONDS} s: {answer[1]}")
            time.sleep(0.5)
        return path

    def _run(self, command: list[str]) -> tuple[bool, str]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
        return done.returncode == 0, done.stdout + done.stderr


def dry_run(server: Server, paths: dict[tuple[str, str], str], doc: Doc) -> str | None:
    """What is said against it; None of a kind that isn't served."""
    path = paths.get((doc["apiVersion"], doc["kind"]))
    if path is None:
        return None
    there = {**doc, "metadata": {**doc["metadata"], "namespace": "diptych"}}
    taken, told = server.send("create", f"{path}?dryRun=All&fieldValidation=Strict", there)
    return "" if taken else told.strip()


def served(server: Server, folder: Path) -> dict[tuple[str, str], str]:
    """The path of each kind, by apiVersion and kind."""
    paths: dict[tuple[str, str], str] = {}
    for file in sorted(folder.glob("*.yaml")):
        crds: list[Any] = [crd for crd in yaml.safe_load_all(file.read_text()) if crd]
        for crd in crds:
            path = server.serve(crd)
            _, _, group, version, *_ = path.split("/")
            paths[f"{group}/{version}", crd["spec"]["names"]["kind"]] = path
    return paths


def refusals(server: Server, paths: dict[tuple[str, str], str], docs: list[Doc], tried: Counter[str]) -> Iterator[str]:
    for doc in docs:
        told = dry_run(server, paths, doc)
        tried["left out" if told is None else "refused" if told else "taken"] += 1
        if told:
            yield f"{name_of(doc)}: {told}"


def main() -> int:
    """Exit status 1 when a manifest was refused, or a bad one taken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--crds", type=Path, required=True, help="folder of CustomResourceDefinitions, *.yaml")
    parser.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args()
    server = Server(given.kubeconfig)
    paths = served(server, given.crds)
    wrong = 0
    for folder in given.folders:
        tried: Counter[str] = Counter()
        problems = list(refusals(server, paths, render(folder), tried))
        wrong += len(problems)
        print(f"{folder}: {dict(tried)}", *problems, sep="\n  ")
    for file in sorted(BAD.glob("*.yaml")):
        tried = Counter()
        problems = list(refusals(server, paths, load(file.read_text()), tried))
        wrong += bool(tried["taken"])
        print(f"{file.name}, which is bad: {dict(tried)}", *problems, sep="\n  ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
