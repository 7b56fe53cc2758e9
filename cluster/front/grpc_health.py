"""Standard gRPC health, asked of the service at each check. Knows readiness, not what it depends on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

if TYPE_CHECKING:
    from grpc_health.v1.health_pb2 import HealthCheckRequest

    from cluster.front.grpc_calls import Context
    from cluster.front.service import Service

WATCH_SECONDS: Final = 1.0
"""How late a watcher may learn of a change: readiness is a question, nobody announces it."""


class Health(HealthServicer):
    """SERVING for "" and the inference service while a request would be placed.

    The admin service is SERVING as long as the process answers, ready or not: liveness probes ask for it.
    """

    def __init__(self, service: Service, follows_ready: frozenset[str], always: frozenset[str]) -> None:
        self._service = service
        self._follows_ready = follows_ready
        self._always = always

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:
        """NOT_FOUND for a service that isn't here."""
        status = self._status(request.service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:100]!r} here")
        return HealthCheckResponse(status=status)

    async def Watch(self, request: HealthCheckRequest, context: Context) -> None:
        """The status now, and whenever it changes."""
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                await context.write(HealthCheckResponse(status=status))
                told = status
            await asyncio.sleep(WATCH_SECONDS)

    def _status(self, name: str) -> HealthCheckResponse.ServingStatus:
        if name in self._always:
            return HealthCheckResponse.SERVING
        if name not in self._follows_ready:
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if self._service.ready else HealthCheckResponse.NOT_SERVING
