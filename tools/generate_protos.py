"""Writes the Python beside each .proto: `python tools/generate_protos.py [--check]`. Knows protoc, not the cluster."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE_ROOT = Path(__file__).resolve().parents[1] / "proto"
KINDS = ("python", "pyi", "grpc_python")


def generate(into: Path) -> list[Path]:
    """Runs protoc over every .proto of the module; the files written, relative to `into`."""
    protos = sorted(str(path.relative_to(SOURCE_ROOT)) for path in SOURCE_ROOT.rglob("*.proto"))
    outputs = [f"--{kind}_out={into}" for kind in KINDS]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={SOURCE_ROOT}", *outputs, *protos]
    subprocess.run(command, check=True, timeout=120)
    return sorted(path.relative_to(into) for pattern in ("*_pb2*.py", "*_pb2*.pyi") for path in into.rglob(pattern))


def stale() -> list[str]:
    """Generated files that differ from what their .proto says now, are missing, or have no .proto."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = {str(path): (Path(folder) / path).read_bytes() for path in generate(Path(folder))}
    present = {
        str(path.relative_to(SOURCE_ROOT)): path.read_bytes()
        for pattern in ("*_pb2*.py", "*_pb2*.pyi")
        for path in SOURCE_ROOT.rglob(pattern)
    }
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def main() -> int:
    """Exit status 1 when `--check` finds a stale file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a generated file is stale")
    if not parser.parse_args().check:
        generate(SOURCE_ROOT)
        return 0
    names = stale()
    for name in names:
        print(f"stale: proto/{name}: run python tools/generate_protos.py", file=sys.stderr)
    return 1 if names else 0


if __name__ == "__main__":
    raise SystemExit(main())
