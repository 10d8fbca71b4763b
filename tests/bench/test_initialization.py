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
    PUBLISHED,
    Bench,
    Job,
    Sizes,
    make_biased_teacher,
    run_jobs,
    write_texts,
)
from gearshift.convert.initialize import Aligned
from gearshift.train.calibrate import PARTS, CalibrationSettings
from gearshift.train.data import read_documents, write_documents

TINY = Sizes(
    calibration=CalibrationSettings(tokens=400, sequence_length=16, steps=3),
    ablation_tokens=64,
    published_tokens=128,
    shares=(0.5,),
    batch_size=2,
    sequence_length=16,
    held_out_tokens=64,
    device="cpu",
)


@pytest.fixture
def job(teacher_directory: Path, tmp_path: Path) -> Job:
    """A line with its texts already there."""
    text = [f"def f{n}(x):\n    return x + {n}\n" for n in range(40)]
    write_documents(tmp_path / "work" / "train.jsonl", text)
    write_documents(tmp_path / "work" / "held_out.jsonl", text[::-1])
    return Job(teacher_directory, tmp_path / "work", TINY)


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


def test_every_piece_gives_its_row_and_none_is_done_twice(job: Job, monkeypatch: pytest.MonkeyPatch):
    jobs = [replace(job, variant=BEST), replace(job, variant=PUBLISHED), job, replace(job, seed=1)]
    aligned, modulo, first, second = (one.run() for one in jobs)
    assert [row["stage"] for row in aligned] == ["start", "calibrated", "distilled"]
    assert [row["stage"] for row in modulo] == ["start", "distilled"]
    assert len({row["fa"] for rows in (aligned, modulo, first, second) for row in rows}) == 1  # the teacher
    assert aligned[0]["gdn"] == pytest.approx(aligned[0]["kda"], rel=1e-3)  # delta rules start alike
    assert modulo[0]["gdn"] != aligned[0]["gdn"]
    before, after = aligned[:2]
    assert after["gdn_closed"] == pytest.approx(
        (before["gdn"] - after["gdn"]) / (before["gdn"] - before["fa"])
    )
    for published, ours in (first, second):
        assert (published["line"], published["tokens"], ours["line"], ours["tokens"]) == (
            "modulo",
            128,
            "aligned",
            64,
        )
        assert ours["reached"] == (ours["gdn"] <= published["gdn"] and ours["kda"] <= published["kda"])
    assert first[0]["gdn"] != second[0]["gdn"]  # seeds differ
    for what in (
        "bench.initialization.convert_teacher",
        "train.calibrate.run.fit_mixer",
        "train.run._Run",
    ):
        monkeypatch.setattr(f"gearshift.{what}", None)
    assert [one.run() for one in jobs] == [aligned, modulo, first, second]


def test_workers_write_one_file(job: Job, tmp_path: Path):
    jobs = [replace(job, variant=variant, stages=("start",)) for variant in (BEST, PUBLISHED)]
    run_jobs(jobs, 2, tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["line"], row["stage"]) for row in written["rows"]] == [
        ("aligned", "start"),
        ("modulo", "start"),
    ]
    assert written["sizes"]["published_tokens"] == 128
    assert "commit" in written["provenance"]


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
    bench = Bench(teacher_directory, tmp_path, tmp_path / "work", TINY)
    names = load_file(bench.start(biased) / "model.safetensors")
    assert "model.layers.0.mixers.gated_delta_net.conv1d.bias" in names


def test_text_to_judge_by_is_never_learned_from(tmp_path: Path):
    write_texts(tmp_path)
    learn, judge = (set(read_documents(tmp_path / name)) for name in ("train.jsonl", "held_out.jsonl"))
    assert len(learn) > 10 * len(judge) > 0
    assert not learn & judge
