"""Who may listen on an address: one front, and for a moment its successor beside it. Knows no protocol."""

from __future__ import annotations

import socket


def split(host_port: str) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """What `socket` wants of "host:port"; an IPv6 host may stand in brackets."""
    host, _, port = host_port.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return family, (host.strip("[]"), int(port))


def check_free(host_port: str) -> None:
    """Raises OSError when somebody listens there. (Listeners that share a port don't notice each other.)"""
    family, address = split(host_port)
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
