"""What KubeRay (v1.7, controllers/ray/common/pod.go) makes of a group's pod: its command and its variables."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

from tests.k8s.manifests import Doc, Pods

GCS_PORT = 6379
OVERWRITE = "ray.io/overwrite-container-cmd"
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
FLAGS = ("true", "false")


class Made(NamedTuple):
    """What the operator adds."""

    command: list[str] | None
    """None where the template's own is kept."""
    variables: dict[str, str]


def head_name(cluster: Doc) -> str:
    """Of the head's Service."""
    return f"{cluster['metadata']['name']}-head-svc.{cluster['metadata']['namespace']}.svc.cluster.local"


def made(pods: Pods) -> Made:
    """Of a RayCluster's group."""
    cluster, name = pods.owner, pods.labels["ray.io/group"]
    is_head = pods.labels["ray.io/node-type"] == "head"
    workers = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    start = _start(
        cluster["spec"]["headGroupSpec"] if is_head else workers[name], head="" if is_head else head_name(cluster)
    )
    keeps = pods.template.get("metadata", {}).get("annotations", {}).get(OVERWRITE) == "true"
    generated = f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"
    host = "127.0.0.1" if is_head else head_name(cluster)
    variables = {
        "RAY_ADDRESS": f"{host}:{GCS_PORT}",
        "RAY_PORT": str(GCS_PORT),
        "RAY_CLUSTER_NAME": cluster["metadata"]["name"],
        "RAY_CLUSTER_NAMESPACE": cluster["metadata"]["namespace"],
        "RAY_NODE_TYPE_NAME": name,
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
        "KUBERAY_GEN_RAY_START_CMD": start,
        **({} if is_head else {"FQ_RAY_IP": host, "RAY_IP": host.partition(".")[0]}),
    }
    return Made(None if keeps else ["/bin/bash", "-c", "--", generated], variables)


def _start(group: Doc, *, head: str) -> str:
    """The `ray start` of a group."""
    limits = group["template"]["spec"]["containers"][0]["resources"].get("limits", {})
    given = dict(group["rayStartParams"])
    custom: dict[str, float] = {}
    for name, amount in group.get("resources", {}).items():
        if name.lower() == "cpu":
            given["num-cpus"] = str(math.ceil(float(amount)))
        else:
            custom[name] = float(amount)
    if custom:
        given["resources"] = f"'{json.dumps(custom, separators=(',', ':'))}'"
    if group.get("labels"):
        given["labels"] = ",".join(f"{key}={value}" for key, value in sorted(group["labels"].items()))
    given |= {"address": f"{head}:{GCS_PORT}"} if head else {}
    given = {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"} | given | {"block": "true"}
    if "cpu" in limits:
        given.setdefault("num-cpus", limits["cpu"])
    given.setdefault("memory", str(_bytes(limits["memory"])))
    said = (f" --{name} " if value in FLAGS else f" --{name}={value} " for name, value in sorted(given.items()))
    return f"ray start {'' if head else '--head '}{''.join(said)}"


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]
