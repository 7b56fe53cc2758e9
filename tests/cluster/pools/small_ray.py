"""A Ray of a test's own: nodes with CPUs, processes that start, load, stop and die, and a clock that skips what nobody
would see: what is played in an hour takes milliseconds.
"""

from __future__ import annotations

import asyncio
import selectors
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError

from cluster.front.actor import Ports
from diptych.errors import ServingError
from diptych.types import Changed, KvLayout, Operation, WorkerId, WorkerInfo, WorkerSpec

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

LAYOUT = KvLayout(layers=2, kv_heads=2, block_size=16, head_dim=8, dtype="fp32")
_CALL_SECONDS = 0.01
_THREAD_SECONDS = 1.0
"""Long enough for others to come between."""


# ---- the clock ------------------------------------------------------------------------------------


class _Skips(selectors.SelectSelector):
    """Does not wait: the clock is put forward instead."""

    seconds = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everyone waits for ever"
        self.seconds += max(0.0, timeout)
        return super().select(0)


class SkippingLoop(asyncio.SelectorEventLoop):
    """Its time is what timers asked for."""

    def __init__(self) -> None:
        self._skips = _Skips()
        super().__init__(self._skips)

    def time(self) -> float:
        return self._skips.seconds

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """After a moment, as a thread would answer, in this one: a real thread knows nothing of this clock."""
        done = self.create_future()

        def work() -> None:
            if done.cancelled():
                return
            try:
                done.set_result(func(*args))
            except Exception as error:
                done.set_exception(error)

        self.call_later(_THREAD_SECONDS, work)
        return done


# ---- processes ------------------------------------------------------------------------------------


class Process:
    """An actor, behind its handle."""

    def __init__(self, small: SmallRay, kind: str, spec: Any, options: dict[str, Any]) -> None:
        self.small, self.kind, self.spec, self.options = small, kind, spec, options
        self.node = ""
        """Empty until there is room for it."""
        self.placed = asyncio.Event()
        self.died = asyncio.get_running_loop().create_future()
        self.up = False
        self.frozen = False
        self.operations: asyncio.Queue[tuple[int, Operation]] = asyncio.Queue()
        self.settled: dict[int, asyncio.Future[Changed | ServingError]] = {}
        self.stopping = asyncio.Event()

    def die(self) -> None:
        if not self.died.done():
            self.died.set_result(None)
            self.small.place_all()

    async def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Raises RayActorError when it is dead before it answers."""
        answering = asyncio.ensure_future(self._answer(name, arguments))
        try:
            await asyncio.wait({answering, self.died}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            raise RayActorError
        finally:
            answering.cancel()

    async def _answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        await self.placed.wait()
        await asyncio.sleep(_CALL_SECONDS)
        if self.frozen:
            await asyncio.Event().wait()
        match name:
            case "wait_dead":
                await asyncio.Event().wait()
            case "start":
                return await self._start()
            case "stop":
                self.stopping.set()
                await asyncio.sleep(self.small.stop_seconds)
            case "prepare" | "pid":
                return 1
            case "open":
                return Ports(1, 2)
            case "drain" | "silent_seconds":
                return 0
            case "join" | "leave":
                self.small.told.append((name, *_named(arguments)))
            case "away":
                self.small.away = dict(arguments[0])
            case "settle":
                self.settled[arguments[0]].set_result(arguments[1])
            case _:
                return None

    async def _start(self) -> WorkerInfo:
        spec: WorkerSpec = self.spec
        if self.small.crashes(spec):
            self.die()
        await asyncio.sleep(self.small.load_seconds)
        if self.frozen:
            await asyncio.Event().wait()
        self.up = True
        return WorkerInfo(
            id=spec.id, role=spec.role, epoch=spec.epoch, build="b", model_digest="d", layout=LAYOUT, blocks=100,
            max_context=1600, device="cpu", host="h", pid=1, threads=spec.threads, node=self.node,
        )  # fmt: skip

    async def wanted(self) -> AsyncGenerator[Awaitable[tuple[int, Operation]]]:
        while True:
            one = await self.operations.get()
            answered = asyncio.get_running_loop().create_future()
            answered.set_result(one)
            yield answered

    async def perform(self, operation: Operation) -> Changed:
        """As an operator who asks this front."""
        number = len(self.settled)
        settled = self.settled[number] = asyncio.get_running_loop().create_future()
        self.operations.put_nowait((number, operation))
        outcome = await asyncio.wait_for(settled, 900)
        if isinstance(outcome, ServingError):
            raise outcome
        return outcome


def _named(arguments: tuple[Any, ...]) -> tuple[WorkerId, int]:
    return (arguments[0].id, arguments[0].epoch) if len(arguments) == 1 else arguments


async def _silence() -> AsyncGenerator[Any]:
    await asyncio.Event().wait()
    yield


class _Method:
    def __init__(self, process: Process, name: str) -> None:
        self._process, self._name = process, name

    def remote(self, *arguments: Any, **_: Any) -> Any:
        if self._name == "log":
            return _silence()
        if self._name == "operations":
            return self._process.wanted()
        answer = asyncio.ensure_future(self._process.call(self._name, arguments))
        answer.add_done_callback(lambda call: call.cancelled() or call.exception())  # nobody has to hear it
        return answer


class Handle:
    def __init__(self, process: Process) -> None:
        self.process = process

    def __getattr__(self, name: str) -> _Method:
        return _Method(self.process, name)


# ---- Ray ------------------------------------------------------------------------------------------


@dataclass
class SmallRay:
    """Nodes are CPUs by name; processes are placed in the order in which they were asked for."""

    cpus: dict[str, float]
    load_seconds: float = 5.0
    stop_seconds: float = 3.0
    head_is_away: bool = False
    crashes: Callable[[WorkerSpec], bool] = lambda _: False
    processes: list[Process] = field(default_factory=list)
    away: dict[WorkerId, str] = field(default_factory=dict)
    """What the scheduler heard last."""
    classes: set[Any] = field(default_factory=set)
    """Ray's ids of the classes that actors were made of."""
    told: list[tuple[str, WorkerId, int]] = field(default_factory=list)
    """What schedulers heard: "join" or "leave", of whom, of which epoch."""

    def make(self, kind: Any, *, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any) -> Handle:
        """In place of `ray.actor.ActorClass._remote`: Ray's own classes have looked at the options by then."""
        metadata = kind.__ray_metadata__
        self.classes.add(metadata.class_id)
        process = Process(self, metadata.modified_class.__name__.rpartition(".")[2], args[0], options | kwargs)
        self.processes.append(process)
        self.place_all()
        return Handle(process)

    def kill(self, handle: Handle) -> None:
        handle.process.die()

    def nodes(self) -> list[dict[str, Any]]:
        if self.head_is_away:
            raise RuntimeError("the head is away")
        return [
            {"NodeID": name, "NodeManagerAddress": name, "Labels": {}, "Resources": {"CPU": cpus}, "Alive": True}
            for name, cpus in self.cpus.items()
        ]

    def resources(self) -> dict[str, float]:
        return {"CPU": sum(self.cpus.values())}

    def free(self) -> dict[str, float]:
        return {"CPU": sum(map(self._free, self.cpus))}

    def place_all(self) -> None:
        for process in self.processes:
            if process.node or process.died.done():
                continue
            needs = process.options["num_cpus"]
            if node := next((name for name in self._allowed(process) if self._free(name) >= needs), ""):
                process.node = node
                process.placed.set()

    def add_node(self, name: str, cpus: float) -> None:
        self.cpus[name] = cpus
        self.place_all()

    def lose_node(self, name: str) -> None:
        del self.cpus[name]
        for process in self.living():
            if process.node == name:
                process.die()

    def living(self) -> list[Process]:
        return [process for process in self.processes if not process.died.done()]

    def workers(self) -> list[tuple[WorkerId, int, str]]:
        """Processes of workers that are up: who, in which life, where."""
        return sorted((one.spec.id, one.spec.epoch, one.node) for one in self.living() if one.up)

    def worker(self, name: str) -> Process:
        """The one process of that name."""
        [found] = [one for one in self.living() if one.kind == "WorkerActor" and one.spec.id == name]
        return found

    def front(self) -> Process:
        return next(one for one in self.living() if one.kind == "FrontActor")

    def _free(self, node: str) -> float:
        return self.cpus[node] - sum(one.options["num_cpus"] for one in self.living() if one.node == node)

    def _allowed(self, process: Process) -> Iterable[str]:
        if affinity := process.options.get("scheduling_strategy"):
            return [affinity.node_id] if affinity.node_id in self.cpus else []
        avoided = process.options.get("label_selector", {}).get("ray.io/node-id", "!in()")
        return [name for name in self.cpus if name not in avoided.removeprefix("!in(").removesuffix(")").split(",")]
