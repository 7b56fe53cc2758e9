"""Sockets of this process that a library opened and does not show. Knows descriptors, not who uses them."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, TypeAlias

Address: TypeAlias = str
Connections: TypeAlias = dict[tuple[Address, Address], socket.socket]
"""(our end, their end) → a duplicate of ours."""


def is_cut(end: socket.socket) -> bool:
    """Whether nothing can come through it any more."""
    try:
        return end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class File(NamedTuple):
    """A socket of this process. Its number alone says little: another's that closed is given again."""

    number: int
    inode: int


def open_sockets() -> set[File]:
    found: set[File] = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # gone again
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found.add(File(int(name), status.st_ino))
    return found


def listening(files: set[File]) -> set[Address]:
    """Where these sockets accept connections."""
    found: set[Address] = set()
    for end in _duplicates(files):
        with end:
            if end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(f"{end.getsockname()}")
    return found


def connected(files: set[File]) -> Connections:
    """Duplicates of those that are connected."""
    found: Connections = {}
    for end in _duplicates(files):
        ends = _ends(end)
        if ends is None or ends in found:  # another link's duplicate of the same
            end.close()
        else:
            found[ends] = end
    return found


def _ends(end: socket.socket) -> tuple[Address, Address] | None:
    with suppress(OSError):  # listening, or not connected any more
        return f"{end.getsockname()}", f"{end.getpeername()}"
    return None


def _duplicates(files: set[File]) -> Iterator[socket.socket]:
    """Of these sockets; whoever iterates closes them."""
    for file in files:
        with suppress(OSError):  # gone again
            copy = os.dup(file.number)
            if os.fstat(copy).st_ino == file.inode:
                yield socket.socket(fileno=copy)
            else:  # another file has taken the number meanwhile
                os.close(copy)


def close_all(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()
