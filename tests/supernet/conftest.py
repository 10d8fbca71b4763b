"""The supernet that most tests read."""

from __future__ import annotations

import pytest

from gearshift.supernet import SupernetForCausalLM
from tests.supernet.tools import tiny_supernet


@pytest.fixture(scope="session")
def model() -> SupernetForCausalLM:
    """A random supernet of four layers and four mixers. Leave it as it is found."""
    return tiny_supernet(seed=0)
