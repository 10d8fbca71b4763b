"""Mixed-integer programs against the dynamic program and brute force, which share nothing with them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.placement import PlacementSpace
from gearshift.search.constraints import ConstraintError, Constraints, Limit, layer_limit
from gearshift.search.optimize import BudgetError, best_within, pareto_placements
from gearshift.search.program import ProgramError, best_by_program, frontier_by_program
from tests.search.brute_force import Everything, random_score
from tests.search.test_optimize import constrained, met_by


@settings(max_examples=25, deadline=None)
@given(constrained(), st.floats(0, 1))
def test_agrees_with_the_dynamic_program_and_proves_it(problem, share):
    score, costs, constraints = problem
    points = pareto_placements(score, costs, constraints)
    budget = points[0].cost + share * (points[-1].cost - points[0].cost)
    found = best_by_program(score, costs, budget, constraints)
    assert found.value == pytest.approx(best_within(points, budget).value, abs=1e-9)
    assert found.bound >= found.value - 1e-9
    assert found.proven
    assert found.cost <= budget * (1 + 1e-9)
    assert constraints.met(found.placement)


@pytest.mark.parametrize("seed", range(3))
def test_two_limits_equal_brute_force_at_every_budget(seed):
    rng = np.random.default_rng(seed)
    space = PlacementSpace(4, ("fa", "gdn", "kda"))
    score, recall = random_score(rng, space, 3, 2), random_score(rng, space, 2, 1)
    costs, memory = (rng.integers(0, 10, (4, 3)).astype(float) for _ in range(2))
    constraints = Constraints(
        limits=(
            layer_limit("memory", space, memory, float(np.median(memory.sum(axis=0)))),
            Limit(
                "recall", recall, float(np.median(recall.values(list(space.all_placements())))), floor=True
            ),
        )
    )
    expected = Everything(score, costs, met_by(constraints, space)).frontier()
    points = frontier_by_program(score, costs, constraints)
    assert [point.cost for point in points] == [cost for cost, _ in expected]
    assert [point.value for point in points] == pytest.approx([value for _, value in expected])
    assert all(constraints.met(point.placement) for point in points)


def test_seconds_are_as_good_as_bytes():
    """The solver's tolerances are absolute; costs of microseconds must not vanish in them."""
    rng = np.random.default_rng(5)
    score = random_score(rng, PlacementSpace(6), 2, 2)
    costs = rng.integers(1, 10, (6, 4)).astype(float)
    budget = 22.0
    values = {unit: best_by_program(score, costs * unit, budget * unit).value for unit in (1e-9, 1.0, 1e9)}
    assert set(values.values()) == {best_within(pareto_placements(score, costs), budget).value}


def test_a_budget_below_the_cheapest_names_it():
    score = random_score(np.random.default_rng(0), PlacementSpace(3, ("fa", "gdn")), 2, 1)
    costs = np.tile([1.0, 0.25], (3, 1))
    with pytest.raises(
        BudgetError, match=r"the cheapest placement with at least 1 fa, .*, costs 1.5; give at"
    ):
        best_by_program(score, costs, 1.0, Constraints(at_least={"fa": 1}))


def test_limits_that_nothing_meets_are_named():
    space = PlacementSpace(3, ("fa", "gdn"))
    score = random_score(np.random.default_rng(0), space, 2, 1)
    memory = np.tile([2.0, 1.0], (3, 1))
    constraints = Constraints(
        limits=(
            layer_limit("memory", space, memory, 3),
            Limit("room", layer_limit("", space, memory, 0).score, 4, True),
        )
    )
    with pytest.raises(ConstraintError, match="no placement has memory of at most 3, room of at least 4"):
        best_by_program(score, memory, constraints=constraints)
    with pytest.raises(ConstraintError):
        frontier_by_program(score, memory, constraints)


def test_no_answer_in_time_is_no_answer():
    rng = np.random.default_rng(0)
    score = random_score(rng, PlacementSpace(30), 3, 3)
    with pytest.raises(ProgramError, match="found no placement in 1e-06 s; give it more time"):
        best_by_program(score, rng.integers(0, 9, (30, 4)).astype(float), 90.0, seconds=1e-6)
