"""The dynamic program against brute force over every placement, at every budget."""

from __future__ import annotations

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.placement import MIXERS, Placement, PlacementSpace
from gearshift.search.constraints import Constraints, Limit
from gearshift.search.optimize import BudgetError, best_within, pareto_placements, ranked_within
from gearshift.search.space import AdditiveScore, Array
from tests.search.brute_force import Everything, random_score, random_space

# Tenths do not add up exactly in floating point, zeros and repeated values make ties.
TIED = [0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 7.0]


@st.composite
def problems(draw, most_layers: int = 6) -> tuple[AdditiveScore, Array]:
    """A score with interactions of up to three layers, range 3, and costs by layer and mixer."""
    layers, mixers = draw(st.integers(1, most_layers)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    space = random_space(rng, layers, mixers, restricted=draw(st.booleans()))
    order, reach = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    score = random_score(rng, space, order, reach, tied=draw(st.booleans()))
    rows = 1 if draw(st.booleans()) else layers
    kind = draw(st.sampled_from(["tied", "whole", "generic"]))
    costs = {
        "tied": rng.choice(TIED, (rows, mixers)),
        "whole": rng.integers(0, 10, (rows, mixers)).astype(float),
        "generic": np.exp(rng.uniform(-7, 7, (rows, mixers))),
    }[kind]
    return score, np.tile(costs, (layers // rows, 1))


def exact_cost(placement: Placement, space: PlacementSpace, layer_costs: Array) -> Fraction:
    return sum(
        (
            Fraction(float(layer_costs[layer, space.mixers.index(mixer)]))
            for layer, mixer in enumerate(placement)
        ),
        start=Fraction(0),
    )


@settings(max_examples=200, deadline=None)
@given(problems(4))
def test_equals_brute_force_at_every_budget_with_costs_added_exactly(problem):
    score, layer_costs = problem
    points = pareto_placements(score, layer_costs)
    everything = list(score.space.all_placements())
    costs = [exact_cost(placement, score.space, layer_costs) for placement in everything]
    expected: list[tuple[float, float]] = []
    ordered = sorted(zip(costs, score.values(everything).tolist(), strict=True), key=lambda p: (p[0], -p[1]))
    for cost, value in ordered:
        if not expected or value > expected[-1][1]:
            expected.append((float(cost), value))
    assert [(point.cost, point.value) for point in points] == expected


@settings(max_examples=60, deadline=None)
@given(problems())
def test_points_are_what_they_claim(problem):
    score, layer_costs = problem
    points = pareto_placements(score, layer_costs)
    placements = [point.placement for point in points]
    assert len(set(placements)) == len(placements)
    assert all(score.space.holds(placement) for placement in placements)
    assert score.values(placements).tolist() == [point.value for point in points]
    exact = [exact_cost(placement, score.space, layer_costs) for placement in placements]
    assert exact == sorted(set(exact))
    assert [point.cost for point in points] == [float(cost) for cost in exact]
    assert all(left.value < right.value for left, right in itertools.pairwise(points))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(7, 8), st.integers(2, 3), st.integers(1, 3))
def test_eight_layers_of_four_mixers(seed, layers, order, reach):
    rng = np.random.default_rng(seed)
    score = random_score(rng, PlacementSpace(layers), order, reach)
    costs = rng.integers(0, 60, (layers, 4)).astype(float)
    points = pareto_placements(score, costs)
    assert [(point.cost, point.value) for point in points] == Everything(score, costs).frontier()


@st.composite
def constrained(draw) -> tuple[AdditiveScore, Array, Constraints]:
    """A problem of whole costs with constraints of every kind, met by one placement at least."""
    layers, mixers = draw(st.integers(1, 6)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    space = random_space(rng, layers, mixers, restricted=draw(st.booleans()))
    score = random_score(rng, space, draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    costs = rng.integers(0, 10, (layers, mixers)).astype(float)
    some = Placement(tuple(str(rng.choice(names)) for names in space.layers))
    least, most = ({str(rng.choice(space.mixers)): int(rng.integers(0, 4))} for _ in range(2))
    counts = some.counts()
    limits = ()
    if draw(st.booleans()):
        other = random_score(
            rng, space, draw(st.integers(1, 2)), draw(st.integers(1, 3)), tied=draw(st.booleans())
        )
        limits = (Limit("memory", other, float(other.values([some])[0]), floor=draw(st.booleans())),)
    constraints = Constraints(
        at_least={name: min(count, counts.get(name, 0)) for name, count in least.items()},
        at_most={name: max(count, counts.get(name, 0)) for name, count in most.items()},
        fixed={layer: some[layer] for layer in range(layers) if rng.random() < 0.2},
        limits=limits,
    )
    return score, costs, constraints


def met_by(constraints: Constraints, space: PlacementSpace):
    """The constraints as a condition on indices of mixers, written out plainly."""

    def meets(chosen: np.ndarray) -> np.ndarray:
        kept = np.ones(len(chosen), bool)
        for name, count in constraints.at_least.items():
            kept &= (chosen == space.mixers.index(name)).sum(axis=1) >= count
        for name, count in constraints.at_most.items():
            kept &= (chosen == space.mixers.index(name)).sum(axis=1) <= count
        for layer, name in constraints.fixed.items():
            kept &= chosen[:, layer] == space.mixers.index(name)
        for limit in constraints.limits:
            used = limit.score.values_of(chosen)
            kept &= used >= limit.bound if limit.floor else used <= limit.bound
        return kept

    return meets


@settings(max_examples=400, deadline=None)
@given(constrained())
def test_equals_brute_force_at_every_budget_and_constraint(problem):
    score, costs, constraints = problem
    points = pareto_placements(score, costs, constraints)
    expected = Everything(score, costs, met_by(constraints, score.space)).frontier()
    assert [(point.cost, point.value) for point in points] == expected
    assert all(constraints.met(point.placement) for point in points)


@settings(max_examples=200, deadline=None)
@given(constrained(), st.integers(2, 5))
def test_the_best_few_equal_brute_force_at_every_budget(problem, count):
    score, costs, constraints = problem
    points = pareto_placements(score, costs, constraints, count)
    assert len({point.placement for point in points}) == len(points)
    everything = Everything(score, costs, met_by(constraints, score.space))
    for budget in np.unique(everything.costs):
        found = [point.value for point in ranked_within(points, budget)[:count]]
        assert found == everything.best_values(budget, count)


@pytest.mark.parametrize("reach", [1, 2, 3])
def test_layers_without_a_common_mixer(reach):
    """No state survives from one layer to the next but those of the mixers that it holds."""
    space = PlacementSpace(4, MIXERS, (("fa", "swa"), ("gdn", "kda"), ("fa",), ("kda", "swa")))
    rng = np.random.default_rng(reach)
    score = random_score(rng, space, 2, reach)
    costs = rng.integers(0, 99, (4, 4)).astype(float)
    points = pareto_placements(score, costs)
    assert [(point.cost, point.value) for point in points] == Everything(score, costs).frontier()


def test_sums_of_equal_layer_costs_are_one_cost():
    """0.1 + 0.2 + 0.7 in six orders: floating point makes several costs of one."""
    space = PlacementSpace(3, ("fa", "swa", "gdn"))
    score = AdditiveScore.of_layers(space, np.array([[0.0, 1.0, 2.0]] * 3) * [[1.0], [1.1], [1.3]])
    points = pareto_placements(score, np.tile([0.1, 0.2, 0.7], (3, 1)))
    compositions = [tuple(sorted(point.placement)) for point in points]
    assert len(set(compositions)) == len(compositions)


@pytest.mark.parametrize("dearest", [1.0, 1e9])
def test_costs_that_differ_in_the_last_bit_stay_apart(dearest):
    space = PlacementSpace(2, ("fa", "gdn", "kda"))
    score = AdditiveScore.of_layers(space, np.array([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]]))
    just_above = float(np.nextafter(1.0, 2.0))
    points = pareto_placements(score, np.array([[1.0, just_above, dearest], [1.0, 1.0, dearest]]))
    assert [str(point.placement) for point in points] == ["fa gdn", "gdn*2"]


def test_huge_and_tiny_costs_are_added_exactly():
    score = AdditiveScore.of_layers(PlacementSpace(3, ("fa", "gdn")), np.array([[0.0, -1.0]] * 3))
    points = pareto_placements(score, np.array([[1e300, 5e-324]] * 3))
    assert [point.cost for point in points] == [1.5e-323, 1e300, 2e300, 3e300]


def test_free_layers_leave_the_best_placement_alone():
    score = AdditiveScore.of_layers(PlacementSpace(4), np.arange(16.0).reshape(4, 4))
    (point,) = pareto_placements(score, np.zeros((4, 4)))
    assert (point.cost, point.value, str(point.placement)) == (0.0, 3 + 7 + 11 + 15, "kda*4")


def test_a_budget_below_the_cheapest_names_it():
    score = AdditiveScore.of_layers(PlacementSpace(3, ("fa", "gdn")), np.zeros((3, 2)))
    points = pareto_placements(score, np.tile([1.0, 0.25], (3, 1)))
    assert best_within(points, 0.75).placement == Placement.parse("gdn*3")
    with pytest.raises(BudgetError, match=r"0.5 cannot be met: the cheapest placement, gdn\*3, costs 0.75"):
        best_within(points, 0.5)


@pytest.mark.parametrize(("layers", "reach"), [(12, 1), (48, 3)])
def test_a_whole_model_takes_seconds(layers, reach):
    rng = np.random.default_rng(0)
    score = random_score(rng, PlacementSpace(layers), 3, reach)
    losses = -rng.gamma(2.0, 1.0, size=(layers, 4)) * [0.0, 4.0, 10.0, 8.0]
    score = AdditiveScore(score.space, 0.0, {**score.terms, (0,): losses})
    start = time.process_time()
    points = pareto_placements(score, np.tile([1.0, 0.48, 0.21, 0.14], (layers, 1)))
    assert time.process_time() - start < 8
    assert len(points) > layers
