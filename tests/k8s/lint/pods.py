"""Rules about one pod: security, resources, ports, probes, volumes, its end. Knows Kubernetes, not what runs in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.manifests import Doc, Pods, of_kind, pods

PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*$")
PINNED = re.compile(r".+(@sha256:[0-9a-f]{64}|:v?\d+\.\d+(\.\d+)?[\w.-]*)$")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
BEYOND_RESTRICTED = {"IPC_LOCK"}
"""What pinned memory needs; the namespace has to say so."""


def port_names_are_short(docs: list[Doc]) -> Iterator[str]:
    for pod in pods(docs):
        names = [port["name"] for port in pod.ports if "name" in port]
        for name in names:
            if not PORT_NAME.match(name):
                yield f"{pod.where}: port name {name!r} should have at most 15 of a-z, 0-9 and single -"
            if names.count(name) > 1:
                yield f"{pod.where}: two ports are called {name!r}"


def grpc_probes_have_numeric_ports(docs: list[Doc]) -> Iterator[str]:
    for where, probe in _probes(docs):
        if "grpc" in probe and not isinstance(probe["grpc"].get("port"), int):
            yield f"{where}: grpc.port {probe['grpc'].get('port')!r} should be a number"


def probed_ports_by_name_exist(docs: list[Doc]) -> Iterator[str]:
    for pod in pods(docs):
        names = {port.get("name") for port in pod.ports}
        for container in pod.containers:
            for kind in PROBES:
                probe = container.get(kind, {})
                port = {**probe.get("httpGet", {}), **probe.get("tcpSocket", {})}.get("port")
                if isinstance(port, str) and port not in names:
                    yield f"{pod.where}: {kind} asks port {port!r}, which no container has"


def servers_have_three_probes(docs: list[Doc]) -> Iterator[str]:
    """Loading, ready and alive are three questions: a front without workers is alive, and must not be killed."""
    for pod in pods(docs):
        for container in pod.containers:
            if not container.get("ports"):
                continue
            for kind in PROBES:
                if kind not in container:
                    yield f"{pod.where}: {container['name']} listens and has no {kind}"
            asked = [container.get(kind, {}).get("grpc") for kind in PROBES]
            if asked[1] and asked[1] == asked[2]:
                yield f"{pod.where}: {container['name']}'s liveness asks what readiness asks: not ready would be killed"


def images_are_pinned(docs: list[Doc]) -> Iterator[str]:
    for pod in pods(docs):
        for container in pod.all_containers:
            if not PINNED.match(container["image"]):
                yield f"{pod.where}: image {container['image']!r} should have a version or a digest"


def pods_are_restricted(docs: list[Doc]) -> Iterator[str]:
    enforced = {
        doc["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
        for doc in of_kind(docs, "Namespace")
    }
    for pod in pods(docs):
        security = pod.spec.get("securityContext", {})
        if not security.get("runAsNonRoot") or security.get("runAsUser", 1) == 0:
            yield f"{pod.where}: securityContext.runAsNonRoot is missing"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.where}: securityContext.seccompProfile should be RuntimeDefault"
        for container in pod.all_containers:
            yield from (f"{pod.where}: {container['name']} {problem}" for problem in _unrestricted(container, enforced))


def _unrestricted(container: Doc, enforced: set[Any]) -> Iterator[str]:
    own = container.get("securityContext", {})
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield "may gain privileges"
    if not own.get("readOnlyRootFilesystem"):
        yield "can write its root filesystem"
    capabilities = own.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"]:
        yield "keeps capabilities"
    added = set(capabilities.get("add", []))
    if added - BEYOND_RESTRICTED:
        yield f"adds {sorted(added - BEYOND_RESTRICTED)}"
    if added and enforced & {"restricted", "baseline"}:
        yield f"adds {sorted(added)}, which its namespace's pod security refuses"


def memory_and_devices_are_reserved(docs: list[Doc]) -> Iterator[str]:
    """Requests equal limits: memory that isn't there kills, and devices can't be shared by halves."""
    for pod in pods(docs):
        for container in pod.all_containers:
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            for name in {"memory", *(key for key in requests | limits if "/" in key)}:
                if name not in limits or requests.get(name) != limits[name]:
                    what = f"requests {requests.get(name)} {name}, its limit is {limits.get(name)}"
                    yield f"{pod.where}: {container['name']} {what}"
            if "cpu" not in requests:
                yield f"{pod.where}: {container['name']} requests no cpu"


def mounts_have_volumes(docs: list[Doc]) -> Iterator[str]:
    maps = {doc["metadata"]["name"] for doc in of_kind(docs, "ConfigMap")}
    claims = {doc["metadata"]["name"] for doc in of_kind(docs, "PersistentVolumeClaim")}
    for pod in pods(docs):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for container in pod.all_containers:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{pod.where}: {container['name']} mounts {mount['name']!r}, which is no volume"
        for volume in volumes.values():
            yield from (f"{pod.where}: {problem}" for problem in _missing(volume, maps, claims))


def _missing(volume: Doc, maps: set[str], claims: set[str]) -> Iterator[str]:
    """Manifests that are applied to what is there (jobs) bring no ConfigMap and no claim of their own."""
    config, claim = volume.get("configMap", {}).get("name"), volume.get("persistentVolumeClaim", {}).get("claimName")
    if config and maps and config not in maps:
        yield f"volume {volume['name']}: no ConfigMap {config}"
    if claim and claims and claim not in claims:
        yield f"volume {volume['name']}: no PersistentVolumeClaim {claim}"


def shared_memory_is_memory(docs: list[Doc]) -> Iterator[str]:
    for pod in pods(docs):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            for mount in container.get("volumeMounts", []):
                empty = volumes.get(mount["name"], {}).get("emptyDir", {})
                if mount["mountPath"] == "/dev/shm" and not (empty.get("medium") == "Memory" and "sizeLimit" in empty):
                    yield f"{pod.where}: /dev/shm should be an emptyDir of medium Memory with a sizeLimit"


def the_end_has_room_for_what_comes_before(docs: list[Doc]) -> Iterator[str]:
    for pod in pods(docs):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        for container in pod.containers:
            if (before := pre_stop_seconds(container)) >= grace:
                yield f"{pod.where}: preStop takes {before} s of terminationGracePeriodSeconds = {grace}"


def pre_stop_seconds(container: Doc) -> int:
    return container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)


def accounts_exist_and_mount_no_token(docs: list[Doc]) -> Iterator[str]:
    accounts = {doc["metadata"]["name"] for doc in of_kind(docs, "ServiceAccount")}
    for pod in pods(docs):
        account = pod.spec.get("serviceAccountName")
        if accounts and account and account not in accounts:
            yield f"{pod.where}: no ServiceAccount {account}"
        if pod.spec.get("automountServiceAccountToken") is not False and not _is_autoscaled_head(pod):
            yield f"{pod.where}: automountServiceAccountToken should be false"


def _is_autoscaled_head(pod: Pods) -> bool:
    return bool(pod.owner["spec"].get("enableInTreeAutoscaling")) and pod.labels.get("ray.io/node-type") == "head"


def _probes(docs: list[Doc]) -> Iterator[tuple[str, Doc]]:
    for pod in pods(docs):
        for container in pod.containers:
            for kind in PROBES:
                if kind in container:
                    yield f"{pod.where}: {container['name']}.{kind}", container[kind]


RULES = (
    port_names_are_short,
    grpc_probes_have_numeric_ports,
    probed_ports_by_name_exist,
    servers_have_three_probes,
    images_are_pinned,
    pods_are_restricted,
    memory_and_devices_are_reserved,
    mounts_have_volumes,
    shared_memory_is_memory,
    the_end_has_room_for_what_comes_before,
    accounts_exist_and_mount_no_token,
)
