"""Makes the actors of a cluster: the options they share, and what each is told at birth. Watches nothing.

The one place that creates them: an actor dies with the process that created it, so nothing that
may be killed does. Ray never restarts anything; `cluster.pools.pools` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from math import inf
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import Config
from cluster.config.schema import AdmissionSection
from cluster.config.values import Address
from cluster.front.actor import FrontActor, FrontSpec
from cluster.front.dispatcher import FrontIdentity
from cluster.pools.members import Site, gpu_share
from cluster.pools.numbers import kv_numbers, weight_format
from cluster.pools.room import Room
from cluster.scheduler.actor import SchedulerActor
from cluster.scheduler.admission import AdmissionPolicy
from cluster.scheduler.autoscaler import AutoscalePolicy, Bounds
from cluster.scheduler.costs import Policy
from cluster.scheduler.scheduler import SchedulerSpec
from cluster.source_tree import source_roots
from diptych.build import build_identity
from diptych.hashing import KvIdentity
from diptych.types import FrontId, WorkerSpec
from workers.actors import CONTROL, WorkerActor

_MANY_CALLS = 100_000
"""A waiting grant holds a call open: they must not use up an actor's concurrency."""


class Processes:
    """Of one cluster."""

    def __init__(self, config: Config, site: Site) -> None:
        self._config = config
        self._site = site
        self._avoided: frozenset[str] = frozenset()

    @property
    def avoided(self) -> frozenset[str]:
        """Ray's ids of nodes where no worker starts any more."""
        return self._avoided

    def avoid(self, node: str, alive: Iterable[str]) -> None:
        """From now on. Those that are not `alive` are forgotten: their ids never come back."""
        self._avoided = self._avoided.intersection(alive) | {node}

    def welcome(self, node: str) -> None:
        """It stays after all."""
        self._avoided -= {node}

    def worker(self, spec: WorkerSpec, node: str = "") -> Any:  # noqa: ANN401 (handles are untyped)
        """On `node`, or on any with room for it and its pool's labels."""
        environment = {
            "OMP_NUM_THREADS": str(spec.threads),
            "MKL_NUM_THREADS": str(spec.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        }
        options = actor_options(environment) | self.needs(spec)
        if node:
            options |= here(node)
        elif selector := self.room(spec).selector:
            options |= {"label_selector": selector}
        return _kind(WorkerActor).options(**options).remote(spec)

    def room(self, spec: WorkerSpec) -> Room:
        """What it asks of its node."""
        return Room(self.needs(spec), self.labels(spec), self._avoided)

    def needs(self, spec: WorkerSpec) -> dict[str, float]:
        """What a worker asks of Ray, as its options name it. A Ray of our own is as large as the machine."""
        cpus = float(spec.threads) if self._site.joined else 0.0
        return {"num_cpus": cpus, "num_gpus": gpu_share(self._config, self._site)}

    def labels(self, spec: WorkerSpec) -> dict[str, str]:
        """What its node must have. A Ray of our own is one node, without labels."""
        return self._config.pools.of(spec.role).node_labels if self._site.joined else {}

    def scheduler(self) -> Any:  # noqa: ANN401
        """Where clients reach the cluster."""
        spec = SchedulerSpec(
            model=self._site.model,
            build=build_identity(),
            policy=Policy(how=self._config.placement.how),
            stale_seconds=self._config.kv.lease_seconds,
            admission=_admission_policy(self._config.admission),
            max_running=self._config.engine.max_running,
            autoscale=_autoscale_policy(self._config),
        )
        options = actor_options() | here(self._site.node)
        return _kind(SchedulerActor).options(**options).remote(spec)

    def front(self, front: FrontId, http: Address, grpc: Address) -> Any:  # noqa: ANN401
        """Where clients reach the cluster."""
        identity = KvIdentity(
            model_digest=self._site.model.digest,
            weight_format=weight_format(self._config),
            kv_dtype=kv_numbers(self._config),
        )
        spec = FrontSpec(
            identity=FrontIdentity(
                id=front,
                model=self._site.model.name,
                root=identity.root(),
                patience_seconds=self._config.kv.lease_seconds,
                how=self._config.placement.how,
                recovery_seconds=self._config.front.recovery_seconds,
            ),
            model=self._site.model,
            http=str(http),
            grpc=str(grpc),
            log_level=self._config.log.level,
            log_prompts=self._config.log.prompts,
            grace_seconds=self._site.grace_seconds,
            secret=self._site.secret,
        )
        options = actor_options() | here(self._site.node)
        return _kind(FrontActor).options(**options).remote(spec)


@cache
def _kind(cls: type) -> Any:  # noqa: ANN401
    """Ray's class of it: one for all its lives. Each one made is kept for ever, in the GCS and, with the signatures of
    its methods, in every process that hears of one of its actors.
    """
    groups = {CONTROL: _MANY_CALLS} if cls is WorkerActor else {}
    return ray.remote(max_restarts=0, concurrency_groups=groups)(cls)  # pyright: ignore


def _admission_policy(admission: AdmissionSection) -> AdmissionPolicy:
    queue, share = admission.queue, admission.least_share
    return AdmissionPolicy(
        queue=(queue.high, queue.normal, queue.low),
        least_share=(0.0, share.normal, share.low),
        weights=dict(admission.weights),
        ttft_seconds=admission.ttft_seconds,
        ttft_seconds_per_token=admission.ttft_seconds_per_token,
        give_up=admission.give_up or None,
    )


def _autoscale_policy(config: Config) -> AutoscalePolicy | None:
    told = config.autoscale
    if not told.enabled:
        return None
    least, most = told.workers(config.pools.prefill.workers + config.pools.decode.workers)
    return AutoscalePolicy(
        **told.model_dump(exclude={"enabled", "least", "most", "prefill", "decode"}),
        prefill=Bounds(least=told.prefill.least, most=told.prefill.most or inf),
        decode=Bounds(least=told.decode.least, most=told.decode.most or inf),
        workers=Bounds(least=least, most=most),
    )


def actor_options(environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What all our actors share. Ray adds it to what the job brings: its working_dir, py_modules and variables."""
    roots = [*source_roots(), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**(environment or {}), **({"PYTHONPATH": os.pathsep.join(roots)} if roots else {})}
    return {
        "num_cpus": 0,
        "num_gpus": 0,
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": _MANY_CALLS,
        "max_pending_calls": _MANY_CALLS,
        "runtime_env": {"env_vars": variables},
    }


def here(node: str) -> dict[str, Any]:
    """Options that keep an actor on one machine, as on that whose ports were promised to clients."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
