"""The generated code beside the .proto files, and the .proto files beside the types they carry."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from subprocess import DEVNULL
from typing import TYPE_CHECKING

import pytest

from diptych import types
from diptych.v1 import admin_pb2, inference_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

ROOT = Path(__file__).parents[2]


def test_regenerating_the_stubs_changes_nothing() -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is in the dev extra: pip install -e '.[dev]'")
    check = [sys.executable, ROOT / "tools" / "generate_protos.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def buf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("buf")
    if not program.exists():
        pytest.skip("buf-bin is in the dev extra: pip install -e '.[dev]'")
    return subprocess.run(
        [program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False, stdin=DEVNULL
    )


def test_the_contract_is_in_bufs_standard_style() -> None:
    for arguments in (["lint"], ["format", "--diff", "--exit-code"]):
        done = buf(ROOT / "proto", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_no_published_message_has_changed_its_meaning() -> None:
    done = buf(ROOT / "proto", "breaking", "--against", "contract.binpb")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_breaking_change_would_be_seen(tmp_path: Path) -> None:
    broken = tmp_path / "proto"
    shutil.copytree(ROOT / "proto", broken, ignore=shutil.ignore_patterns("*.py*"))
    contract = broken / "diptych" / "v1" / "inference.proto"
    contract.write_text(contract.read_text().replace("string request_id = 6;", "string request_name = 16;"))
    done = buf(broken, "breaking", "--against", "contract.binpb")
    assert done.returncode != 0
    assert 'Previously present field "6"' in done.stdout


@pytest.mark.parametrize(
    ("message", "type_"),
    [
        (inference_pb2.Served, types.Served),
        (admin_pb2.WorkerInfo, types.WorkerInfo),
        (admin_pb2.KvLayout, types.KvLayout),
        (admin_pb2.WorkerLoad, types.Load),
        (admin_pb2.WorkerCounters, types.Counters),
        (admin_pb2.WorkerStatus, types.WorkerStatus),
    ],
    ids=lambda value: value.__name__,
)
def test_a_message_carries_every_field_of_its_type(message: type[Message], type_: type) -> None:
    assert {field.name for field in message.DESCRIPTOR.fields} == {field.name for field in fields(type_)}
