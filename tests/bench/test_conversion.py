"""A tiny teacher through the whole measurement, and what its rows say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gearshift.bench import conversion
from gearshift.bench.conversion import (
    SHAPES,
    Bench,
    ConversionBenchError,
    Turn,
    copy_weights,
    main,
    make_teacher,
    planned_memory,
    run_command,
    settle,
    speed_row,
    spread,
    teacher_shapes,
)
from gearshift.cli import app
from gearshift.convert.convert import convert_teacher, plan_conversion
from gearshift.errors import OutputExistsError
from gearshift.memory import peak_resident_memory
from gearshift.supernet import load_supernet
from gearshift.supernet.tensor_files import BLOCK_BYTES, TensorFiles
from tests.convert.tiny_teachers import random_tokens

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "teacher"
    make_teacher(directory, TINY, seed=0, shard_bytes=40_000)
    return directory


@torch.no_grad()
def test_the_made_teacher_converts_and_both_load_and_agree(teacher: Path, tmp_path: Path):
    assert len(list(teacher.glob("model-*-of-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.rope_parameters["rope_type"] == "llama3"
    supernet = load_supernet(convert_teacher(teacher, tmp_path / "supernet"))
    tokens = random_tokens()
    expected = model(tokens).logits
    assert (supernet(tokens).logits - expected).abs().max() < 1e-4
    assert expected.std() > 0.01


def test_seeds_and_tensors_of_a_made_teacher(teacher: Path, tmp_path: Path):
    infos = TensorFiles(teacher).infos
    assert {name: info.shape for name, info in infos.items()} == teacher_shapes(TINY)
    assert {info.dtype for info in infos.values()} == {"BF16"}
    for seed, same in ((0, True), (1, False)):
        make_teacher(tmp_path / str(seed), TINY, seed)
        for name in infos:
            given, expected = TensorFiles(tmp_path / str(seed)).read(name), TensorFiles(teacher).read(name)
            assert torch.equal(given, expected) == same


def test_the_measured_shape_is_that_of_llama_3b():
    shapes = teacher_shapes(SHAPES["llama-3b"])
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 3_212_749_824


def test_blocks_are_those_of_the_conversion_and_the_plan_is_asked(teacher: Path):
    assert conversion.BLOCK_BYTES == BLOCK_BYTES
    assert planned_memory(teacher) == plan_conversion(teacher).memory


@pytest.mark.parametrize("share", [1, 0.3, 2.2])
def test_a_copy_has_the_same_bytes_as_often_as_needed(share: float, teacher: Path, tmp_path: Path):
    settle(teacher)
    given = b"".join(path.read_bytes() for path in sorted(teacher.glob("*.safetensors")))
    wanted = (3 * given)[: int(share * len(given))]
    turn = copy_weights(teacher, tmp_path / "copy", len(wanted))
    assert b"".join(path.read_bytes() for path in sorted((tmp_path / "copy").iterdir())) == wanted
    assert turn.nbytes == len(wanted)
    assert turn.seconds >= turn.sync_seconds > 0


def test_a_command_that_fails_is_no_measurement(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(ConversionBenchError, match=r"'gearshift nonsense .*nothing' failed"):
        run_command("nonsense", tmp_path / "nothing")
    assert "No such command" in capfd.readouterr().err


def test_a_command_is_measured_by_its_own_memory_from_a_smaller_process_only():
    """A command that only says its version takes less than this process with torch."""
    with pytest.raises(ConversionBenchError, match="measure from a fresh one"):
        run_command("--version")
    code = "from gearshift.bench.conversion import run_command; print(run_command('--version').peak)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 * 10**6 < int(done.stdout) < 10**8 < peak_resident_memory()


def test_rows_are_those_of_all_turns():
    turns, copies = ([Turn(s, 0.0, 100, 7) for s in seconds] for seconds in ((2, 4, 5), (1, 4, 2)))
    row = speed_row("convert_bytes_per_second", turns, copies, 0.5)
    assert (row["value"], row["baseline"], row["ratio"]) == (25, 50, 0.5)
    assert (row["least"], row["most"], row["each"]) == (20, 50, [50, 25, 20])
    assert row["ratio_each"] == [0.5, 1, 0.4]
    assert row["passes"] is True
    assert speed_row("x", turns, copies, 0.51)["passes"] is False
    assert "passes" not in speed_row("x", turns, copies)
    assert spread("convert_peak_bytes", [1, 9, 2])["value"] == 9
    assert spread("dry_run_seconds", [1, 9, 2])["value"] == 2


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    order = []
    monkeypatch.setattr(Bench, "_turn", lambda self, *_: order.append("convert") or Turn(1, 0, 1, 1))
    monkeypatch.setattr(Bench, "_copy", lambda self, source: order.append(source.name) or Turn(2, 0, 1))
    converted, copied, streamed = Bench(tmp_path, TINY, 2)._take_turns()
    assert order == ["convert", "supernet", "teacher", "teacher", "supernet", "convert"]
    assert [turn.seconds for turn in (*converted, *copied, *streamed)] == [1, 1, 2, 2, 2, 2]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run here, which takes seconds less; memory is not measured, and the disk is left alone."""

    def run_here(*arguments: str | Path, out: Path | None = None) -> Turn:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        assert (out is None) == ("--dry-run" in arguments)
        size = 0 if out is None else sum(path.stat().st_size for path in out.glob("*.safetensors"))
        return Turn(1.0, 0.0, size, 10**8 if out is None else 2 * 10**8)

    monkeypatch.setattr(conversion, "run_command", run_here)
    monkeypatch.setattr(conversion, "in_other_process", lambda function, *given: function(*given))
    monkeypatch.setattr(os, "sync", lambda: None)


def run_main(monkeypatch: pytest.MonkeyPatch, *options: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["conversion", *map(str, options)])
    main()


@pytest.mark.usefixtures("in_this_process")
def test_the_whole_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out, work = tmp_path / "conversion.json", tmp_path / "work"
    run_main(monkeypatch, "--shape", "tiny", "--rounds", "2", "--out", out, "--work", work)
    result = json.loads(out.read_text())
    rows: dict[str, dict[str, Any]] = {row["metric"]: row for row in result["rows"]}
    assert set(rows) == {
        "convert_peak_bytes",
        "planned_memory_bytes",
        "convert_bytes_per_second",
        "convert_beside_its_own_traffic",
        "dry_run_seconds",
        "export_bytes_per_second",
        "export_peak_bytes",
        "thin_bytes_per_second",
        "thin_peak_bytes",
    }
    assert all(row["value"] > 0 for row in rows.values())
    assert [len(row["each"]) for row in rows.values() if "each" in row] == [2] * 8
    assert (rows["convert_peak_bytes"]["baseline"], rows["convert_peak_bytes"]["passes"]) == (10**8, True)
    assert rows["planned_memory_bytes"]["baseline"] == 10**8
    nbytes = [rows[f"{name}_bytes_per_second"]["nbytes"] for name in ("export", "thin", "convert")]
    assert 0 < nbytes[0] < nbytes[1] < nbytes[2]
    assert (result["shape"], "commit" in result["provenance"]) == ("tiny", True)
    said = capsys.readouterr().out
    assert all(metric in said for metric in rows)
    assert not work.exists()


def test_a_working_directory_that_holds_something_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine").touch()
    with pytest.raises(OutputExistsError):
        run_main(monkeypatch, "--out", tmp_path / "x.json", "--work", tmp_path)
    assert (tmp_path / "mine").exists()


def test_a_shape_of_another_size_is_as_large_as_it_says(tmp_path: Path):
    make_teacher(tmp_path / "t", replace(TINY, layers=1, vocab=7), 0)
    assert TensorFiles(tmp_path / "t").infos["model.embed_tokens.weight"].shape == (7, 64)
