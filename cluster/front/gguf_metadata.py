"""The key-value header of a GGUF file. Knows neither tensors nor what the keys mean.

The gguf package makes three numpy arrays for each of 98,000 tokens and merges and took 3 s for
the default model; this walk takes a thirtieth of that.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import TypeAlias

from cluster.models.errors import UnsupportedModel

Scalar: TypeAlias = str | int | float | bool
Value: TypeAlias = Scalar | list[Scalar]

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_HEADER = struct.Struct("<4sIQQ")
_LENGTH = struct.Struct("<Q")
_KIND = struct.Struct("<I")


class GgufMetadata:
    """The header's values, asked for by key and by type."""

    def __init__(self, path: Path, values: dict[str, Value]) -> None:
        self.path = path
        self._values = values

    def text(self, key: str) -> str | None:
        """Raises `UnsupportedModel`, as all of these do, when the value is of another type."""
        value = self._values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(key, "a string")

    def whole(self, key: str) -> int | None:
        """A whole number."""
        value = self._values.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self._wrong(key, "a whole number")

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key, default)
        if isinstance(value, bool):
            return value
        raise self._wrong(key, "true or false")

    def texts(self, key: str) -> list[str]:
        """Empty when absent."""
        values = self._list(key)
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) != len(values):
            raise self._wrong(key, "a list of strings")
        return texts

    def numbers(self, key: str) -> list[float]:
        """Empty when absent."""
        values = self._list(key)
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if len(numbers) != len(values):
            raise self._wrong(key, "a list of numbers")
        return numbers

    def _list(self, key: str) -> list[Scalar]:
        value = self._values.get(key, [])
        if isinstance(value, list):
            return value
        raise self._wrong(key, "a list")

    def _wrong(self, key: str, wanted: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.path}: {key} is not {wanted}")


def read_gguf_metadata(path: Path) -> GgufMetadata:
    """Raises `UnsupportedModel` when the file is no GGUF, is cut short or has another version."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return GgufMetadata(path, _Walk(data).values())
    except (struct.error, ValueError, OSError) as error:
        raise UnsupportedModel(f"{path} can't be read as GGUF: {error}") from error


class _Walk:
    """Reads forward through the header. Raises struct.error or ValueError where it makes no sense."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def values(self) -> dict[str, Value]:
        magic, version, _tensors, count = _HEADER.unpack_from(self._data)
        if magic != b"GGUF":
            raise ValueError(f"it starts with {magic!r}")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} (or another byte order), supported are {_VERSIONS}")
        self._at = _HEADER.size
        return {self._string(): self._value(self._take(_KIND)) for _ in range(count)}

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._take(_KIND), self._take(_LENGTH))
        return self._numbers(kind, 1)[0]

    def _array(self, kind: int, count: int) -> list[Scalar]:
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> list[Scalar]:
        if kind not in _FORMATS:
            raise ValueError(f"value of type {kind} at byte {self._at}")
        self._room(count)
        layout = struct.Struct(f"<{count}{_FORMATS[kind]}")
        values = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return list(values)

    def _take(self, layout: struct.Struct) -> int:
        (number,) = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return number

    def _string(self) -> str:
        length = self._take(_LENGTH)
        self._room(length)
        start = self._at
        self._at += length
        return self._data[start : self._at].decode()

    def _room(self, size_bytes: int) -> None:
        """A damaged length must not become a huge allocation."""
        if size_bytes > len(self._data) - self._at:
            raise ValueError(f"it ends within a value of {size_bytes} at byte {self._at}")
