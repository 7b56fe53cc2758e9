"""What is installed: Ray and how it lets us in, import names, torch and CUDA. Looks at torch in another process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

from cluster.config import Config
from cluster.doctor.finding import Finding, ok, problem, warning
from cluster.ray_address import RayUnusable, check_version, ray_address
from diptych.compiling import reason_against

OUR_NAMES = ("cluster", "workers", "kernels", "diptych")
TORCH_SECONDS = 120.0
_LOOK_AT_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "built": torch.version.cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
    "gloo": torch.distributed.is_gloo_available(),
}))
"""


def check_software(config: Config, environ: Mapping[str, str], home: Path, cache: Path) -> Iterator[Finding]:
    """Ray, names, torch."""
    yield check_ray_version()
    yield check_ray_address(environ)
    yield from check_ray_token(environ, home)
    yield from check_names()
    yield check_compiler(cache)
    yield from check_torch(config)


def check_ray_version() -> Finding:
    """Asks the installed package, not Ray itself, which takes a second to load."""
    try:
        installed = version("ray")
    except PackageNotFoundError:
        return problem("Ray", "is not installed", f"{sys.executable} -m pip install 'ray[default]'")
    try:
        check_version(installed)
    except RayUnusable as error:
        return problem("Ray", installed, str(error))
    return ok("Ray", installed)


def check_ray_address(environ: Mapping[str, str]) -> Finding:
    """Which Ray `serve` would use, and whether that one answers and lets us in."""
    try:
        address = ray_address(environ)
    except RayUnusable as error:
        return problem("Ray to join", environ.get("RAY_ADDRESS", ""), str(error))
    return ok("Ray to join", f"{address} answers" if address else "none: serve starts one of its own")


def check_ray_token(environ: Mapping[str, str], home: Path) -> Iterator[Finding]:
    """`ray start`, `ray job submit` and `ray status` each guess the mode anew from what lies around."""
    mode = environ.get("RAY_AUTH_MODE", "").lower()
    file = Path(environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    if mode not in ("", "token", "disabled"):
        yield problem("Ray token", f"RAY_AUTH_MODE={mode}", "Ray knows token and disabled: set one, or unset it")
    elif mode == "disabled":
        mend = "anyone who reaches its ports runs code here: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node"
        yield warning("Ray token", "RAY_AUTH_MODE=disabled (diptych's own Ray uses a token all the same)", mend)
    elif mode == "token" and not environ.get("RAY_AUTH_TOKEN") and not file.is_file():
        mend = f"set RAY_AUTH_TOKEN, or write 64 hexadecimal digits into {file}"
        yield problem("Ray token", "RAY_AUTH_MODE=token, and there is no token", mend)
    elif not mode and file.is_file():
        found = f"{file} is there and RAY_AUTH_MODE is unset"
        mend = (
            "`ray start` will ask for this token and `ray job submit` will send none (401): "
            "set RAY_AUTH_MODE=token for both. `diptych serve` alone is not concerned"
        )
        yield warning("Ray token", found, mend)
    else:
        yield ok("Ray token", f"RAY_AUTH_MODE={mode}" if mode else "a new one for each Ray of diptych's own")


def check_names() -> Iterator[Finding]:
    """diptych's packages have short names, and one of them is taken on the package index."""
    owners = packages_distributions()
    strangers = {
        name: sorted({owner for owner in owners.get(name, []) if owner != "diptych"})
        for name in OUR_NAMES
        if any(owner != "diptych" for owner in owners.get(name, []))
    }
    home = _home("cluster")
    for name in OUR_NAMES:
        if name != "diptych" and (there := _home(name)) != home:
            strangers.setdefault(name, [str(there)])
    if not strangers:
        yield ok("import names", f"{', '.join(OUR_NAMES)} are diptych's, from {home}")
    for name, others in strangers.items():
        mend = (
            "pip uninstall kernels: transformers imports it when it finds it, and gets diptych's"
            if others == ["kernels"]
            else f"give diptych a virtual environment of its own, or uninstall {', '.join(others)}"
        )
        yield problem("import names", f"{name} belongs to {', '.join(others)} too", mend)


def _home(name: str) -> Path | None:
    """The folder that holds the package that an import would find."""
    spec = find_spec(name)
    return Path(spec.origin).parents[1] if spec is not None and spec.origin else None


def check_compiler(cache: Path) -> Finding:
    """Kernels and prices are in C++ where that compiles; without it all works, slower."""
    about, slower = "C++", "workers compute in torch on a CPU, and the scheduler prices in numpy: both are slower"
    if reason := reason_against():
        return warning(about, reason, f"until then {slower}")
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        mend = "each process compiles for itself, seconds at each start: set DIPTYCH_CACHE to a folder of your own"
        return warning(about, f"{cache} can't be written", mend)
    return ok(about, f"compiled once, into {cache}")


def check_torch(config: Config) -> Iterator[Finding]:
    """In a process of its own: it is large, and may not even load."""
    command = [sys.executable, "-c", _LOOK_AT_TORCH]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TORCH_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        yield problem("torch", f"does not load within {TORCH_SECONDS:.0f} s", "look at the disk and at memory")
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        yield problem("torch", f"can't be imported: {last}", f"{sys.executable} -m pip install --force-reinstall torch")
        return
    yield from judge_torch(json.loads(done.stdout), config.device, has_nvidia=shutil.which("nvidia-smi") is not None)


class Torch(TypedDict):
    """What another process tells of its torch."""

    torch: str
    built: str | None
    """The CUDA version it is built for."""
    devices: list[str]
    nccl: str | None
    gloo: bool


def judge_torch(told: Torch, device: str, *, has_nvidia: bool) -> Iterator[Finding]:
    """Whether it can compute where it is asked to."""
    built = f"CUDA {told['built']}" if told["built"] else "CPU only"
    if told["gloo"]:
        yield ok("torch", f"{told['torch']}, {built}")
    else:
        yield problem("torch", f"{told['torch']} without gloo", "install a build with torch.distributed")
    if told["devices"]:
        yield ok("CUDA", f"{len(told['devices'])} x {told['devices'][0]}, NCCL {told['nccl']}")
    elif device == "cuda":
        mend = "install a driver and a CUDA build of torch, or say --device cpu"
        yield problem("CUDA", "device = cuda, and torch sees no GPU", mend)
    elif has_nvidia:
        mend = "this torch is built for CPU only: install the CUDA build" if not told["built"] else "look at nvidia-smi"
        yield warning("CUDA", "there is an NVIDIA driver, and torch sees no GPU", mend)
    else:
        yield ok("CUDA", "none: workers compute on the CPU")
