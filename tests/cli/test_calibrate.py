"""``gearshift calibrate``: what it prints, a Ctrl-C in the middle, and what is refused."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gearshift.cli import calibrate
from gearshift.files import read_json, read_json_lines
from gearshift.inspect_directory import inspect_directory

Gearshift = Callable[..., Result]
SMALL = ("--tokens", 480, "--sequence-length", 16, "--steps", 2, "--learning-rate", 1e-3, "--device", "cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("".join(f"def add_{n}(a, b):\n    return a + {n} * b\n\n\n" for n in range(20)))
    return path


@pytest.fixture
def calibrated(gearshift: Gearshift, supernet_directory: Path, text: Path, tmp_path: Path):
    """Call it with further options; the result goes to ``run``."""

    def run(*options: object) -> Result:
        given = ("--data", text, "--out", tmp_path / "run")
        return gearshift("calibrate", supernet_directory, *given, *SMALL, *options)

    return run


def test_it_prints_a_line_a_layer_and_where_the_result_is(
    calibrated: Gearshift, supernet_directory: Path, tmp_path: Path
):
    result = calibrated()
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if not line.startswith("    ")]
    assert lines[0] == "relative error of each mixer's output, before and after"
    error = r"\d\.\d{3}"
    for layer, line in enumerate(lines[1:4]):
        mixers = "  ".join(f"{name} {error} -> {error}" for name in ("swa", "gdn", "kda"))
        assert re.fullmatch(f"layer {layer}   {mixers}", line)
    written = tmp_path / "run" / "supernet"
    assert lines[4:] == [
        f"supernet written to {written}",
        f"next: gearshift train recipes/demo.yaml --set supernet={written}",
    ]
    assert inspect_directory(written).missing == []
    row = read_json_lines(tmp_path / "run" / "calibration.jsonl")[1]
    assert f"gdn {row['before']:.3f} -> {row['after']:.3f}" in lines[1]


def test_options_reach_the_settings(calibrated: Gearshift, tmp_path: Path):
    options = ("--seed", 7, "--batch-size", 3, "--ridge", 0.5, "--parts", " ridge, decay")
    assert calibrated(*options).exit_code == 0
    assert read_json(tmp_path / "run" / "settings.json")["settings"] == {
        "tokens": 480,
        "sequence_length": 16,
        "steps": 2,
        "batch_size": 3,
        "learning_rate": 1e-3,
        "ridge": 0.5,
        "seed": 7,
        "parts": ["decay", "ridge"],
    }


def test_notes_stand_below_their_layer(calibrated: Gearshift, tmp_path: Path):
    shown = calibrated("--parts", "steps", "--learning-rate", 1e3).stdout.splitlines()
    first = next(n for n, line in enumerate(shown) if line.startswith("layer 0"))
    assert shown[first + 1].startswith("          swa: its steps ended early: ")
    assert shown[first + 1].endswith("a smaller learning_rate may help")
    assert shown[first + 2] == "          swa: nothing brought it nearer, so it stays as it was"


def test_an_error_that_is_no_number_is_said_so(capsys: pytest.CaptureFixture[str]):
    row = {"layer": 12, "mixer": "gated_delta_net", "before": None, "after": 0.25, "notes": ["a note"]}
    calibrate._print_layer([row])
    calibrate._print_layer([])
    assert capsys.readouterr().out == "layer 12  gdn no number -> 0.250\n          gdn: a note\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", 0], "steps is 0; expected a whole number of at least 1"),
        (["--ridge", 0], "ridge is 0.0; expected a positive number"),
        (["--learning-rate", "nan"], "learning_rate is nan; expected a positive number"),
        (["--seed", -1], "seed is -1"),
        (
            ["--parts", "decay,magic"],
            "parts are decay, magic; expected some of decay, steps, ridge, each once",
        ),
        (["--parts", ""], "parts are none; expected some of"),
        (["--sequence-length", 129], "sequence_length is 129; the teacher was made for 128 tokens"),
        (["--tokens", 31], "tokens is 31; expected at least two sequences of 16"),
        (["--data", "nowhere.py"], "nowhere.py does not exist"),
    ],
)
def test_wrong_options_are_refused(options: list[object], said: str, calibrated: Gearshift, tmp_path: Path):
    result = calibrated(*options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--steps", "many"], ["--device", "abacus"], ["--windows", 3]])
def test_options_of_no_meaning_end_with_the_usage(options: list[object], calibrated: Gearshift):
    result = calibrated(*options)
    assert result.exit_code == 2
    assert str(options[0]) in result.stderr


def test_what_is_missing_is_asked_for(gearshift: Gearshift, supernet_directory: Path, text: Path):
    assert "--out" in gearshift("calibrate", supernet_directory, "--data", text).stderr
    assert "--data" in gearshift("calibrate", supernet_directory, "--out", "run").stderr


def test_what_is_no_supernet_is_refused(
    gearshift: Gearshift, teacher_directory: Path, text: Path, tmp_path: Path
):
    for directory, said in (
        (tmp_path / "nowhere", "no supernet at"),
        (teacher_directory, "convert a teacher"),
    ):
        result = gearshift("calibrate", directory, "--data", text, "--out", tmp_path / "run")
        assert result.exit_code == 1
        assert said in result.stderr


def test_what_is_there_is_gone_on_with_only_when_asked(calibrated: Gearshift, tmp_path: Path):
    assert calibrated().exit_code == 0
    refused = calibrated()
    assert refused.exit_code == 1
    assert "run already exists; go on with --resume, or give a new path" in refused.stderr
    other = calibrated("--resume", "--steps", 3)
    assert other.exit_code == 1
    assert "was made otherwise (steps: was 2, now 3)" in other.stderr
    again = calibrated("--resume")
    assert again.exit_code == 0
    assert f"supernet written to {tmp_path / 'run' / 'supernet'}" in again.stdout


def test_a_full_disk_is_said_so(calibrated: Gearshift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "hidden-00000.bin")

    with monkeypatch.context() as patch:
        patch.setattr("gearshift.train.calibrate.walk.write_activations", full)
        result = calibrated()
    assert result.exit_code == 1
    assert "no space left on the disk while writing hidden-00000.bin" in result.stderr
    assert calibrated("--resume").exit_code == 0


def test_ctrl_c_keeps_finished_layers_and_resume_does_the_others(
    calibrated: Gearshift, supernet_directory: Path, text: Path, tmp_path: Path
):
    out, more = tmp_path / "run", ("--steps", "40", "--learning-rate", "1e-5")
    options = [str(option) for option in (*SMALL, *more)]
    command = [sys.executable, "-m", "gearshift", "calibrate", str(supernet_directory), *options]
    command += ["--data", str(text), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        _wait_for(out / "calibration.jsonl", process)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"stopped: {calibrate.KEPT}" in said
    assert "Traceback" not in said
    assert "layer 2" not in printed
    assert not (out / "supernet").exists()
    kept = read_json_lines(out / "calibration.jsonl")
    resumed = calibrated(*more, "--resume")
    assert resumed.exit_code == 0
    assert [line[:7] for line in resumed.stdout.splitlines() if line.startswith("layer")] == [
        "layer 0",
        "layer 1",
        "layer 2",
    ]
    assert read_json_lines(out / "calibration.jsonl")[: len(kept)] == kept


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists():
            return
        time.sleep(0.02)
    pytest.fail(f"{path} did not appear; exit code {process.poll()}")
