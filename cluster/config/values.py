"""Values with a syntax of their own: addresses, sizes of memory, labels of nodes. Know no key."""

from __future__ import annotations

import re
from typing import NamedTuple

_POWERS = tuple(enumerate("kmgt", start=1))
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}ib": 1024**power for power, letter in _POWERS},
    **{f"{letter}b": 1000**power for power, letter in _POWERS},
}


class Address(NamedTuple):
    """Where a server listens. Port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """`127.0.0.1:8000`, `localhost:0` or `[::1]:8000`; raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} should put an IPv6 host in brackets: [{host}]:{port}")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} should be HOST:PORT with a port from 0 to 65535, like 127.0.0.1:8000")
    return Address(host, int(port))


def parse_weights(text: str) -> dict[str, float]:
    """`gold=3, free=0.5`; raises ValueError."""
    weights: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, weight = part.rpartition("=")
        try:
            weights[name.strip()] = float(weight)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"{part!r} should be TENANT=WEIGHT, like gold=3")
    return weights


def parse_size(text: str) -> int:
    """`536870912`, `512MiB` or `1.5GB` in bytes; raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} should be auto, a number of bytes, or a size like 512MiB or 2GB")
    return int(float(match[1]) * unit)


def parse_labels(text: str) -> dict[str, str]:
    """`role=prefill,zone=a` as `ray start --labels` takes it; raises ValueError."""
    pairs = [part.strip().partition("=") for part in text.split(",")] if text.strip() else []
    if any(not (key and value) or "=" in value for key, _, value in pairs):
        raise ValueError(f"{text!r} should be KEY=VALUE, or several with commas between, like role=prefill")
    return {key: value for key, _, value in pairs}
