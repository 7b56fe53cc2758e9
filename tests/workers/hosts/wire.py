"""Two hosts on this machine: network namespaces, and a cable between them with delay, loss and a cut.

Knows no worker.
`tc` has no netem in every kernel (not in this one), so the cable is a thread that moves Ethernet frames between two tap
devices: what it holds back or drops, TCP has to make good, as between machines. Needs root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from tests.workers.crashes.worker_process import enter

TUNSETIFF = 0x400454CA
IFF_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
FRAME_BYTES = 65536
SUBNET = "198.18.78"
"""Of the range for benchmarks (RFC 2544)."""


def why_not() -> str:
    """Empty where there can be two hosts."""
    if os.geteuid():
        return "needs root"
    if not shutil.which("ip"):
        return "needs ip (iproute2)"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip()


class Wire:
    """Set its attributes at any time; both directions alike."""

    def __init__(self) -> None:
        self.delay_seconds = 0.0
        self.loss = 0.0
        """The probability that a frame is lost; drawn from a fixed seed."""
        self.cut = False
        self.passed = 0
        self.lost = 0
        self.names = tuple(f"h{uuid.uuid4().hex[:8]}" for _ in range(2))
        self.addresses = (f"{SUBNET}.1", f"{SUBNET}.2")
        self._random = random.Random(7)
        self._end, self._told = os.pipe()

    def __enter__(self) -> Self:
        self._taps = [self._host(*pair) for pair in zip(self.names, self.addresses, strict=True)]
        self._thread = threading.Thread(target=self._move, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._told)
        self._thread.join(10)
        for descriptor in [*self._taps, self._end]:
            os.close(descriptor)
        for name in self.names:
            ip("netns", "delete", name)

    def _host(self, name: str, address: str) -> int:
        """A namespace with one tap; the tap's descriptor works from outside too."""
        ip("netns", "add", name)
        tap = in_thread(lambda: _tap(name))
        ip("-netns", name, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-netns", name, "link", "set", "eth0", "up")
        ip("-netns", name, "link", "set", "lo", "up")
        return tap

    def _move(self) -> None:
        """Until told to end."""
        waiting: list[tuple[float, int, int, bytes]] = []
        count = 0
        while True:
            timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            readable, _, _ = select.select([*self._taps, self._end], [], [], timeout)
            if self._end in readable:
                return
            for tap in readable:
                frame, count = os.read(tap, FRAME_BYTES), count + 1
                if self.cut or self._random.random() < self.loss:
                    self.lost += 1
                    continue
                other = self._taps[1 - self._taps.index(tap)]
                heapq.heappush(waiting, (time.monotonic() + self.delay_seconds, count, other, frame))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, tap, frame = heapq.heappop(waiting)
                os.write(tap, frame)
                self.passed += 1


def _tap(namespace: str) -> int:
    enter(namespace)
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP_WITHOUT_HEADER))
    return descriptor


def in_thread(work: Callable[[], int]) -> int:
    """In a thread that ends with it: which namespace one is in is a thread's own affair."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(10)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10)
