"""Runs the pods of rendered manifests as processes: what a kubelet does, without images and without a cluster.

A pod has a network namespace with an address of its own on one bridge, and mount and process namespaces: its volumes
are there, its root is read-only, its capabilities are dropped, its first process is process 1, and its names are in
/etc/hosts. Left out: the user id (the interpreter lies in root's home here), limits of memory and CPU, network
policies. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import urllib3
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.k8s.manifests import TREE, Doc, Pods
from tests.k8s.pod_network import Network, run

MARK = "K8S_TEST_POD"
TREE_INSIDE = "/tree"
"""Where this source tree is in a pod: outside, it may lie below /tmp."""
INSIDE = ("--mount", "--net", "--pid", "--uts", "--root", "--wd")


def why_not() -> str:
    """Empty where pods can be run."""
    if os.geteuid():
        return "needs root"
    if missing := [name for name in ("ip", "unshare", "setpriv", "nsenter", "mount") if not shutil.which(name)]:
        return f"needs {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return tried.stderr.decode().strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a pod finds where it runs."""

    network: Network
    folder: Path
    hosts: dict[str, str]
    """Names of Services, and the address behind each."""
    image: Mapping[str, str]
    """Variables of the image."""
    configs: Mapping[str, Mapping[str, str]]
    secrets: Mapping[str, Mapping[str, str]]
    seeds: Mapping[str, Path]
    """What lies in a volume of this name already; given to each pod as a copy."""


@dataclass(eq=False)
class Pod:
    """One pod. `added` are the variables that a controller adds to its first container."""

    pods: Pods
    machine: Machine
    added: Mapping[str, str] = field(default_factory=dict)
    command: list[str] | None = None
    """When a controller says it; else the container's own."""
    process: subprocess.Popen[bytes] = field(init=False)
    address: str = field(init=False)
    hook: subprocess.CompletedProcess[str] | None = field(init=False, default=None)
    """What preStop did, once it ran."""

    def __post_init__(self) -> None:
        self.name = f"p{uuid.uuid4().hex[:8]}"
        self.folder = self.machine.folder / self.name
        self.folder.mkdir(parents=True)
        self.address = self.machine.network.add(self.name)
        self._mounted: list[Path] = []
        self._volumes()
        self.log = self.folder / "log"

    @property
    def container(self) -> Doc:
        [only] = self.pods.containers
        return only

    # ---- life ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Init containers to their end, then the container."""
        for before in self.pods.spec.get("initContainers", []):
            with self.log.open("ab") as log:
                first = self._popen(before, before["command"], {}, log)
                assert first.wait(120) == 0, self.log.read_text()
        own = [*self.container.get("command", []), *self.container.get("args", [])]
        with self.log.open("ab") as log:
            self.process = self._popen(self.container, self.command or own, self.added, log)

    def terminate(self) -> tuple[int, float]:
        """As a kubelet: the preStop hook, SIGTERM, and SIGKILL after the grace. Exit status and seconds."""
        begun, grace = time.monotonic(), self.pods.spec.get("terminationGracePeriodSeconds", 30)
        hook = self.container.get("lifecycle", {}).get("preStop", {})
        if "sleep" in hook:
            threading.Event().wait(hook["sleep"]["seconds"])
        if "exec" in hook:  # one that fails is an event, and the end goes on
            self.hook = self.exec(*hook["exec"]["command"], seconds=grace)
        os.kill(self.first_process, signal.SIGTERM)
        try:
            status = self.process.wait(max(0.1, grace - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            self.kill()
            status = -signal.SIGKILL
        return status, time.monotonic() - begun

    def kill(self) -> None:
        """The machine is gone: no signal that could be handled."""
        with suppress(OSError, ValueError):
            os.kill(self.first_process, signal.SIGKILL)
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        if hasattr(self, "process"):
            self.kill()
        for mounted in self._mounted:
            run("umount", mounted)
        self.machine.network.remove(self.name)

    @property
    def first_process(self) -> int:
        """The container's process 1, as it is numbered outside."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        if len(children) != 1:
            raise ValueError(f"{self.pods.where} has no process 1")
        return int(children[0])

    def exec(self, *command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """`kubectl exec`, with the container's variables."""
        inside = ["nsenter", "--target", str(self.first_process), *INSIDE, *command]
        told = self.environment(self.container, self.added)
        return subprocess.run(inside, env=told, capture_output=True, text=True, timeout=seconds, check=False)

    # ---- probes ----------------------------------------------------------------------------------------------

    def passes(self, kind: str) -> bool:
        """One probe, now."""
        probe = self.container[kind]
        seconds = probe.get("timeoutSeconds", 1)
        if "grpc" in probe:
            return self._serving(probe["grpc"]["port"], probe["grpc"].get("service", ""), seconds)
        if "httpGet" in probe:
            return self._answers(probe["httpGet"], seconds)
        return self.exec(*probe["exec"]["command"]).returncode == 0

    def wait_started(self) -> int:
        """Until the startup probe passes; how often it was asked, which must be within its threshold."""
        probe = self.container["startupProbe"]
        for attempt in range(1, probe["failureThreshold"] + 1):
            if self.passes("startupProbe"):
                return attempt
            assert self.process.poll() is None, f"{self.pods.where} ended:\n{self.tail()}"
            threading.Event().wait(probe["periodSeconds"])
        raise AssertionError(f"{self.pods.where} did not start:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text()[-4000:]

    def _serving(self, port: int, service: str, seconds: float) -> bool:
        with grpc.insecure_channel(f"{self.address}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            ask = health_pb2.HealthCheckRequest(service=service)
            try:
                told = health_pb2_grpc.HealthStub(channel).Check(ask, timeout=seconds)
            except grpc.RpcError:
                return False
        return told.status == health_pb2.HealthCheckResponse.SERVING

    def _answers(self, ask: Doc, seconds: float) -> bool:
        port = next((each["containerPort"] for each in self.pods.ports if each["name"] == ask["port"]), ask["port"])
        with urllib3.PoolManager(retries=False, timeout=seconds) as pool:
            try:
                return 200 <= pool.request("GET", f"http://{self.address}:{port}{ask['path']}").status < 400
            except urllib3.exceptions.HTTPError:
                return False

    # ---- the inside ------------------------------------------------------------------------------------------

    def environment(self, container: Doc, added: Mapping[str, str]) -> dict[str, str]:
        own = {each["name"]: self._value(each) for each in container.get("env", [])}
        return {**self.machine.image, **added, **own, MARK: self.name}

    def _value(self, variable: Doc) -> str:
        source = variable.get("valueFrom", {})
        if "secretKeyRef" in source:
            return self.machine.secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
        if "fieldRef" in source:
            path = source["fieldRef"]["fieldPath"]
            if path == "status.podIP":
                return self.address
            return self.pods.labels[path.removeprefix("metadata.labels['").removesuffix("']")]
        return variable["value"]

    def _popen(self, container: Doc, command: list[str], added: Mapping[str, str], log: Any) -> subprocess.Popen[bytes]:
        hosts = self.folder / "hosts"
        names = {"127.0.0.1": "localhost", self.address: self.name}
        known = [*names.items(), *((address, name) for name, address in self.machine.hosts.items())]
        hosts.write_text("".join(f"{address} {name}\n" for address, name in known))
        script = "\n".join([
            "set -eu",
            "mount --make-rprivate /",
            f"root={self.folder}/root",
            'mkdir "$root" 2>/dev/null || true',
            'mount -t tmpfs none "$root"',
            # The machine's own root stands for the image: all of it, read-only, with the volumes over it.
            'for each in /*; do name=${each#/}; case $name in tmp|etc) ;; *)',
            '  if [ -L "$each" ]; then cp -a "$each" "$root/"; elif [ -d "$each" ]; then',
            '    mkdir "$root/$name"; mount --rbind "$each" "$root/$name"',
            '    case $name in proc|dev|sys) ;; *) mount -o remount,bind,ro "$root/$name";; esac',
            "  fi;; esac; done",
            f'cp -a /etc "$root/etc"; cp {hosts} "$root/etc/hosts"',
            f'mkdir -p "$root{TREE_INSIDE}" "$root/tmp"; mount --rbind {TREE} "$root{TREE_INSIDE}"',
            *(self._mount(mount) for mount in container.get("volumeMounts", [])),
            'mount -o remount,ro "$root"',
            f"hostname {self.name}",
            f'exec chroot "$root" setpriv --bounding-set=-all --inh-caps=-all --no-new-privs -- {shlex.join(command)}',
        ])  # fmt: skip
        spaces = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *spaces, "bash", "-c", script],
            env=self.environment(container, added),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def _mount(self, mount: Doc) -> str:
        where, flags = f'"$root{mount["mountPath"]}"', "bind,ro" if mount.get("readOnly") else "bind"
        source = self.folder / "volumes" / mount["name"]
        return f"mkdir -p {where}; mount --bind {source} {where}; mount -o remount,{flags} {where}"

    def _volumes(self) -> None:
        for volume in self.pods.spec.get("volumes", []):
            source = self.folder / "volumes" / volume["name"]
            source.mkdir(parents=True)
            if "configMap" in volume:
                for name, text in self.machine.configs[volume["configMap"]["name"]].items():
                    (source / name).write_text(text)
            elif volume.get("emptyDir", {}).get("medium") == "Memory":
                size = volume["emptyDir"]["sizeLimit"].removesuffix("i")
                run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", source)
                self._mounted.append(source)
            elif seed := self.machine.seeds.get(volume["name"]):
                shutil.copytree(seed, source, dirs_exist_ok=True)
