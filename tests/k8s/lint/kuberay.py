"""What KubeRay's operator refuses and its CRDs don't say (its validation.go, v1.7). Knows nothing of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.manifests import TREE, Doc, name_of, of_kind

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?$")
CLUSTER_NAME_LENGTH = 53
JOB_NAME_LENGTH = 47
STARTS_WITH_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}
REDIS = {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"}
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
TOKENS_SINCE = (2, 52)
GATED = {"networkPolicy", "tlsOptions", "historyServerOptions"}
PINNED_RAY = re.compile(r"^ray(?:\[default\])?==(\S+)", re.MULTILINE)


def kuberay_takes_the_name(docs: list[Doc]) -> Iterator[str]:
    for doc in of_kind(docs, "RayCluster", "RayJob"):
        longest = CLUSTER_NAME_LENGTH if doc["kind"] == "RayCluster" else JOB_NAME_LENGTH
        name = doc["metadata"]["name"]
        if not DNS_1035.match(name) or len(name) > longest:
            yield f"{name_of(doc)}: should begin with a letter, have a-z, 0-9 and -, and at most {longest} of them"


def kuberay_knows_how_many(docs: list[Doc]) -> Iterator[str]:
    for where, cluster, group in _workers(docs):
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if (low is None or high is None) and not cluster.get("enableInTreeAutoscaling"):
            yield f"{where}: minReplicas and maxReplicas should both be set without an autoscaler"
        elif low is not None and high is not None and not 0 <= low <= group.get("replicas", low) <= high:
            yield f"{where}: {low} minReplicas, {group.get('replicas')} replicas, {high} maxReplicas should ascend"


def kuberay_gets_resources_once(docs: list[Doc]) -> Iterator[str]:
    for where, group in _groups(docs):
        both = STARTS_WITH_RESOURCES & group.get("rayStartParams", {}).keys()
        if both and group.get("resources"):
            yield f"{where}: {sorted(both)} in rayStartParams beside resources"


def kuberay_gets_labels_as_labels(docs: list[Doc]) -> Iterator[str]:
    for where, group in _groups(docs):
        if "labels" in group.get("rayStartParams", {}):
            yield f"{where}: rayStartParams.labels should be the group's labels"


def kuberay_keeps_redis_to_itself(docs: list[Doc]) -> Iterator[str]:
    for where, group in _groups(docs):
        names = {variable["name"] for container in _containers(group) for variable in container.get("env", [])}
        if names & REDIS:
            yield f"{where}: {sorted(names & REDIS)} belongs in gcsFaultToleranceOptions"
        if {"redis-password", "redis-username"} & group.get("rayStartParams", {}).keys():
            yield f"{where}: redis in rayStartParams belongs in gcsFaultToleranceOptions"


def kuberay_restarts_no_autoscaled_pod(docs: list[Doc]) -> Iterator[str]:
    for where, cluster, group in _all(docs):
        scaled = cluster.get("enableInTreeAutoscaling", False)
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if scaled and cluster.get("autoscalerOptions", {}).get("version") == "v2" and policy != "Never":
            yield f"{where}: restartPolicy {policy} should be Never, or left out, with autoscaler v2"
        if group.get("suspend"):
            yield f"{where}: a suspended group needs a feature gate, and no autoscaler"
        names = {variable["name"] for container in _containers(group) for variable in container.get("env", [])}
        if AUTOSCALER_V2 in names:
            yield f"{where}: {AUTOSCALER_V2} should be autoscalerOptions.version"


def kuberay_knows_a_ray_with_tokens(docs: list[Doc]) -> Iterator[str]:
    for doc in of_kind(docs, "RayCluster"):
        if doc["spec"].get("authOptions", {}).get("mode") != "token":
            yield f"{name_of(doc)}: authOptions.mode should be token: Ray listens on all interfaces"
        elif _version(doc["spec"].get("rayVersion", "0")) < TOKENS_SINCE:
            yield f"{name_of(doc)}: rayVersion {doc['spec'].get('rayVersion')} should be 2.52 or later for tokens"


def the_ray_is_the_one_that_is_tested(docs: list[Doc]) -> Iterator[str]:
    pinned = PINNED_RAY.search((TREE / "constraints.txt").read_text())
    assert pinned, "constraints.txt pins ray"
    for doc in of_kind(docs, "RayCluster"):
        if doc["spec"].get("rayVersion") != pinned[1]:
            yield f"{name_of(doc)}: rayVersion {doc['spec'].get('rayVersion')}, but constraints.txt has {pinned[1]}"


def kuberay_needs_no_feature_gate(docs: list[Doc]) -> Iterator[str]:
    for doc in of_kind(docs, "RayCluster"):
        if gated := GATED & doc["spec"].keys():
            yield f"{name_of(doc)}: {sorted(gated)} needs a feature gate of the operator's"


def kuberay_takes_the_job(docs: list[Doc]) -> Iterator[str]:
    for doc in of_kind(docs, "RayJob"):
        spec = doc["spec"]
        chosen = spec.get("clusterSelector", {})
        if bool(chosen) == ("rayClusterSpec" in spec):
            yield f"{name_of(doc)}: should have clusterSelector or rayClusterSpec"
        if chosen and not chosen.get("ray.io/cluster"):
            yield f"{name_of(doc)}: clusterSelector should name a ray.io/cluster"
        if chosen and (spec.get("submissionMode") == "SidecarMode" or spec.get("backoffLimit") or spec.get("suspend")):
            yield f"{name_of(doc)}: clusterSelector excludes SidecarMode, backoffLimit and suspend"
        if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
            yield f"{name_of(doc)}: suspend needs shutdownAfterJobFinishes"


def _all(docs: list[Doc]) -> Iterator[tuple[str, Doc, Doc]]:
    for doc in of_kind(docs, "RayCluster"):
        yield f"{name_of(doc)}, head", doc["spec"], doc["spec"]["headGroupSpec"]
    yield from _workers(docs)


def _workers(docs: list[Doc]) -> Iterator[tuple[str, Doc, Doc]]:
    for doc in of_kind(docs, "RayCluster"):
        for group in doc["spec"].get("workerGroupSpecs", []):
            yield f"{name_of(doc)}, {group['groupName']}", doc["spec"], group


def _groups(docs: list[Doc]) -> Iterator[tuple[str, Doc]]:
    return ((where, group) for where, _, group in _all(docs))


def _containers(group: Doc) -> list[Any]:
    return group["template"]["spec"]["containers"]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


RULES = (
    kuberay_takes_the_name,
    kuberay_knows_how_many,
    kuberay_gets_resources_once,
    kuberay_gets_labels_as_labels,
    kuberay_keeps_redis_to_itself,
    kuberay_restarts_no_autoscaled_pod,
    kuberay_knows_a_ray_with_tokens,
    the_ray_is_the_one_that_is_tested,
    kuberay_needs_no_feature_gate,
    kuberay_takes_the_job,
)
