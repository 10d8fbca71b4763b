"""The rig, if vLLM is installed, and the tiny supernet that its engines serve."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

RIG = Path(__file__).parent / "rig" / "site"

# Before any test module imports vllm. Where it is not installed, the modules that need it skip themselves.
if importlib.util.find_spec("vllm") is not None:
    sys.path.insert(0, str(RIG))
    from gearshift_rig.environment import prepare

    prepare()
    from gearshift_rig import block_tables

    block_tables.install()


@pytest.fixture(scope="session")
def served_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supernet of six layers whose mixers differ, with a tokenizer and presets. Read it only."""
    from tests.serve.vllm.tiny import write_tiny_supernet

    return write_tiny_supernet(tmp_path_factory.mktemp("served"))
