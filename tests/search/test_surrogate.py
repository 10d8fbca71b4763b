"""The surrogate on a made-up supernet: what it recovers, what it admits, what it refuses."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from gearshift.files import write_json
from gearshift.placement import PlacementError, PlacementSpace
from gearshift.search.cost import fit_costs
from gearshift.search.frontier import build_frontier
from gearshift.search.surrogate import candidate_features, fit_surrogate, fit_surrogates, least_rows
from gearshift.search.surrogate_file import SurrogateError, load_surrogate, save_surrogate
from gearshift.search.table import TableError, build_table


@pytest.fixture(scope="module")
def fitted(made_up):
    placements, unseen = made_up.split(100, 50)
    table = build_table(made_up.evaluate(placements, 0.01), made_up.space, "-loss")
    held_out = build_table(made_up.evaluate(unseen, 0.01), made_up.space, "-loss")
    return fit_surrogate(table, held_out=held_out), held_out


def test_ranks_and_predicts_unseen_placements(fitted):
    surrogate, _ = fitted
    held_out = surrogate.report.held_out
    assert held_out.rows == 50
    assert held_out.spearman > 0.95
    assert held_out.r2 > 0.9
    assert surrogate.report.cross_validated.spearman > 0.9
    assert surrogate.report.warnings == []
    assert "WARNING" not in str(surrogate.report)


def test_intervals_cover_what_they_promise(made_up):
    inside = total = 0
    for seed in range(4):
        placements = made_up.draw(200, seed)
        rng = np.random.default_rng(seed)
        rows = made_up.evaluate(placements)
        for row in rows:
            row["loss"] += 0.02 * rng.normal()
        fit = fit_surrogate(build_table(rows[:120], made_up.space, "-loss"), folds=3)
        mean, std = fit.predict(placements[120:])
        values = build_table(rows[120:], made_up.space, "-loss").values
        inside += int((np.abs(values - mean) < 1.645 * std).sum())
        total += len(values)
    assert 0.82 < inside / total < 0.97


def test_scores_of_the_report_are_what_the_words_mean(fitted):
    surrogate, held_out = fitted
    mean, std = surrogate.predict(held_out.placements)
    values, scores = held_out.values, surrogate.report.held_out
    unexplained, spread = np.square(values - mean).sum(), np.square(values - values.mean()).sum()
    assert scores.r2 == pytest.approx(1 - unexplained / spread)
    ranks, guessed = (np.argsort(np.argsort(array)) for array in (values, mean))
    assert scores.spearman == pytest.approx(np.corrcoef(ranks, guessed)[0, 1])
    assert scores.coverage == pytest.approx(np.mean(np.abs(values - mean) < 1.6448536 * std))


def test_the_score_for_the_dynamic_program_is_the_prediction(fitted, made_up):
    surrogate, _ = fitted
    placements = made_up.draw(30, seed=9)
    assert surrogate.score.values(placements) == pytest.approx(surrogate.predict(placements)[0], abs=1e-10)


def test_counting_mixers_makes_few_rows_suffice(made_up):
    """Thirty rows for 36 effects of single layers: the shared effect of a mixer carries the ranking."""
    placements, unseen = made_up.split(30, 60)
    table = build_table(made_up.evaluate(placements, 0.01), made_up.space, "-loss")
    held_out = build_table(made_up.evaluate(unseen, 0.01), made_up.space, "-loss")
    assert fit_surrogate(table, 0).assess(held_out).spearman > 0.85


def test_a_bad_fit_is_announced(made_up):
    placements = made_up.draw(60)
    rows = made_up.evaluate(placements)
    losses = [row["loss"] for row in rows]
    random.Random(0).shuffle(losses)
    shuffled = [{**row, "loss": loss} for row, loss in zip(rows, losses, strict=True)]
    report = fit_surrogate(build_table(shuffled, made_up.space, "-loss"), folds=4).report
    assert any("Spearman" in warning and "below 0.8" in warning for warning in report.warnings)
    assert any("R2" in warning and "below 0.5" in warning for warning in report.warnings)
    assert "WARNING: do not trust the frontier" in str(report)


def test_retention_counts_from_the_evaluated_teacher(fitted, made_up):
    surrogate, _ = fitted
    assert surrogate.teacher_value == surrogate.table.values[0]
    assert surrogate.retention(surrogate.teacher_value) == 1.0
    assert surrogate.retention(surrogate.teacher_value - 0.1) == pytest.approx(np.exp(-0.1))
    without = build_table(made_up.evaluate(made_up.draw(61)[1:]), made_up.space, "-loss")
    predicted = fit_surrogate(without, 0, folds=3)
    assert predicted.teacher_value == pytest.approx(predicted.predict(made_up.uniform[:1])[0][0])


@pytest.mark.parametrize("target", ["quality", "-sqrt(kl)", "recall.copy"])
def test_any_column_can_be_the_target(made_up, target):
    table = build_table(made_up.evaluate(made_up.draw(80), 0.005), made_up.space, target)
    assert fit_surrogate(table, 0, folds=5).report.cross_validated.spearman > 0.85


def test_several_objectives_at_once(made_up):
    rows = made_up.evaluate(made_up.draw(80), 0.005)
    tables = {target: build_table(rows, made_up.space, target) for target in ("-loss", "recall.copy")}
    together = fit_surrogates(tables)
    assert list(together) == list(tables)
    for name, table in tables.items():
        alone = fit_surrogate(table)
        assert together[name].report == alone.report
        assert np.array_equal(together[name].posterior.dual, alone.posterior.dual)
    nothing = build_table([{**row, "recall": {"copy": 0.5}} for row in rows], made_up.space, "recall.copy")
    with pytest.raises(TableError, match="copying: every placement has the value 0.5 of recall.copy"):
        fit_surrogates({"-loss": tables["-loss"], "copying": nothing})


def test_feature_spaces_to_choose_from():
    def sizes(layers, *asked):
        found = candidate_features(PlacementSpace(layers), *asked)
        return [(features.order, features.interaction_range) for features in found]

    assert sizes(12) == [(1, 0), (2, 1), (2, 3), (3, 3)]
    assert sizes(12, None, 2) == [(1, 0), (2, 2), (3, 2)]
    assert sizes(12, 3, 3) == [(3, 3)]
    assert sizes(12, None, 0) == [(1, 0)]
    assert sizes(2) == [(1, 0), (2, 1)]


def test_the_same_rows_give_the_same_fit(made_up):
    table = build_table(made_up.evaluate(made_up.draw(40), 0.01), made_up.space, "-loss")
    first, second = (fit_surrogate(table, 0, folds=4) for _ in range(2))
    assert first.report == second.report
    assert np.array_equal(first.posterior.dual, second.posterior.dual)


def test_saved_and_loaded_predictions_are_the_same(fitted, made_up, tmp_path):
    surrogate, _ = fitted
    save_surrogate(surrogate, tmp_path / "surrogate.json")
    loaded = load_surrogate(tmp_path / "surrogate.json")
    placements = made_up.draw(20, seed=5)
    for mine, theirs in zip(loaded.predict(placements), surrogate.predict(placements), strict=True):
        assert np.array_equal(mine, theirs)
    assert loaded.report == surrogate.report
    assert loaded.teacher_value == surrogate.teacher_value
    assert loaded.table.teacher_quality == surrogate.table.teacher_quality


UNLIKE = PlacementSpace(
    12, layer_mixers=(("fa", "swa"), ("fa",), *[("fa", "gdn", "kda")] * 5, *[("fa", "swa")] * 5)
)


def test_layers_that_hold_different_mixers(made_up, tmp_path):
    """Fit, file and frontier keep to what each layer holds."""
    rng = random.Random(0)
    drawn = list(dict.fromkeys([UNLIKE.default, *(UNLIKE.sample_composition(rng) for _ in range(150))]))
    table = build_table(made_up.evaluate(drawn[:70], 0.002), UNLIKE, "-loss")
    assert least_rows(UNLIKE) == 10
    surrogate = fit_surrogate(table, folds=3)
    unseen = drawn[70:]
    assert np.corrcoef(made_up.truth.values(unseen), surrogate.predict(unseen)[0])[0, 1] > 0.95
    save_surrogate(surrogate, tmp_path / "surrogate.json")
    loaded = load_surrogate(tmp_path / "surrogate.json")
    assert loaded.table.space == UNLIKE
    (cost,) = fit_costs(made_up.bench([UNLIKE.mostly(mixer) for mixer in UNLIKE.mixers]), UNLIKE).values()
    points = build_frontier(loaded, cost).points
    assert len(points) > 5
    assert all(UNLIKE.holds(point.placement) for point in points)


def test_a_frontier_needs_the_teacher(made_up):
    held = tuple(("fa", "gdn") if layer else ("gdn",) for layer in range(12))
    space = PlacementSpace(12, ("fa", "gdn"), held)
    rows = made_up.evaluate([p for p in space.all_placements() if p.counts().get("full_attention", 0) < 2])
    surrogate = fit_surrogate(build_table(rows, space, "-loss"), 0, folds=2)
    (cost,) = fit_costs(made_up.bench([space.default, space.mostly("gated_delta_net")]), space).values()
    with pytest.raises(PlacementError, match="no full_attention in layers 0: the teacher is none of"):
        build_frontier(surrogate, cost)


def test_too_few_rows_are_refused(made_up):
    assert least_rows(made_up.space) == 18
    assert least_rows(PlacementSpace(2, ("fa", "gdn"))) == 10
    table = build_table(made_up.evaluate(made_up.draw(17)), made_up.space, "-loss")
    with pytest.raises(TableError, match="17 distinct placements were evaluated; expected at least 18"):
        fit_surrogate(table)


def test_values_that_are_all_the_same_are_refused(made_up):
    rows = [{**row, "loss": 2.0} for row in made_up.evaluate(made_up.draw(40))]
    with pytest.raises(TableError, match="nothing to learn"):
        fit_surrogate(build_table(rows, made_up.space, "-loss"))


def test_a_held_out_table_must_be_comparable_and_unseen(made_up):
    placements, unseen = made_up.split(30, 20)
    table = build_table(made_up.evaluate(placements), made_up.space, "-loss")
    other = [{**row, "checkpoint": "another"} for row in made_up.evaluate(unseen)]
    with pytest.raises(TableError, match="the held-out table has the checkpoint another"):
        fit_surrogate(table, held_out=build_table(other, made_up.space, "-loss"))
    with pytest.raises(TableError, match="has the target quality, the fitted one -loss"):
        fit_surrogate(table, held_out=build_table(made_up.evaluate(unseen), made_up.space, "quality"))
    shared = build_table(made_up.evaluate([*unseen, placements[3]]), made_up.space, "-loss")
    with pytest.raises(TableError, match="1 held-out placements were fitted too"):
        fit_surrogate(table, held_out=shared)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("values"),
        lambda content: content["values"].pop(),
        lambda content: content["hyperparameters"].pop("noise_variance"),
        lambda content: content["report"].update(rows="many", extra=1),
        lambda content: content.update(mixers=["mamba"]),
        lambda content: content["placements"].__setitem__(0, "fa*3"),
    ],
)
def test_damaged_files_are_refused(fitted, tmp_path, damage):
    path = tmp_path / "surrogate.json"
    save_surrogate(fitted[0], path)
    content = json.loads(path.read_text(encoding="utf-8"))
    damage(content)
    write_json(path, content)
    with pytest.raises(SurrogateError, match="surrogate.json is damaged"):
        load_surrogate(path)


def test_other_json_is_refused(tmp_path):
    write_json(tmp_path / "x.json", {"format": "gearshift-cost-1"})
    with pytest.raises(SurrogateError, match="x.json is not a surrogate"):
        load_surrogate(tmp_path / "x.json")
