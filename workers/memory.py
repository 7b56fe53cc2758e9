"""How much memory KV blocks may take on a device. Knows no model."""

from __future__ import annotations

import os

import torch

_CPU_SHARE = 0.1
_CPU_MOST = 2 << 30
_GPU_SHARE = 0.85


def kv_bytes(wanted: int, device: torch.device) -> int:
    """`wanted` bytes, or a measured share of what is free when 0: a tenth of the machine's
    available memory and at most 2 GiB on a CPU (several workers share it), 85 % on a GPU."""
    if wanted:
        return wanted
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _GPU_SHARE)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(int(free * _CPU_SHARE), _CPU_MOST)
