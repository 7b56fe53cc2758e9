"""What manifests say of diptych: commands, configuration, labels, metrics, its stop. Asks the code itself."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from cluster.cli.main import diptych
from cluster.config import Config, ConfigError, load
from cluster.observe.cluster_metrics import ClusterCollector
from cluster.observe.metrics import FrontMetrics
from cluster.pools.members import stop_seconds
from diptych.types import ClusterStatus
from diptych.v1 import admin_pb2, inference_pb2
from tests.k8s.lint.commands import Command, commands
from tests.k8s.lint.pods import PROBES, pre_stop_seconds
from tests.k8s.manifests import Doc, Pods, name_of, of_kind, pods

PROMQL_NAME = re.compile(r"(?<![\w:$])([a-zA-Z_][\w:]*)(?!\s*\()(?![\w:])")
PROMQL_WORDS = {"by", "without", "and", "or", "unless", "on", "ignoring", "le", "offset", "bool", "group_left"}
OTHERS = ("ray_", "up")
"""Metrics of Ray and of Prometheus itself."""
SERVES = "serve"
NODE_END_SECONDS = 30
"""A raylet ends its processes one by one."""


def commands_exist(docs: list[Doc]) -> Iterator[str]:
    """With the arguments that they are given."""
    for command in commands(docs):
        try:
            _parsed(command)
        except click.ClickException as error:
            yield f"{command.where}: diptych {' '.join(command.arguments)}: {error.format_message()}"


def _parsed(command: Command) -> None:
    name, *arguments = command.arguments
    found = diptych.get_command(click.Context(diptych), name)
    if found is None:
        raise click.UsageError(f"no such command {name}")
    found.make_context(name, list(arguments))


def configuration_loads(docs: list[Doc]) -> Iterator[str]:
    """Every file, every variable, every --set."""
    for doc in of_kind(docs, "ConfigMap"):
        for file, text in doc.get("data", {}).items():
            if file.endswith(".toml"):
                yield from _config_problems(f"{name_of(doc)}: {file}", text)
    for pod in pods(docs):
        for container in pod.all_containers:
            said = {each["name"]: each.get("value", "1") for each in container.get("env", [])}
            ours = {name: value for name, value in said.items() if name.startswith("DIPTYCH_")}
            if problems := _problems(lambda ours=ours: load(None, ours)):
                yield from (f"{pod.where}: {problem}" for problem in problems)


def _config_problems(where: str, text: str) -> Iterator[str]:
    for problem in _problems(lambda: _config(text)):
        yield f"{where}: {problem}"


def _problems(loads: Any) -> tuple[str, ...]:
    try:
        loads()
    except ConfigError as error:
        return error.problems
    return ()


def _config(text: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "diptych.toml")
        file.write_text(text)
        return load(file)


def _configs(docs: list[Doc]) -> Iterator[Config]:
    for doc in of_kind(docs, "ConfigMap"):
        for file, text in doc.get("data", {}).items():
            if file.endswith(".toml") and not _problems(lambda text=text: _config(text)):
                yield _config(text)


def pools_find_their_nodes(docs: list[Doc]) -> Iterator[str]:
    """Some pods have the labels, as many as there are workers, each with the CPUs and GPUs of one."""
    for config in _configs(docs):
        for name in ("prefill", "decode", "mixed"):
            pool = config.pools.of(name)
            if not (pool.workers and pool.labels):
                continue
            found = [pod for pod in pods(docs) if pool.node_labels.items() <= pod.node_labels.items()]
            if not found:
                yield f"pools.{name}.labels = {pool.labels!r}: no pod's Ray node has them"
            scaled = any(pod.owner["spec"].get("enableInTreeAutoscaling") for pod in found)
            if found and not scaled and sum(pod.replicas for pod in found) < pool.workers:
                there = sum(pod.replicas for pod in found)
                yield f"pools.{name}.workers = {pool.workers}: only {there} pods are for them"
            for pod in found:
                yield from (f"{pod.where}: {problem}" for problem in _too_small(pod, config))


def _too_small(pod: Pods, config: Config) -> Iterator[str]:
    limits = pod.containers[0]["resources"].get("limits", {})
    if not config.engine.threads:
        yield "engine.threads should be said: nodes come one by one, and nothing can be shared out"
    elif config.engine.threads > int(limits.get("cpu", 0)):
        yield f"engine.threads = {config.engine.threads}, but the limit is {limits.get('cpu')} cpu"
    if config.engine.gpus > float(limits.get("nvidia.com/gpu", 0)):
        yield f"engine.gpus = {config.engine.gpus}, but the limit is {limits.get('nvidia.com/gpu', 0)} nvidia.com/gpu"


def fronts_listen_where_services_lead(docs: list[Doc]) -> Iterator[str]:
    for config in _configs(docs):
        for pod in _serving(docs):
            ports = {port.get("name"): port["containerPort"] for port in pod.ports}
            for name, address in (("http", config.front.http_address), ("grpc", config.front.grpc_address)):
                if ports.get(name) != address.port:
                    yield f"{pod.where}: port {name} is {ports.get(name)}, front.{name} = {config.front.http}"
                if address.host in ("127.0.0.1", "::1", "localhost"):
                    yield f"{pod.where}: front.{name} = {address} is not reached from outside the pod"


def a_stop_in_order_fits_its_grace(docs: list[Doc]) -> Iterator[str]:
    """The drain bound: preStop, then what `diptych serve` takes after SIGTERM."""
    for config in _configs(docs):
        for pod in _serving(docs):
            needed = max(map(pre_stop_seconds, pod.containers)) + stop_seconds(config.cluster.grace_seconds)
            given = pod.spec.get("terminationGracePeriodSeconds", 30)
            if given < needed:
                yield f"{pod.where}: a stop may take {needed} s, terminationGracePeriodSeconds is {given}"


def a_drain_fits_its_grace(docs: list[Doc]) -> Iterator[str]:
    """As preStop it is bounded by cluster.drain_seconds; then SIGTERM ends the Ray node."""
    draining = {where for where, _ in _drains(docs)}
    for config in _configs(docs):
        for pod in pods(docs):
            given = pod.spec.get("terminationGracePeriodSeconds", 30)
            bound = config.cluster.drain_seconds
            if pod.where in draining and given < bound + NODE_END_SECONDS:
                took = f"a drain may take {bound:g} s and the Ray node's end {NODE_END_SECONDS}"
                yield f"{pod.where}: {took}, terminationGracePeriodSeconds is {given}"


def workers_drain_before_their_end(docs: list[Doc]) -> Iterator[str]:
    """By their node: a pod doesn't know which workers Ray put on it."""
    draining = {where for where, arguments in _drains(docs) if "--node" in arguments}
    for config in _configs(docs):
        for name in ("prefill", "decode", "mixed"):
            labels = config.pools.of(name).node_labels
            found = [pod for pod in pods(docs) if labels and labels.items() <= pod.node_labels.items()]
            for pod in found:
                if pod.where not in draining:
                    yield f"{pod.where}: workers of pools.{name} end here without `diptych drain --node` as preStop"


def _drains(docs: list[Doc]) -> Iterator[tuple[str, list[str]]]:
    """Which pods, and with which arguments."""
    for command in commands(docs):
        where, _, when = command.where.rpartition(": ")
        if when == "preStop" and command.arguments[0] == "drain":
            yield where, command.arguments


def _serving(docs: list[Doc]) -> list[Pods]:
    where = {command.where.partition(":")[0] for command in commands(docs) if command.arguments[0] == SERVES}
    return [pod for pod in pods(docs) if pod.where in where]


def grpc_probes_ask_services_that_there_are(docs: list[Doc]) -> Iterator[str]:
    modules = (admin_pb2, inference_pb2)
    known = {service.full_name for module in modules for service in module.DESCRIPTOR.services_by_name.values()}
    for pod in pods(docs):
        for container in pod.containers:
            for kind in PROBES:
                asked = container.get(kind, {}).get("grpc", {}).get("service", "")
                if asked and asked not in known:
                    yield f"{pod.where}: {kind} asks {asked}; there are {', '.join(sorted(known))}"


def metrics_exist(docs: list[Doc]) -> Iterator[str]:
    known = exported()
    for where, expression in _expressions(docs):
        for name in metrics_in(expression):
            if name not in known and not name.startswith(OTHERS):
                yield f"{where}: nothing exports {name} ({expression})"


def _expressions(docs: list[Doc]) -> Iterator[tuple[str, str]]:
    for doc in of_kind(docs, "PrometheusRule"):
        for group in doc["spec"]["groups"]:
            yield from ((f"{name_of(doc)}: {rule.get('alert')}", rule["expr"]) for rule in group["rules"])
    for doc in of_kind(docs, "ConfigMap"):
        if doc["metadata"].get("labels", {}).get("grafana_dashboard"):
            for text in doc["data"].values():
                for panel in json.loads(text)["panels"]:
                    yield from ((f"{name_of(doc)}: {panel['title']}", target["expr"]) for target in panel["targets"])
    for doc in of_kind(docs, "ScaledObject"):
        for trigger in doc["spec"]["triggers"]:
            yield f"{name_of(doc)}: {trigger['type']}", trigger.get("metadata", {}).get("query", "")


def metrics_in(expression: str) -> set[str]:
    """Names in PromQL that are no function, keyword, label or string."""
    bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    return {name for name in PROMQL_NAME.findall(bare) if name not in PROMQL_WORDS}


def exported() -> set[str]:
    """What a scrape of a front has, as PromQL names it."""
    registry = CollectorRegistry()
    registry.register(
        ClusterCollector(ClusterStatus(model="m", build="b", workers=(), requests_placed=0, index_blocks=0))
    )
    text = generate_latest(registry) + generate_latest(FrontMetrics("m")._registry)
    names: set[str] = set()
    for family in text_string_to_metric_families(text.decode()):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name.removesuffix("_total") + suffix for suffix in suffixes} | {family.name}
    return names


RULES = (
    commands_exist,
    configuration_loads,
    pools_find_their_nodes,
    fronts_listen_where_services_lead,
    a_stop_in_order_fits_its_grace,
    a_drain_fits_its_grace,
    workers_drain_before_their_end,
    grpc_probes_ask_services_that_there_are,
    metrics_exist,
)
