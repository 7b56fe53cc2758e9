"""What is said of a download while it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.models.progress import largest_file_bytes, total_bytes

if TYPE_CHECKING:
    import pytest


def test_sizes_of_a_tree(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "big").write_bytes(bytes(3000))
    (tmp_path / "small").write_bytes(bytes(20))
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er" / "big")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert largest_file_bytes(tmp_path) == 3000
    assert total_bytes(tmp_path) == 3020
    assert largest_file_bytes(tmp_path / "nothing") == 0


def test_a_folder_that_is_deleted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kept", "tracker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "wheel").write_bytes(bytes(100))
    scandir = os.scandir

    def late(path: Any) -> Any:
        if str(path).endswith("tracker"):
            os.rename(path, tmp_path.with_name("gone"))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late)
    assert total_bytes(tmp_path) == 100
    assert not (tmp_path / "tracker").exists()
