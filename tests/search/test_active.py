"""Active search on a made-up supernet whose best placements are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gearshift.placement import Placement, PlacementSpace
from gearshift.search.active import ActiveSearchError, Plan, frontier_area, search_actively
from gearshift.search.constraints import Constraints
from gearshift.search.optimize import pareto_placements
from gearshift.search.space import AdditiveScore

COSTS = np.tile([8.0, 4.0, 1.0, 2.0], (12, 1))
PLAN = Plan(target="-loss", evaluations=90, batch=12, patience=99, seed=3)


class Interrupted(Exception):
    """Stands for a killed process."""


class Evaluator:
    """Evaluates made-up rows; keeps what it was asked; stops after some calls if told so."""

    def __init__(self, made_up, calls: int | None = None) -> None:
        self.made_up, self.calls = made_up, calls
        self.asked: list[Placement] = []

    def __call__(self, placements: Sequence[Placement]) -> list[dict[str, Any]]:
        if self.calls == 0:
            raise Interrupted
        self.calls = None if self.calls is None else self.calls - 1
        self.asked += placements
        return self.made_up.evaluate(list(placements))


@pytest.fixture(scope="module")
def searched(made_up):
    return search_actively(made_up.space, COSTS, Evaluator(made_up), PLAN, progress=False)


def true_area(made_up, placements: Sequence[Placement]) -> float:
    """The area under the true values of placements, as a share of the true frontier's."""
    best = pareto_placements(made_up.truth, COSTS)
    low, ends = best[0].value, (best[0].cost, best[-1].cost)
    costs = AdditiveScore.of_layers(made_up.space, COSTS).values(placements)
    whole = frontier_area(np.array([p.cost for p in best]), np.array([p.value for p in best]), *ends, low)
    return frontier_area(costs, made_up.truth.values(placements), *ends, low) / whole


def test_finds_more_of_the_frontier_than_thrice_as_many_random_placements(searched, made_up):
    found = true_area(made_up, [Placement.parse(str(row["placement"])) for row in searched.rows])
    assert len(searched.rows) <= 90
    assert found > 0.93
    assert found > true_area(made_up, made_up.draw(270, seed=1)) + 0.1


def test_the_rounds_say_what_was_proposed(searched, made_up):
    first, second, *_ = searched.rounds
    assert len(first.proposed["uniform"]) == 4
    assert sum(map(len, first.proposed.values())) == 18
    assert {kind: len(texts) for kind, texts in second.proposed.items()} == {
        "frontier": 6,
        "thompson": 4,
        "random": 2,
    }
    everything = [placement for made in searched.rounds for placement in made.placements]
    assert len(set(everything)) == len(everything) == len(searched.rows)
    assert searched.why_ended == "all 90 evaluations are spent"


def test_the_same_seed_proposes_the_same(searched, made_up):
    again = search_actively(made_up.space, COSTS, Evaluator(made_up), PLAN, progress=False)
    assert again.rounds == searched.rounds
    other = search_actively(
        made_up.space, COSTS, Evaluator(made_up), replace(PLAN, seed=4, evaluations=30), progress=False
    )
    assert other.rounds[0] != searched.rounds[0]


def test_an_interrupted_search_goes_on_as_if_it_had_never_stopped(searched, made_up, tmp_path):
    log = tmp_path / "rounds.jsonl"
    with pytest.raises(Interrupted):
        search_actively(made_up.space, COSTS, Evaluator(made_up, 3), PLAN, log=log, progress=False)
    with log.open("a") as file:
        file.write('{"number": 4, "torn')
    resumed = search_actively(made_up.space, COSTS, Evaluator(made_up), PLAN, log=log, progress=False)
    assert resumed.rounds == searched.rounds
    assert resumed.rows == searched.rows
    ended = search_actively(made_up.space, COSTS, Evaluator(made_up), PLAN, log=log, progress=False)
    assert (ended.rounds, ended.why_ended) == (searched.rounds, searched.why_ended)


def test_a_log_of_another_search_is_refused(made_up, tmp_path):
    log = tmp_path / "rounds.jsonl"
    plan = replace(PLAN, evaluations=20)
    search_actively(made_up.space, COSTS, Evaluator(made_up), plan, log=log, progress=False)
    with pytest.raises(ActiveSearchError, match="is the log of a search with .*'seed': 3.*another folder"):
        search_actively(
            made_up.space, COSTS, Evaluator(made_up), replace(plan, seed=0), log=log, progress=False
        )
    damaged = log.read_text().replace('"number"', '"nummer"')
    log.write_text(damaged)
    with pytest.raises(ActiveSearchError, match="is no log of a search"):
        search_actively(made_up.space, COSTS, Evaluator(made_up), plan, log=log, progress=False)


def test_given_rows_are_not_evaluated_again(made_up):
    given = made_up.evaluate(made_up.draw(40))
    evaluator = Evaluator(made_up)
    found = search_actively(
        made_up.space, COSTS, evaluator, replace(PLAN, evaluations=60), given=given, progress=False
    )
    assert [row["placement"] for row in found.rows[:40]] == [row["placement"] for row in given]
    assert len(evaluator.asked) == 20
    assert not {str(placement) for placement in evaluator.asked} & {row["placement"] for row in given}


def test_it_ends_when_the_frontier_stands_still(made_up):
    """Without interactions and noise nothing is left to learn after a few rounds."""
    single = AdditiveScore(made_up.space, 0.0, {(0,): made_up.truth.terms[(0,)]})

    def evaluate(placements):
        rows = made_up.evaluate(placements)
        losses = (-single.values(placements)).tolist()
        return [{**row, "loss": loss} for row, loss in zip(rows, losses, strict=True)]

    plan = Plan(target="-loss", evaluations=400, batch=16, order=1)
    found = search_actively(made_up.space, COSTS, evaluate, plan, progress=False)
    assert found.why_ended == "the frontier stood still for 2 rounds"
    assert len(found.rows) < 150
    assert all(made.moved is None or made.moved > -1e-9 for made in found.rounds)


def test_it_ends_when_every_placement_is_known(made_up):
    space = PlacementSpace(4, ("fa", "gdn"))

    def evaluate(placements):
        return [
            {"checkpoint": "c", "data": "d", "placement": str(p), "loss": hash(p.mixers) % 97 / 97}
            for p in placements
        ]

    costs = np.tile([2.0, 1.0], (4, 1))
    plan = Plan(target="-loss", evaluations=99, batch=6, patience=99)
    found = search_actively(space, costs, evaluate, plan, progress=False)
    assert len(found.rows) == 16
    assert found.why_ended == "every placement that could be proposed is evaluated"


def test_proposed_frontiers_keep_to_constraints(made_up):
    constraints = Constraints(at_least={"fa": 3})
    found = search_actively(
        made_up.space,
        COSTS,
        Evaluator(made_up),
        replace(PLAN, evaluations=42),
        constraints=constraints,
        progress=False,
    )
    for made in found.rounds[1:]:
        texts = (*made.proposed["frontier"], *made.proposed["thompson"])
        assert texts
        assert all(constraints.met(Placement.parse(text)) for text in texts)


@pytest.mark.parametrize("change", [{"evaluations": 17}, {"batch": 0}])
def test_too_few_evaluations_are_refused(made_up, change):
    with pytest.raises(ActiveSearchError, match="expected at least 18 for this space"):
        search_actively(made_up.space, COSTS, Evaluator(made_up), replace(PLAN, **change), progress=False)


def test_the_area_is_the_mean_over_budgets():
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs, values = rng.uniform(0, 10, 8), rng.uniform(-1, 1, 8)
        budgets = np.linspace(2, 9, 20001)
        best = [max((v for c, v in zip(costs, values, strict=True) if c <= b), default=-9.0) for b in budgets]
        expected = np.mean(np.maximum(np.array(best) + 0.5, 0.0))
        assert frontier_area(costs, values, 2.0, 9.0, -0.5) == pytest.approx(expected, abs=1e-3)


def test_the_log_can_be_read(made_up, tmp_path):
    log = tmp_path / "rounds.jsonl"
    search_actively(
        made_up.space, COSTS, Evaluator(made_up), replace(PLAN, evaluations=24), log=log, progress=False
    )
    settings, *rounds = map(json.loads, log.read_text().splitlines())
    assert settings["evaluations"] == 24
    assert [row["number"] for row in rounds] == [0, 1]
    assert rounds[1]["spearman"] > 0.5
