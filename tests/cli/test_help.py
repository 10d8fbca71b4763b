"""``--help`` answers at once: no command loads anything heavy before it runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import gearshift
from gearshift.cli import app

GROUPS = {group.name: group.typer_instance for group in app.registered_groups if group.typer_instance}
COMMANDS = [
    *(command.name for command in app.registered_commands),
    *(f"{name} {part.name}" for name, group in GROUPS.items() for part in group.registered_commands),
]

# Processor time, not time on the wall: a busy machine must not fail the test.
ASK_ALL = """
import json, sys, time
from typer.testing import CliRunner
from gearshift.cli import app
CliRunner().invoke(app, ["--help"])
seconds = time.process_time()
outputs = {name: CliRunner().invoke(app, [*name.split(), "--help"]).output for name in NAMES}
heavy = [m for m in ("torch", "transformers", "sklearn", "scipy", "plotly", "matplotlib") if m in sys.modules]
print(json.dumps([heavy, seconds, outputs]))
"""


@pytest.fixture(scope="module")
def asked() -> tuple[list[str], float, dict[str, str]]:
    code = ASK_ALL.replace("NAMES", repr(["", *filter(None, COMMANDS)]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


def test_help_loads_nothing_heavy(asked: tuple[list[str], float, dict[str, str]]):
    assert asked[0] == []


def test_help_takes_less_than_a_second(asked: tuple[list[str], float, dict[str, str]]):
    assert asked[1] < 1


def test_help_lists_every_command(asked: tuple[list[str], float, dict[str, str]]):
    assert {"demo", "convert", "calibrate", "train", "bench"} < set(COMMANDS)
    assert {"cost fit", "cost predict", "evaluate run", "evaluate merge"} < set(COMMANDS)
    assert {"search", "generate", "serve", "export", "thin", "info"} < set(COMMANDS)
    assert "presets build" in COMMANDS
    assert all(str(name).split()[0] in asked[2][""] for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str, asked: tuple[list[str], float, dict[str, str]]):
    assert f"Usage: gearshift {name} " in asked[2][name]


def test_version_and_python_module():
    done = subprocess.run(
        [sys.executable, "-m", "gearshift", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"gearshift {gearshift.__version__}\n"
