"""``gearshift convert``: what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gearshift.inspect_directory import inspect_directory

Gearshift = Callable[..., Result]


def test_it_converts_and_says_where(gearshift: Gearshift, teacher_directory: Path, tmp_path: Path):
    out = tmp_path / "supernet"
    result = gearshift("convert", teacher_directory, out, "--mixers", "fa, gdn", "--window", 4)
    assert result.exit_code == 0
    assert f"supernet written to {out}" in result.stdout
    assert set(inspect_directory(out).parameters) == {"full_attention", "gated_delta_net", "shared"}


def test_what_is_there_is_replaced_only_when_asked(
    gearshift: Gearshift, teacher_directory: Path, tmp_path: Path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("do not lose me")
    refused = gearshift("convert", teacher_directory, tmp_path / "out")
    assert refused.exit_code == 1
    assert "out already exists" in refused.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert gearshift("convert", teacher_directory, tmp_path / "out", "--overwrite").exit_code == 0
    assert inspect_directory(tmp_path / "out").missing == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mixers", "fa,mamba"], "unknown mixer 'mamba'; expected one of fa (full_attention)"),
        (["--mixers", "swa,gdn"], "expected full_attention"),
        (["--window", "0"], "window is 0; expected at least one token"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], said: str, gearshift: Gearshift, teacher_directory: Path, tmp_path: Path
):
    result = gearshift("convert", teacher_directory, tmp_path / "out", *options)
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


def test_a_teacher_that_is_not_there_or_not_whole_is_refused(
    gearshift: Gearshift, teacher_directory: Path, tmp_path: Path
):
    nowhere = gearshift("convert", tmp_path / "nowhere", tmp_path / "out")
    assert nowhere.exit_code == 1
    assert "nowhere: there is no config.json" in nowhere.stderr
    broken = shutil.copytree(teacher_directory, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    truncated = gearshift("convert", broken, tmp_path / "out")
    assert truncated.exit_code == 1
    assert "model.safetensors is truncated or damaged" in truncated.stderr
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_an_unknown_family_is_refused(gearshift: Gearshift, tmp_path: Path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(
        json.dumps({"model_type": "rwkv", "architectures": ["Rwkv"]})
    )
    result = gearshift("convert", tmp_path / "teacher", tmp_path / "out")
    assert result.exit_code == 1
    assert "rwkv" in result.stderr.lower()


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    gearshift: Gearshift, teacher_directory: Path, tmp_path: Path
):
    out = tmp_path / "out"
    said = gearshift("convert", teacher_directory, out, "--mixers", "fa,kda", "--dry-run").stdout
    assert list(tmp_path.iterdir()) == []
    assert "layers 0-2 (3 alike)" in said
    assert "aligned" in said
    assert said.rstrip().endswith("nothing was written")
    gearshift("convert", teacher_directory, out, "--mixers", "fa,kda")
    assert f"to be written: {inspect_directory(out).bytes.total():,} bytes, 1 weight files" in said
    for options in ([], ["--dry-run"]):
        assert "out already exists" in gearshift("convert", teacher_directory, out, *options).stderr


def test_the_recipe_is_chosen(gearshift: Gearshift, teacher_directory: Path, tmp_path: Path):
    options = ("convert", teacher_directory, tmp_path / "out", "--dry-run", "--init")
    assert "modulo: q_proj" in gearshift(*options, "modulo").stdout
    refused = gearshift(*options, "zeros")
    assert refused.exit_code == 1
    assert "init is 'zeros'; expected aligned or modulo" in refused.stderr
