"""What a person sees when something is wrong, through the command line of a process of its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gearshift
from gearshift.cli import app
from gearshift.files import append_json_line, read_json_lines

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(gearshift.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gearshift", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, **pipes, **options)


def error_of(*arguments: object, **options: Any) -> str:
    """The line on stderr of a command that fails as it should."""
    process = start(*arguments, **options)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def run_again(*arguments: object) -> None:
    """The command once more, in this process; it ends well."""
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr


@pytest.fixture
def supernet(supernet_directory: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(supernet_directory, tmp_path / "supernet")


def generate(supernet: Path, placement: str = "fa*3") -> str:
    return error_of("generate", supernet, "def f", "--placement", placement, "--max-new-tokens", 1)


def test_a_missing_checkpoint(tmp_path: Path):
    assert f"{tmp_path / 'gone'} is no supernet directory" in generate(tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_checkpoint(supernet: Path):
    weights = supernet / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    said = generate(supernet)
    assert f"{weights} is truncated or damaged" in said
    assert "restore it or make the directory again" in said


def test_a_config_without_a_needed_key(supernet: Path):
    path = supernet / "config.json"
    config = json.loads(path.read_text())
    del config["hidden_size"]
    path.write_text(json.dumps(config))
    assert "has no 'hidden_size'; expected it in config.json" in generate(supernet)


def test_a_placement_of_the_wrong_length(supernet_directory: Path):
    said = generate(supernet_directory, "fa*2 swa*7")
    assert "'fa*2 swa*7' has 9 layers; expected 3" in said


def test_an_output_folder_that_exists(teacher_directory: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    assert f"{tmp_path} already exists" in error_of("convert", teacher_directory, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system with room for a tokenizer but not for a supernet, if this user may mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(path)]
    mounts = (
        shutil.which("mount") and not subprocess.run(command, capture_output=True, check=False).returncode
    )
    yield path if mounts else None
    if mounts:
        subprocess.run(["umount", str(path)], check=True)


def limit_files() -> None:
    """No file of this process may grow as large as a supernet."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_a_full_disk(teacher_directory: Path, tiny_disk: Path | None, tmp_path: Path):
    """Without the right to mount, the system's refusal in the middle of a file goes the same road."""
    out = (tiny_disk or tmp_path / "new") / "out"
    said = error_of("convert", teacher_directory, out, preexec_fn=None if tiny_disk else limit_files)
    reason = "no space left on the disk" if tiny_disk else "File too large"
    assert f"could not write {out}: " in said
    assert reason in said
    assert "Nothing half-written was left there" in said
    assert list(out.parent.iterdir()) == []


@pytest.fixture(scope="module")
def larger_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its conversion can be caught in the middle."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 64}
    heads: dict[str, Any] = {"num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    directory = tmp_path_factory.mktemp("larger") / "teacher"
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def read_only_disk(tiny_disk: Path | None) -> Path:
    """A file system to which nobody can write, not even root."""
    if tiny_disk is None:
        pytest.skip("this user may not mount")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    return tiny_disk


def test_a_read_only_folder(
    teacher_directory: Path, supernet_directory: Path, read_only_disk: Path, tmp_path: Path
):
    out = read_only_disk / "out"
    said = error_of("convert", teacher_directory, out)
    assert f"could not write {out}: " in said
    assert "Read-only file system" in said
    # What takes long is not begun if its result has no place.
    said = error_of("evaluate", supernet_directory, "--data", tmp_path, "--placement", "fa*3", "--out", out)
    assert f"{out} cannot be written: {read_only_disk} is read-only; give another path" in said


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until it holds; the process must still be at work then."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_a_killed_conversion_leaves_nothing_that_loads_and_can_be_run_again(
    larger_teacher: Path, tmp_path: Path
):
    out = tmp_path / "out"
    process = start("convert", larger_teacher, out)
    # Shards have their final names only when all is written: this is the start, not the end.
    wait_for(lambda: any(tmp_path.glob(".out.*.partial/shard-*.partial")), process)
    process.kill()
    process.communicate()
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert not (left / "config.json").exists()
    run_again("convert", larger_teacher, out)
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "config.json").is_file()


def test_ctrl_c_in_the_middle_of_an_evaluation(supernet_directory: Path, tmp_path: Path):
    text, table = tmp_path / "text.py", tmp_path / "rows.jsonl"
    text.write_text("def add(a, b):\n    return a + b\n\n\n" * 200)
    sizes = ["--random", 60, "--tokens", 2048, "--sequence-length", 128]
    command = ["evaluate", supernet_directory, "--data", text, "--out", table, *sizes]
    process = start(*command)
    wait_for(table.exists, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == (
        "stopped: the rows that were done are in the table; run the same command again to go on from there"
    )
    before = read_json_lines(table)
    assert 0 < len(before) < 60
    run_again(*command)
    rows = read_json_lines(table)
    assert rows[: len(before)] == before
    assert len(rows) == len({row["placement"] for row in rows}) >= 60


def test_ctrl_c_in_the_middle_of_a_search(tmp_path: Path):
    table, cost, out = tmp_path / "rows.jsonl", tmp_path / "cost.jsonl", tmp_path / "out"
    placements = [*product(("fa", "swa", "gdn"), repeat=3)]
    for p in placements:
        rank = p.count("swa") + 2 * p.count("gdn")
        row = {"placement": " ".join(p), "checkpoint": "c", "data": "d", "kl": rank / 10}
        append_json_line(table, {**row, "loss": 1 + rank / 10, "quality": 0.3, "retention": 0.9})
        sizes = {"context_length": 512, "batch_size": 1, "hardware": "h"}
        append_json_line(cost, {"placement": " ".join(p), **sizes, "seconds_per_step": 1 / (2 + rank)})
    process = start("search", "--table", table, "--cost", cost, "--out", out)
    wait_for(out.exists, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert stderr == (
        "stopped: what was evaluated and written is kept; run the same command again to go on from there\n"
    )
    for path in out.iterdir():  # whole files alone
        assert path.name in ("surrogate.json", "costs.json", "frontier.json", "frontier.html")
        assert path.suffix != ".json" or json.loads(path.read_text())


def test_ctrl_c_in_the_middle_of_a_conversion(larger_teacher: Path, tmp_path: Path):
    process = start("convert", larger_teacher, tmp_path / "out")
    wait_for(lambda: any(tmp_path.iterdir()), process)  # until the temporary folder is there
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr == "stopped: nothing was written; run the same command again\n"
    assert list(tmp_path.iterdir()) == []
