"""The bench of the initialisation at tiny sizes: every piece runs, is kept, and says what it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gearshift.bench.initialization import (
    ABLATION,
    BEST,
    BIASED,
    PIECES,
    PUBLISHED,
    Bench,
    Sizes,
    make_biased_teacher,
    write_rows,
)
from gearshift.convert.initialize import Aligned
from gearshift.train.calibrate import PARTS, CalibrationSettings
from gearshift.train.data import write_documents

TINY = Sizes(
    calibration=CalibrationSettings(tokens=400, sequence_length=16, steps=3),
    ablation_tokens=64,
    published_tokens=128,
    shares=(0.5,),
    seeds=2,
    batch_size=2,
    sequence_length=16,
    held_out_tokens=64,
    device="cpu",
)


@pytest.fixture
def bench(teacher_directory: Path, tmp_path: Path) -> Bench:
    """A bench with its texts already there."""
    text = [f"def f{n}(x):\n    return x + {n}\n" for n in range(40)]
    write_documents(tmp_path / "work" / "train.jsonl", text)
    write_documents(tmp_path / "work" / "held_out.jsonl", text[::-1])
    return Bench(teacher_directory, tmp_path / "work", TINY)


def test_each_line_takes_one_idea_out():
    assert len({variant.name for variant in ABLATION}) == len(ABLATION)
    aligned = [variant for variant in ABLATION if isinstance(variant.initializer, Aligned)]
    changes = [
        sum(
            getattr(variant.initializer, name) != getattr(Aligned(), name)
            for name in Aligned.__dataclass_fields__
        )
        + (len(PARTS) - len(variant.parts) if variant.parts else 1)
        for variant in aligned
        if variant is not BEST and not variant.biased
    ]
    assert set(changes) == {1}
    assert PUBLISHED in ABLATION and not PUBLISHED.parts


def test_every_piece_gives_its_rows_and_none_is_done_twice(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines = [BEST, PUBLISHED]
    write_rows(bench, lines, list(PIECES), tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    rows = written["rows"]
    assert [(row["piece"], row["line"]) for row in rows] == [
        ("start", "aligned"),
        ("start", "modulo"),
        ("calibrated", "aligned"),
        ("distilled", "aligned"),
        ("distilled", "modulo"),
        *[("fewer_tokens", "modulo"), ("fewer_tokens", "aligned")] * 2,
    ]
    assert written["sizes"]["published_tokens"] == 128 and "commit" in written["provenance"]
    assert len({row["fa"] for row in rows}) == 1  # the teacher stays the teacher
    assert rows[0]["gdn"] == pytest.approx(rows[0]["kda"], rel=1e-3)  # aligned delta rules start alike
    assert rows[1]["gdn"] != rows[0]["gdn"]
    calibrated = rows[2]
    closed = (rows[0]["gdn"] - calibrated["gdn"]) / (rows[0]["gdn"] - rows[0]["fa"])
    assert calibrated["gdn_closed"] == pytest.approx(closed)
    assert [row["tokens"] for row in rows[5:]] == [128, 64] * 2
    assert [row["seed"] for row in rows[5:]] == [0, 0, 1, 1]
    assert rows[5]["gdn"] != rows[7]["gdn"]  # seeds differ
    for published, ours in (rows[5:7], rows[7:9]):
        assert ours["reached"] == (ours["gdn"] <= published["gdn"] and ours["kda"] <= published["kda"])
    for what in (
        "bench.initialization.convert_teacher",
        "train.calibrate.run.fit_mixer",
        "train.distill.Trainer",
    ):
        monkeypatch.setattr(f"gearshift.{what}", None)
    write_rows(bench, lines, list(PIECES), tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == rows


def test_the_teacher_with_biases_differs_in_biases_only(teacher_directory: Path, tmp_path: Path):
    make_biased_teacher(teacher_directory, tmp_path / "biased")
    before, after = (load_file(d / "model.safetensors") for d in (teacher_directory, tmp_path / "biased"))
    added = {name for name in after if name not in before}
    assert added == {name.replace(".weight", ".bias") for name in before if name.endswith(BIASED)}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].std() > 0 for name in added)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "biased", local_files_only=True)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    biased = replace(BEST, name="b", biased=True)
    bench = Bench(teacher_directory, tmp_path / "work", TINY)
    names = load_file(bench.start(biased) / "model.safetensors")
    assert "model.layers.0.mixers.gated_delta_net.conv1d.bias" in names
