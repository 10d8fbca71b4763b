"""Running the command line inside a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from gearshift.cli import app

Gearshift = Callable[..., Result]


@pytest.fixture
def gearshift() -> Gearshift:
    """Call it with a command's arguments; an unexpected exception fails the test."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    return run
