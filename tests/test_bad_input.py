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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gearshift

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
    model.save_pretrained(directory)
    return directory


def test_ctrl_c_in_the_middle_of_a_conversion(larger_teacher: Path, tmp_path: Path):
    process = start("convert", larger_teacher, tmp_path / "out")
    while not any(tmp_path.iterdir()):  # until the temporary folder is there
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr == "stopped: nothing was written; run the same command again\n"
    assert list(tmp_path.iterdir()) == []
