"""Rules between objects: selectors, budgets, network policies, routes. Knows Kubernetes, not what runs in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.k8s.manifests import Doc, Pods, name_of, of_kind, pods, selected

DNS = 53


def budgets_have_one_bound(docs: list[Doc]) -> Iterator[str]:
    for doc in of_kind(docs, "PodDisruptionBudget"):
        bounds = [name for name in ("minAvailable", "maxUnavailable") if name in doc["spec"]]
        if len(bounds) != 1:
            yield f"{name_of(doc)}: should have minAvailable or maxUnavailable, not {' and '.join(bounds) or 'neither'}"


def budgets_of_ray_pods_count_from_below(docs: list[Doc]) -> Iterator[str]:
    """A RayCluster has no scale subresource: only a number of minAvailable can be reckoned with."""
    for doc in of_kind(docs, "PodDisruptionBudget"):
        chosen = selected(doc["spec"]["selector"], docs)
        of_ray = any(pod.owner["kind"] == "RayCluster" for pod in chosen)
        if of_ray and not isinstance(doc["spec"].get("minAvailable"), int):
            yield f"{name_of(doc)}: its pods are a RayCluster's, which has no scale: give minAvailable as a number"


def roles_have_a_budget(docs: list[Doc]) -> Iterator[str]:
    budgets = of_kind(docs, "PodDisruptionBudget")
    for pod in pods(docs):
        if pod.owner["kind"] == "Job" or not pod.labels.get("ray.io/group"):
            continue
        if not any(pod in selected(budget["spec"]["selector"], docs) for budget in budgets):
            yield f"{pod.where}: no PodDisruptionBudget selects it"


def selectors_match(docs: list[Doc]) -> Iterator[str]:
    if not pods(docs):
        return
    for doc, what, selector in _selectors(docs):
        if not selected(selector, docs):
            yield f"{name_of(doc)}: {what} {selector.get('matchLabels')} matches no pod"


def _selectors(docs: list[Doc]) -> Iterator[tuple[Doc, str, Doc]]:
    for doc in of_kind(docs, "Service"):
        yield doc, "selector", {"matchLabels": doc["spec"]["selector"]}
    for doc in of_kind(docs, "PodDisruptionBudget", "PodMonitor", "InferencePool"):
        yield doc, "selector", doc["spec"]["selector"]
    for doc in of_kind(docs, "NetworkPolicy"):
        yield doc, "podSelector", doc["spec"]["podSelector"]
        for peer in _peers(doc):
            if "podSelector" in peer and "namespaceSelector" not in peer:
                yield doc, "peer", peer["podSelector"]


def _peers(policy: Doc) -> Iterator[Doc]:
    for rule in policy["spec"].get("ingress", []):
        yield from rule.get("from", [])
    for rule in policy["spec"].get("egress", []):
        yield from rule.get("to", [])


def ports_by_name_exist(docs: list[Doc]) -> Iterator[str]:
    for doc, port, chosen in _named_ports(docs):
        for pod in chosen:
            if isinstance(port, str) and port not in {each.get("name") for each in pod.ports}:
                yield f"{name_of(doc)}: {pod.where} has no port called {port!r}"
            if isinstance(port, int) and port not in {each["containerPort"] for each in pod.ports}:
                yield f"{name_of(doc)}: {pod.where} does not listen on {port}"


def _named_ports(docs: list[Doc]) -> Iterator[tuple[Doc, Any, list[Pods]]]:
    for doc in of_kind(docs, "Service"):
        for port in doc["spec"]["ports"]:
            yield doc, port.get("targetPort", port["port"]), selected({"matchLabels": doc["spec"]["selector"]}, docs)
    for doc in of_kind(docs, "PodMonitor"):
        for end in doc["spec"]["podMetricsEndpoints"]:
            yield doc, end.get("port"), selected(doc["spec"]["selector"], docs)
    for doc in of_kind(docs, "InferencePool"):
        for port in doc["spec"]["targetPorts"]:
            yield doc, port["number"], selected(doc["spec"]["selector"], docs)
    for doc in of_kind(docs, "NetworkPolicy"):
        chosen = selected(doc["spec"]["podSelector"], docs)
        for rule in doc["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                # A policy may be wider than one pod's ports: some pod has to have it.
                if not any(_listens(pod, port["port"]) for pod in chosen):
                    yield doc, port["port"], chosen[:1]


def _listens(pod: Pods, port: Any) -> bool:
    return any(port in (each.get("name"), each["containerPort"]) for each in pod.ports)


def scrapes_are_let_through(docs: list[Doc]) -> Iterator[str]:
    """Every pod is shut by a policy, so Prometheus needs one that opens."""
    if not of_kind(docs, "NetworkPolicy"):
        return
    for monitor in of_kind(docs, "PodMonitor"):
        for pod in selected(monitor["spec"]["selector"], docs):
            for end in monitor["spec"]["podMetricsEndpoints"]:
                if not _open_from_another_namespace(docs, pod, end["port"]):
                    what = f"{end['port']} of {pod.where}"
                    yield f"{name_of(monitor)}: no NetworkPolicy lets another namespace reach {what}"


def _open_from_another_namespace(docs: list[Doc], pod: Pods, port: str) -> bool:
    number = next((each["containerPort"] for each in pod.ports if each.get("name") == port), None)
    for policy in of_kind(docs, "NetworkPolicy"):
        if pod not in selected(policy["spec"]["podSelector"], docs):
            continue
        for rule in policy["spec"].get("ingress", []):
            outside = any("namespaceSelector" in peer for peer in rule.get("from", []))
            if outside and any(each["port"] in (port, number) for each in rule.get("ports", [])):
                return True
    return False


def names_can_be_looked_up(docs: list[Doc]) -> Iterator[str]:
    """Where egress is limited, DNS is let through over UDP and TCP."""
    limited = [doc for doc in of_kind(docs, "NetworkPolicy") if "Egress" in doc["spec"].get("policyTypes", [])]
    for pod in pods(docs):
        over = [policy for policy in limited if pod in selected(policy["spec"]["podSelector"], docs)]
        opened = {
            port["protocol"]
            for policy in over
            for rule in policy["spec"].get("egress", [])
            for port in rule.get("ports", [])
            if port.get("port") == DNS
        }
        if over and opened != {"UDP", "TCP"}:
            yield f"{pod.where}: its egress is limited and DNS (53, UDP and TCP) is not let through"


def routes_lead_somewhere(docs: list[Doc]) -> Iterator[str]:
    services = {doc["metadata"]["name"]: doc for doc in of_kind(docs, "Service")}
    gateways = {doc["metadata"]["name"] for doc in of_kind(docs, "Gateway")}
    for route in of_kind(docs, "HTTPRoute", "GRPCRoute"):
        for parent in route["spec"]["parentRefs"]:
            if parent["name"] not in gateways:
                yield f"{name_of(route)}: no Gateway {parent['name']}"
        for rule in route["spec"]["rules"]:
            for end in rule.get("backendRefs", []):
                ports = [port["port"] for port in services.get(end["name"], {"spec": {"ports": []}})["spec"]["ports"]]
                if end["port"] not in ports:
                    yield f"{name_of(route)}: no Service {end['name']} with port {end['port']}"


RULES = (
    budgets_have_one_bound,
    budgets_of_ray_pods_count_from_below,
    roles_have_a_budget,
    selectors_match,
    ports_by_name_exist,
    scrapes_are_let_through,
    names_can_be_looked_up,
    routes_lead_somewhere,
)
