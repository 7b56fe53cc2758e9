"""A model's products in panels, kept in a file that later starts and other workers map. Knows no maths.

As with `conversion`, the file's name says what it was made from and by which code. Pages of the file
are shared by all workers of a machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diptych.types import WeightFormat
from kernels.cpu import panels
from kernels.cpu.panels import PANEL_OF, Panels, RowFormat, Rows, panel_bytes, rows_of
from workers.engine.layout import STACKED
from workers.engine.model_memory import available_bytes
from workers.engine.weights import Weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

PackedWeights: TypeAlias = Mapping[str, Panels]
"""By product: `model.layers.3.qkv`, `.output`, `.gate_up`, `.down`, and `head`."""

_MAKERS = (Path(__file__), Path(panels.__file__), Path(panels.__file__).parent / "native" / "packing.cpp")
_ALIGNMENT = 64


class NoRoom(Exception):
    """Neither the disk nor the memory has room for panels; the message says how much was wanted."""


@dataclass(frozen=True, slots=True)
class _Product:
    """What a product's panels are made of: parts whose columns follow one another, or alternate."""

    name: str
    parts: tuple[str, ...]
    alternating: bool = False


def pack_weights(library: ctypes.CDLL, weights: Weights, form: WeightFormat, kept: Path | None) -> PackedWeights:
    """From the file `kept_file` names, or into it. Where it can't be written they lie in memory. Raises NoRoom."""
    if kept and (found := _load(kept)):
        return found
    stored = weights.quantised() if form != "bf16" else {}
    sources = {each.name: _source(each, weights, stored, form) for each in _products(weights)}
    shapes: dict[str, tuple[RowFormat, int, int]] = {}
    for each in _products(weights):
        form_of, parts = sources[each.name]
        inputs = weights.tensors[each.parts[0]].shape[1]
        shapes[each.name] = (form_of, inputs, sum(len(part.data) for part in parts))

    def fill(flat: Tensor) -> PackedWeights:
        packed: dict[str, Panels] = {}
        at = 0
        for each in _products(weights):
            form_of, inputs, columns = shapes[each.name]
            _, parts = sources[each.name]
            size = panel_bytes(PANEL_OF[form_of], inputs, columns)
            addresses = panels.interleaved(*parts) if each.alternating else panels.in_order(parts)
            packed[each.name] = panels.pack(library, form_of, addresses, inputs, flat[at : at + size])
            at += size
        return packed

    size = sum(panel_bytes(PANEL_OF[form_of], inputs, columns) for form_of, inputs, columns in shapes.values())
    if kept and _keep(kept, shapes, size, fill) and (found := _load(kept)):
        return found
    if size > (room := available_bytes(torch.device("cpu"))):
        raise NoRoom(f"a second copy of the weights needs {size >> 20} MiB, {room >> 20} are left")
    return fill(torch.empty(size, dtype=torch.uint8))


def kept_file(folder: Path, digest: str, form: WeightFormat) -> Path:
    """Where panels of this model are kept."""
    code = hashlib.sha256(b"".join(maker.read_bytes() for maker in _MAKERS)).hexdigest()[:12]
    return folder / f"{digest}.{form}.{code}.panels"


# ---- what goes into a product ------------------------------------------------------------------------------


def _products(weights: Weights) -> Iterator[_Product]:
    (qkv, gate_up) = STACKED
    for layer in range(weights.config.layers):
        at = f"model.layers.{layer}"
        yield _Product(f"{at}.qkv", tuple(f"{at}.{part}.weight" for part in qkv))
        yield _Product(f"{at}.output", (f"{at}.self_attn.o_proj.weight",))
        yield _Product(f"{at}.gate_up", tuple(f"{at}.{part}.weight" for part in gate_up), alternating=True)
        yield _Product(f"{at}.down", (f"{at}.mlp.down_proj.weight",))
    yield _Product("head", ("model.embed_tokens.weight" if weights.config.tied else "lm_head.weight",))


def _source(
    product: _Product, weights: Weights, stored: Mapping[str, Rows], form: WeightFormat
) -> tuple[RowFormat, list[Rows]]:
    own = [stored[name] for name in product.parts if name in stored]
    formats = {rows.format for rows in own}
    if len(own) == len(product.parts) and len(formats) == 1:
        return own[0].format, own
    tensors = [weights.tensors[name] for name in product.parts]
    if form in ("auto", "bf16"):
        return "bf16", [rows_of(tensor.contiguous()) for tensor in tensors]
    # The last product decides between tokens that are nearly alike: 8 bits there.
    to: RowFormat = "Q4_1" if form == "int4" and product.name != "head" else "Q8_0"
    return to, [_quantised(tensor, to) for tensor in tensors]


def _quantised(tensor: Tensor, to: RowFormat) -> Rows:
    import gguf  # not every machine with a GPU has it
    from gguf.quants import quantize

    numbers: NDArray[np.float32] = tensor.float().numpy()
    return Rows(to, np.ascontiguousarray(quantize(numbers, gguf.GGMLQuantizationType[to])))


# ---- the file --------------------------------------------------------------------------------------------------


def _load(path: Path) -> PackedWeights | None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            shapes: dict[str, Any] = json.loads(file.read(length)) if length < size else {}
        packed: dict[str, Panels] = {}
        flat = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        at = 8 + length
        for name, (form, inputs, columns) in shapes.items():
            wanted = panel_bytes(PANEL_OF[form], inputs, columns)
            packed[name] = Panels(PANEL_OF[form], inputs, columns, flat[at : at + wanted])
            at += wanted
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    return packed if packed and at == size else None


def _keep(
    path: Path, shapes: Mapping[str, tuple[RowFormat, int, int]], size: int, fill: Callable[[Tensor], PackedWeights]
) -> bool:
    """Whether it is there now."""
    head = json.dumps(shapes).encode()
    head += b" " * (-(8 + len(head)) % _ALIGNMENT)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w+b") as file:
            # Reserved, not only sized: a page that finds no room when it is written kills the process.
            os.posix_fallocate(file.fileno(), 0, 8 + len(head) + size)
            file.write(len(head).to_bytes(8, "little") + head)
            file.flush()
            flat = torch.from_file(str(part), shared=True, size=8 + len(head) + size, dtype=torch.uint8)
            fill(flat[8 + len(head) :])
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    for other in path.parent.glob(f"{path.name.split('.')[0]}.{path.name.split('.')[1]}.*.panels"):
        if other != path:
            with suppress(OSError):
                other.unlink()
    return True
