"""A model folder from the Hugging Face hub, into the hub library's own cache. Knows no file format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.models.errors import ModelUnreachable
from cluster.models.progress import Step, megabytes, total_bytes, watched
from diptych.errors import UnknownModel

_WANTED = ("*.json", "*.safetensors", "*.jinja")


def fetch_from_hub(name: str, *, progress: Callable[[str], None]) -> Path:
    """The snapshot's folder. Asks nobody when HF_HUB_OFFLINE is set."""
    # Imported late: it costs 0.5 s, and most starts don't need it.
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    stored = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    progress(f"Asking the Hugging Face hub for {name}")

    def describe() -> Step:
        here = total_bytes(stored)
        return Step(f"Fetching {name}: {megabytes(here)} here", here)

    with watched(progress, describe):
        try:
            return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
        except RepositoryNotFoundError as error:
            raise UnknownModel(
                f"no model {name!r}: there is no such file or folder here, and the Hugging Face hub has no such "
                "repository (or HF_TOKEN doesn't open it)"
            ) from error
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise ModelUnreachable(
                f"{name} can't be fetched from the Hugging Face hub: {error}. Check the network, HF_ENDPOINT and "
                "HF_HUB_OFFLINE, or name a local folder as the model"
            ) from error
