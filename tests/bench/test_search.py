"""The search benchmark at small sizes: what it measures is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gearshift.bench.search import coverage, draw, levelled_costs, synthetic_rows
from gearshift.bench.search_curves import (
    KEPT,
    Evaluations,
    MissingRowsError,
    _Area,
    greedy_order,
    held_out_row,
    per_layer_score,
    ratio_row,
    single_changes,
)
from gearshift.bench.search_truth import NOISE, make_truth
from gearshift.placement import Placement, PlacementSpace
from gearshift.search.optimize import ParetoPoint, pareto_placements
from gearshift.search.surrogate import fit_surrogate
from gearshift.search.table import build_table

MISSING = Placement.parse("kda gdn fa kda gdn fa")
COSTS = np.tile([4.0, 2.0, 1.0, 1.5], (6, 1))


def test_regret_is_none_for_the_true_frontier_and_some_for_a_worse_one():
    truth = make_truth(6, seed=1)
    assert truth.regrets(truth.frontier) == pytest.approx(0.0)
    cheapest, *_, dearest = truth.frontier
    regrets = truth.regrets([cheapest, dearest])
    assert regrets.max() > 0.2
    assert regrets.max() <= 1.0
    assert truth.regrets([ParetoPoint(cheapest.cost, 0.0, cheapest.placement)])[-1] == pytest.approx(1.0)


def test_interactions_and_noise_are_there():
    truth = make_truth(6, seed=2)
    assert {len(offsets) for offsets in truth.score.terms} == {1, 2, 3}
    placements = [truth.frontier[0].placement] * 4000
    rows = truth.evaluate(placements, np.random.default_rng(0))
    noise = np.array([row["quality"] for row in rows]) - truth.frontier[0].value
    assert noise.std() == pytest.approx(NOISE * truth.span, rel=0.05)


def test_active_search_recovers_a_small_truth_and_intervals_cover():
    """The benchmark's figures, in small: bars as there."""
    rows = {row["metric"]: row for row in synthetic_rows(6, evaluations=160, seeds=range(1))}
    assert rows["synthetic_regret, 6 layers"]["value"] < 0.01
    assert rows["synthetic_regret, 6 layers"]["passes"] is True
    assert 0.82 <= rows["synthetic_coverage, 6 layers, random"]["value"] <= 0.97
    assert rows["synthetic_regret, 6 layers, seed 0"]["evaluations"] == 160


def test_coverage_notices_intervals_that_are_too_narrow(monkeypatch):
    truth, rng = make_truth(6, seed=0), np.random.default_rng(0)
    rows = truth.evaluate(draw(truth.score.space, 80, 0), rng)
    surrogate = fit_surrogate(build_table(rows, truth.score.space, "quality"), 0)
    unseen = draw(truth.score.space, 300, 5)
    honest = coverage(surrogate, truth, unseen, rng)
    monkeypatch.setattr("gearshift.bench.search.NINETY_PERCENT", 0.16)
    assert coverage(surrogate, truth, unseen, rng) < honest - 0.4


def test_costs_have_as_many_levels_as_asked():
    costs = levelled_costs(PlacementSpace(48), 500)
    assert (costs.min(axis=1).sum(), costs.max(axis=1).sum()) == (0, 500)


@pytest.fixture
def evaluations(tmp_path: Path) -> Evaluations:
    """All rows but one of a supernet of six layers whose divergences are additive; some 520 are drawn."""
    space = PlacementSpace(6)
    path = tmp_path / "rows.jsonl"
    drawn = set(draw(space, 520, 0)) - {MISSING}
    with path.open("w") as file:
        for placement in space.all_placements():
            if placement == MISSING:
                continue
            kl = divergence(placement)
            row = {"checkpoint": "c", "data": "d", "placement": str(placement), "loss": 1 + kl, "kl": kl}
            row |= {"quality": np.exp(-1 - kl), "retention": np.exp(-kl)}
            assert set(row) == set(KEPT)
            file.write(json.dumps(row | {"drawn": placement in drawn}) + "\n")
    return Evaluations(path, None, None)


def divergence(placement: Placement) -> float:
    harm = {"full_attention": 0, "sliding_attention": 1, "kimi_delta_attention": 2, "gated_delta_net": 3}
    return sum(0.02 * (1 + layer) * harm[mixer] for layer, mixer in enumerate(placement))


def test_missing_placements_are_named(evaluations: Evaluations):
    with pytest.raises(MissingRowsError, match="lacks 1 placements such as kda gdn fa kda gdn fa; give"):
        evaluations([evaluations.space.teacher(), MISSING])


def test_held_out_scores_rise_to_one_where_effects_add_up(evaluations: Evaluations, monkeypatch):
    monkeypatch.setattr("gearshift.bench.search_curves.FITTED", (25, 200))
    monkeypatch.setattr("gearshift.bench.search_curves.SPLITS", 2)
    curve = held_out_row(evaluations, "-kl", "order 1", 1, None)["by_evaluations"]
    assert curve[200]["r2"] > 0.999
    assert curve[25]["r2"] <= curve[200]["r2"]
    score = per_layer_score(evaluations, "-kl")
    assert score.values(evaluations.drawn) == pytest.approx([-divergence(p) for p in evaluations.drawn])


def test_greedy_search_takes_the_change_that_loses_least_for_what_it_saves(evaluations: Evaluations):
    order = greedy_order(evaluations, COSTS, 19 + 17)
    assert order[0] == evaluations.space.teacher()
    assert order[1:19] == single_changes(evaluations.space)
    # Sliding attention in the first layer loses 0.02 and saves 2; no other change loses as little for it.
    assert all(placement[0] != "full_attention" for placement in order[19:])
    assert len(set(order)) == len(order)


def test_the_area_grows_to_that_of_the_frontier(evaluations: Evaluations):
    measure = _Area(evaluations, COSTS)
    curve = measure.curve(evaluations.drawn)
    assert (np.diff(curve) >= -1e-12).all()
    frontier = pareto_placements(per_layer_score(evaluations, "-kl"), COSTS)
    best = measure.curve([point.placement for point in frontier])
    assert 0 <= curve[0] < curve[-1] < best[-1] < 1


def test_the_ratio_counts_evaluations_until_random_search_is_reached():
    at_random = np.linspace(0.1, 0.8, 100)
    row = ratio_row(np.linspace(0.0, 1.0, 101), at_random, 0)
    assert (row["active"], row["random"], row["passes"]) == (81, 100, False)
    assert ratio_row(np.linspace(0.0, 2.0, 101), at_random, 0)["passes"] is True
    assert ratio_row(np.zeros(20), at_random, 0)["passes"] is False
