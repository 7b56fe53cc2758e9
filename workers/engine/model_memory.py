"""Whether a model's weights fit where they are to go. Knows sizes, no tensor."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from workers.engine.model_config import ModelConfig, UnsupportedModel

_GIB = 1 << 30
_NO_LIMIT = 1 << 62
"""What an unlimited cgroup of version 1 says is more."""


class ModelTooLarge(UnsupportedModel):
    """Its weights don't fit in this machine's memory."""


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of all weights, and the tables of rotary positions."""
    tables = config.context * 2 * config.head_dim * (2 if config.local_rope else 1)
    return (config.parameters + tables) * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """What this process may still take: on a CPU, the least of the machine's and its container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _container_bytes(Path("/sys/fs/cgroup")))


def check_room(
    config: ModelConfig, dtype: torch.dtype, room_bytes: int, *, source: str, where: str = "this machine"
) -> None:
    """Raises ModelTooLarge with both numbers. Called before anything is read."""
    needed = weight_bytes(config, dtype)
    if needed <= room_bytes:
        return
    narrower = "" if dtype == torch.bfloat16 else ", model.dtype=bf16 takes half"
    raise ModelTooLarge(
        f"{source}: {config.parameters / 1e9:.1f} billion weights in {str(dtype).removeprefix('torch.')} need "
        f"{needed / _GIB:.1f} GiB, {where} has {room_bytes / _GIB:.1f} GiB left: use fewer workers on it, "
        f"a larger one or a smaller model{narrower}"
    )


def _container_bytes(root: Path) -> int:
    """Limit less use, where a container has a limit; pages of files count as free."""
    for limit, used, statistics, inactive in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            most = (root / limit).read_text().strip()
            taken = int((root / used).read_text())
            lines = [line.split() for line in (root / statistics).read_text().splitlines()]
        except (OSError, ValueError):
            continue
        if most.isdigit() and int(most) < _NO_LIMIT:
            return int(most) - taken + sum(int(value) for name, value in lines if name == inactive)
    return _NO_LIMIT
