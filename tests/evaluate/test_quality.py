from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gearshift.errors import FileFormatError
from gearshift.evaluate import evaluator, quality
from gearshift.evaluate.evaluator import EvaluationError, Evaluator
from gearshift.evaluate.held_out import read_held_out
from gearshift.evaluate.quality import evaluate_placements
from gearshift.evaluate.recall import make_examples, write_examples
from gearshift.evaluate.table import COLUMNS, read_table
from gearshift.placement import Placement, PlacementError, PlacementSpace
from gearshift.supernet import CheckpointError, load_supernet, save_supernet
from gearshift.train.data import DataError
from gearshift.train.tokens import load_tokenizer
from tests.supernet.tools import only_holding

TEACHER = Placement.parse("fa*3")
PLACEMENTS = [Placement.parse(text) for text in ("gdn*3", "swa fa kda", "fa*3")]


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("held_out") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"value_{n} = {n * 37}\n" * 8}) + "\n" for n in range(12)))
    return path


@pytest.fixture(scope="session")
def recall(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recall") / "recall.jsonl"
    write_examples(path, make_examples(2, seed=0, lengths=(200, 260)))
    return path


@pytest.fixture
def evaluate(supernet_directory, text, tmp_path):
    def evaluate(placements=PLACEMENTS, **changes):
        arguments = {
            "supernet": supernet_directory,
            "data": text,
            "recall": None,
            "out": tmp_path / "table.jsonl",
        }
        sizes = {"tokens": 320, "sequence_length": 32, "batch_size": 4, "progress": False, "device": "cpu"}
        return evaluate_placements(placements=placements, **(arguments | sizes | changes))

    return evaluate


def alone(monkeypatch) -> None:
    """Let every placement be a group of its own."""
    monkeypatch.setattr(quality, "GROUP", 1)
    monkeypatch.setattr(quality, "LARGEST_GROUP", 1)


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The placements of all passes that are scored, in order."""
    seen: list[str] = []
    run = evaluator.hidden_states

    def noted(model, ids, placements):
        seen.extend(map(str, placements))
        return run(model, ids, placements)

    monkeypatch.setattr(evaluator, "hidden_states", noted)
    return seen


def reference_scores(directory: Path, windows: np.ndarray, placement: Placement) -> tuple[float, float]:
    """Loss and divergence, token by token in float64, one window at a time."""
    model = load_supernet(directory, dtype=torch.float64)
    losses, divergences = [], []
    for window in torch.from_numpy(windows):
        with torch.no_grad():
            own = model(window[None], placement=placement).logits[0].softmax(-1)
            teachers = model(window[None], placement=TEACHER).logits[0].softmax(-1)
        for place in range(len(window) - 1):
            losses.append(-math.log(own[place, window[place + 1]]))
            divergences.append((teachers[place] * (teachers[place] / own[place]).log()).sum().item())
    return sum(losses) / len(losses), sum(divergences) / len(divergences)


def test_scores_match_a_float64_reference(evaluate, supernet_directory, text):
    held_out = read_held_out(text, None, load_tokenizer(supernet_directory), tokens=320, sequence_length=32)
    for row in evaluate():
        loss, kl = reference_scores(supernet_directory, held_out.windows, Placement.parse(row["placement"]))
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert row["tokens"] == 10 * 31


def test_rows_hold_what_they_promise(evaluate):
    rows = evaluate()
    assert [row["placement"] for row in rows] == [str(placement) for placement in PLACEMENTS]
    teacher = rows[2]
    assert teacher["kl"] < 1e-6
    assert teacher["retention"] == 1.0
    for row in rows:
        assert set(row) == set(COLUMNS)
        assert row["quality"] == pytest.approx(math.exp(-row["loss"]))
        assert row["retention"] == pytest.approx(row["quality"] / teacher["quality"])
        assert row["recall"] == {}
        assert row["seconds"] > 0
        assert row["provenance"]["torch"] == torch.__version__
    assert rows[0]["kl"] > 1e-4


def test_the_teacher_is_evaluated_even_if_not_asked_for(evaluate, tmp_path):
    (row,) = evaluate(PLACEMENTS[:1])
    table = read_table(tmp_path / "table.jsonl")
    assert [r["placement"] for r in table] == ["fa*3", "gdn*3"]
    assert row["retention"] == pytest.approx(row["quality"] / table[0]["quality"])


def test_what_is_in_the_table_is_not_evaluated_again(evaluate, passes, tmp_path):
    first = evaluate(PLACEMENTS[:1])
    passes.clear()
    again = evaluate([*PLACEMENTS, PLACEMENTS[0]])
    assert "gdn*3" not in passes
    assert again[0] == again[3] == first[0]
    assert len(read_table(tmp_path / "table.jsonl")) == 3
    passes.clear()
    assert evaluate() == again[:3]
    assert passes == []


def test_one_teacher_pass_serves_a_group(evaluate, passes, monkeypatch):
    evaluate([Placement.parse("gdn*3")], sequence_length=64)
    passes.clear()
    evaluate([Placement.parse(t) for t in ("kda*3", "swa*3", "gdn kda*2")], sequence_length=64)
    batches = passes.count("kda*3")
    assert passes.count("fa*3") == batches
    alone(monkeypatch)
    passes.clear()
    evaluate([Placement.parse(t) for t in ("kda*2 fa", "swa*2 fa")], sequence_length=64)
    assert passes.count("fa*3") == 2 * batches


def test_groups_change_no_result(evaluate, monkeypatch, tmp_path):
    together = evaluate(out=tmp_path / "a.jsonl")
    alone(monkeypatch)
    apart = evaluate(out=tmp_path / "b.jsonl")
    for one, other in zip(together, apart, strict=True):
        assert {k: one[k] for k in ("loss", "kl", "recall")} == {
            k: other[k] for k in ("loss", "kl", "recall")
        }


def test_an_interrupted_evaluation_keeps_its_finished_groups(evaluate, monkeypatch, tmp_path):
    alone(monkeypatch)
    score = Evaluator.score

    def interrupted(self, group, report):
        if "gdn" in str(group[0]):
            raise KeyboardInterrupt
        return score(self, group, report)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate()
    assert [row["placement"] for row in read_table(tmp_path / "table.jsonl")] == ["fa*3", "swa fa kda"]
    evaluate()
    assert [row["placement"] for row in read_table(tmp_path / "table.jsonl")] == [
        "fa*3",
        "swa fa kda",
        "gdn*3",
    ]


def test_other_data_or_another_amount_of_it_has_rows_of_its_own(evaluate, tmp_path):
    evaluate(PLACEMENTS[:1])
    evaluate(PLACEMENTS[:1], tokens=160)
    rows = read_table(tmp_path / "table.jsonl")
    assert len({row["data"] for row in rows}) == 2
    assert len({row["checkpoint"] for row in rows}) == 1
    assert all(row["data"].startswith("text.jsonl:") for row in rows)


def test_recall_is_reported_by_task_and_belongs_to_the_data(evaluate, recall, tmp_path):
    (with_recall,) = evaluate(PLACEMENTS[:1], recall=recall)
    (without,) = evaluate(PLACEMENTS[:1])
    assert set(with_recall["recall"]) == {"lookup", "copy", "needle"}
    assert all(0 <= share <= 1 for share in with_recall["recall"].values())
    assert with_recall["data"] != without["data"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sequence_length": 5000, "tokens": 5000}, "no window of 5000 tokens fits"),
        ({"tokens": 3}, "more tokens"),
    ],
)
def test_too_little_text_is_refused(evaluate, changes, told):
    with pytest.raises(DataError, match=told):
        evaluate(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"supernet": Path("nowhere")}, CheckpointError, "nowhere"),
        ({"data": Path("nowhere.txt")}, DataError, "nowhere.txt"),
        ({"recall": Path("nowhere.jsonl")}, FileFormatError, "nowhere.jsonl is missing"),
    ],
)
def test_a_missing_input_is_named_and_nothing_is_written(evaluate, tmp_path, changes, error, told):
    with pytest.raises(error, match=told):
        evaluate(**changes)
    assert not (tmp_path / "table.jsonl").exists()


def test_a_placement_of_another_model_is_refused_before_anything_is_loaded(evaluate, monkeypatch):
    monkeypatch.setattr(quality, "load_supernet", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(PlacementError, match="4 layers; expected 3"):
        evaluate([PlacementSpace(4).sample_uniform(random.Random(0))])


def test_a_loss_that_is_not_finite_names_the_placement(evaluate, monkeypatch, tmp_path):
    good = quality.load_supernet

    def broken(*args, **kwargs):
        model = good(*args, **kwargs)
        weights = dict(model.named_parameters())["model.layers.1.mixers.kimi_delta_attention.o_proj.weight"]
        weights.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(quality, "load_supernet", broken)
    alone(monkeypatch)
    with pytest.raises(EvaluationError, match="placement swa kda fa is not a finite number"):
        evaluate([Placement.parse("gdn*3"), Placement.parse("swa kda fa")])
    assert [row["placement"] for row in read_table(tmp_path / "table.jsonl")] == ["fa*3"]


def test_progress_counts_placements(evaluate, capsys):
    evaluate(progress=True)
    shown = capsys.readouterr().err
    assert "evaluate 3/3" in shown
    assert "left" in shown


def test_a_supernet_without_its_teacher_is_refused(evaluate, supernet_directory, tmp_path):
    """Divergence and retention are those from the teacher."""
    thin = only_holding(load_supernet(supernet_directory), [("full_attention",), *[("gated_delta_net",)] * 2])
    directory = save_supernet(thin, tmp_path / "thin", source=supernet_directory)
    with pytest.raises(PlacementError, match="no full_attention in layers 1, 2: the teacher is none of"):
        evaluate([thin.placement], supernet=directory)
    assert not (tmp_path / "table.jsonl").exists()
