from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train.calibrate.tools import go


@pytest.fixture(scope="session")
def reference(supernet_directory: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted calibration of the tiny supernet. Read it, never write to it."""
    out = tmp_path_factory.mktemp("calibrated") / "run"
    assert go(supernet_directory, texts, out) == out / "supernet"
    return out


@pytest.fixture
def copied(supernet_directory: Path, tmp_path: Path) -> Path:
    """The tiny supernet, to be changed."""
    return shutil.copytree(supernet_directory, tmp_path / "copied")
