"""Shell text in manifests, and the `diptych` commands in it. Runs none."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from tests.k8s.manifests import Doc, Pods, name_of, of_kind, pods

SHELLS = ("bash", "sh")


class Command(NamedTuple):
    """One `diptych …`, and where it stands."""

    where: str
    arguments: list[str]


def commands(docs: list[Doc]) -> Iterator[Command]:
    """Of containers, preStop hooks, exec probes and Ray jobs."""
    for pod in pods(docs):
        for where, words in _words(pod):
            yield from (Command(where, arguments) for arguments in _diptych(words))
    for doc in of_kind(docs, "RayJob"):
        entry = doc["spec"]["entrypoint"]
        yield from (Command(f"{name_of(doc)}: entrypoint", arguments) for arguments in _diptych(["sh", "-c", entry]))


def _words(pod: Pods) -> Iterator[tuple[str, list[str]]]:
    for container in pod.all_containers:
        yield f"{pod.where}: {container['name']}", [*container.get("command", []), *container.get("args", [])]
        hook = container.get("lifecycle", {}).get("preStop", {})
        yield f"{pod.where}: preStop", hook.get("exec", {}).get("command", [])
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            yield f"{pod.where}: {kind}", container.get(kind, {}).get("exec", {}).get("command", [])


def _diptych(words: list[str]) -> Iterator[list[str]]:
    """The arguments of each `diptych`, said directly or in a shell's script."""
    if words and words[0].rpartition("/")[2] in SHELLS:
        for line in re.split(r"\n|;|&&|\|\|?", words[-1]):
            parts = shlex.split(line, comments=True)
            if "diptych" in parts:
                yield parts[parts.index("diptych") + 1 :]
    elif words and words[0].rpartition("/")[2] == "diptych":
        yield words[1:]
