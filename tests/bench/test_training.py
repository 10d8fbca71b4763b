"""The training bench at tiny sizes on a CPU: every figure runs, and its numbers are those of its runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gearshift.bench import training
from gearshift.bench.training import JUDGED, Lessons, align_rows, run_figures, spread
from gearshift.bench.training_speed import Workload, vocabulary_memory
from gearshift.placement import MIXERS
from gearshift.train.flops import Sizes
from gearshift.train.recipe import Scale

TINY = Workload(
    hidden_size=64,
    layers=2,
    vocabulary=96,
    tokens=32,
    sequences=4,
    steps=2,
    head_dim=16,
    device="cpu",
    scale=Scale(head_logits=1024),
)


def test_the_default_workload_is_a_teacher_of_a_billion_parameters():
    assert Sizes.of(Workload().config(("full_attention",))).total >= 1e9
    assert set(Workload().config(MIXERS).mixers or ()) == set(MIXERS)


def test_speed_figures_have_value_baseline_ratio_and_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "alone", lambda run, *given: run(*given))
    rows = run_figures(["kd_vs_plain", "mfu_long"], tmp_path / "out.json", tmp_path, TINY, Lessons())
    assert [row["metric"] for row in rows] == ["kd_vs_plain_tokens", "kd_vs_plain_memory", "mfu", "mfu"]
    for row in rows:
        assert row["ratio"] == row["value"] / row["baseline"] > 0
        assert row["bar"] == training.BARS[row["metric"]]
    assert [row["sequence_length"] for row in rows] == [32, 32, 32, 128]
    assert rows[0]["supernet_parameters"] > rows[0]["parameters"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rows"] == rows
    assert "commit" in written["provenance"]


def test_memory_of_the_losses_does_not_grow_with_the_vocabulary():
    workload = replace(TINY, tokens=2048, scale=Scale(head_logits=2**20))
    small, large = vocabulary_memory(workload, 1024, 65536)
    # The logits of all tokens would be 2 GB with the large vocabulary, of either model. What is measured is
    # the memory of a process, in which allocators and threads make tens of megabytes of difference.
    logits = 2048 * 4 * 65536 * 4
    assert 0 < large < 0.1 * logits
    assert large - small < 0.05 * logits


def test_quality_figures_compare_runs_of_equal_length(teacher_directory, tmp_path, monkeypatch):
    def few_texts(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "held_out"):
            lines = [json.dumps({"text": f"x_{name}_{n} = {n}\n" * 9}) for n in range(30)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(training, "write_texts", few_texts)
    lessons = Lessons(
        tokens=128,
        batch_size=2,
        sequence_length=16,
        held_out_tokens=64,
        seeds=1,
        device="cpu",
        teacher=teacher_directory,
        shares=(0.5, 1.0),
    )
    figures = ["align", "sampling", "attention"]
    rows = run_figures(figures, tmp_path / "out.json", tmp_path / "work", TINY, lessons)
    by_figure = {name: [row for row in rows if row["figure"] == name] for name in figures}
    assert [row["line"] for row in by_figure["sampling"]] == ["uniform", "composition", "presets", "mixture"]
    assert [row["line"] for row in by_figure["attention"]] == ["mixers", "mixers_and_attention"]
    alone, *aligned = by_figure["align"]
    assert alone["line"] == "uniform"
    for row in aligned:
        means = [sum(each[name] for name in JUDGED) / 3 for each in (row, alone)]
        assert row["reached"] == (means[0] <= means[1])
    losses = [tuple(row[name] for name in JUDGED) for row in rows]
    assert len(set(losses)) >= len(losses) - 2  # two recipes are in two figures each
    # A second call finds every run and every evaluation done.
    monkeypatch.setattr("gearshift.train.run._Run", None)
    again = training.School(tmp_path / "work", lessons)
    assert list(align_rows(again)) == by_figure["align"]


def test_judged_placements_have_the_layers_that_they_say():
    found = {name: spread(12, *how).counts() for name, how in JUDGED.items()}
    assert found["all-gdn"] == {"gated_delta_net": 12}
    assert found["balanced"]["full_attention"] == 3
    assert sorted(found["balanced"].values()) == [3, 3, 3, 3]
    assert found["fa-heavy"] == {"full_attention": 9, "gated_delta_net": 3}


def test_an_unknown_figure_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training", "--out", "x.json", "--figures", "kd_vs_plain,speed"])
    with pytest.raises(SystemExit):
        training.main()
    assert "unknown figure 'speed'; expected some of kd_vs_plain" in capsys.readouterr().err
