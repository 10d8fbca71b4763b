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
from gearshift.search.optimize import BudgetError, best_within, pareto_placements
from gearshift.search.space import AdditiveScore

# Tenths do not add up exactly in floating point, zeros and repeated values make ties.
tied = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 7.0])
generic = st.floats(1e-3, 1e3)
# Multiples of 1/1024 add up exactly, so that scores can be compared without a tolerance.
gains = st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.5]) | st.integers(-4096, 4096).map(
    lambda whole: whole / 1024
)


def _random_score(draw, layers: int, mixers: int, reach: int) -> AdditiveScore:
    def array(*shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.array(draw(st.lists(gains, min_size=size, max_size=size))).reshape(shape)

    pairs = tuple(array(layers - d, mixers, mixers) for d in range(1, min(reach, layers - 1) + 1))
    return AdditiveScore(PlacementSpace(layers, MIXERS[:mixers]), draw(gains), array(layers, mixers), pairs)


@st.composite
def problems(draw) -> tuple[AdditiveScore, np.ndarray]:
    layers, mixers, reach = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 2))
    if layers == 5 and mixers == 4:
        layers = 4  # 256 placements instead of 1024 keep the brute force quick
    score = _random_score(draw, layers, mixers, reach)
    costs = draw(st.sampled_from([tied, generic]))
    if draw(st.booleans()):
        row = draw(st.lists(costs, min_size=mixers, max_size=mixers))
        return score, np.tile(row, (layers, 1))
    rows = draw(st.lists(costs, min_size=layers * mixers, max_size=layers * mixers))
    return score, np.array(rows).reshape(layers, mixers)


def _exact_cost(placement: Placement, space: PlacementSpace, layer_costs: np.ndarray) -> Fraction:
    return sum(
        (
            Fraction(float(layer_costs[layer, space.mixers.index(mixer)]))
            for layer, mixer in enumerate(placement)
        ),
        start=Fraction(0),
    )


def _brute_force(score: AdditiveScore, layer_costs: np.ndarray) -> list[tuple[float, float]]:
    """(cost, best value within that cost) wherever the best value rises; costs added as exact fractions."""
    everything = list(score.space.all_placements())
    costs = [_exact_cost(placement, score.space, layer_costs) for placement in everything]
    values = score.values(everything).tolist()
    frontier: list[tuple[float, float]] = []
    for cost, value in sorted(zip(costs, values, strict=True), key=lambda pair: (pair[0], -pair[1])):
        if not frontier or value > frontier[-1][1]:
            frontier.append((float(cost), value))
    return frontier


@settings(max_examples=150, deadline=None)
@given(problems())
def test_equals_brute_force_at_every_budget(problem):
    score, layer_costs = problem
    points = pareto_placements(score, layer_costs)
    assert [(point.cost, point.value) for point in points] == _brute_force(score, layer_costs)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_points_are_what_they_claim(problem):
    score, layer_costs = problem
    points = pareto_placements(score, layer_costs)
    placements = [point.placement for point in points]
    assert len(set(placements)) == len(placements)
    assert score.values(placements).tolist() == [point.value for point in points]
    exact = [_exact_cost(placement, score.space, layer_costs) for placement in placements]
    assert exact == sorted(set(exact))
    assert [point.cost for point in points] == [float(cost) for cost in exact]
    assert all(left.value < right.value for left, right in itertools.pairwise(points))


@st.composite
def restricted_problems(draw) -> tuple[AdditiveScore, np.ndarray]:
    """Problems whose layers hold any of the mixers; every mixer is held by some layer."""
    score, layer_costs = draw(problems())
    mixers, layers = score.space.mixers, score.space.num_layers
    some = st.lists(st.sampled_from(mixers), min_size=1, max_size=len(mixers), unique=True)
    held = draw(st.lists(some, min_size=layers, max_size=layers))
    full = draw(st.integers(0, layers - 1))
    held[full] = list(mixers)
    space = PlacementSpace(layers, mixers, tuple(map(tuple, held)))
    return AdditiveScore(space, score.constant, score.layers, score.pairs), layer_costs


@settings(max_examples=150, deadline=None)
@given(restricted_problems())
def test_equals_brute_force_where_layers_hold_different_mixers(problem):
    score, layer_costs = problem
    points = pareto_placements(score, layer_costs)
    assert [(point.cost, point.value) for point in points] == _brute_force(score, layer_costs)
    assert all(score.space.holds(point.placement) for point in points)
    assert score.values([point.placement for point in points]).tolist() == [point.value for point in points]


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_layers_without_a_common_mixer(reach):
    """No state survives from one layer to the next but those of the mixers that it holds."""
    space = PlacementSpace(4, MIXERS, (("fa", "swa"), ("gdn", "kda"), ("fa",), ("kda", "swa")))
    rng = np.random.default_rng(reach)
    pairs = tuple(rng.normal(size=(4 - distance, 4, 4)) for distance in range(1, reach + 1))
    score = AdditiveScore(space, 0.5, rng.normal(size=(4, 4)), pairs)
    costs = rng.random((4, 4))
    expected = _brute_force(score, costs)
    points = pareto_placements(score, costs)
    assert [point.cost for point in points] == pytest.approx([cost for cost, _ in expected])
    assert [point.value for point in points] == pytest.approx([value for _, value in expected])


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_five_layers_of_four_mixers_at_every_budget(reach):
    rng = np.random.default_rng(reach)
    pairs = tuple(rng.normal(size=(5 - distance, 4, 4)) for distance in range(1, reach + 1))
    score = AdditiveScore(PlacementSpace(5), 1.0, rng.normal(size=(5, 4)), pairs)
    costs = np.tile([1.0, 0.48, 0.21, 0.14], (5, 1))
    expected = _brute_force(score, costs)
    points = pareto_placements(score, costs)
    assert [point.cost for point in points] == pytest.approx([cost for cost, _ in expected])
    assert [point.value for point in points] == pytest.approx([value for _, value in expected])
    for budget in [0.7, *np.linspace(0.8, 5.01, 43)]:
        best = best_within(points, budget)
        assert best.value == pytest.approx(max(value for cost, value in expected if cost <= budget + 1e-9))


def test_sums_of_equal_layer_costs_are_one_cost():
    """0.1 + 0.2 + 0.7 in six orders: floating point makes several costs of one."""
    space = PlacementSpace(3, ("fa", "swa", "gdn"))
    score = AdditiveScore(space, 0.0, np.array([[0.0, 1.0, 2.0]] * 3) * [[1.0], [1.1], [1.3]])
    points = pareto_placements(score, np.tile([0.1, 0.2, 0.7], (3, 1)))
    compositions = [tuple(sorted(point.placement)) for point in points]
    assert len(set(compositions)) == len(compositions)


@pytest.mark.parametrize("dearest", [1.0, 1e9])
def test_costs_that_differ_in_the_last_bit_stay_apart(dearest):
    space = PlacementSpace(2, ("fa", "gdn", "kda"))
    score = AdditiveScore(space, 0.0, np.array([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]]))
    just_above = float(np.nextafter(1.0, 2.0))
    points = pareto_placements(score, np.array([[1.0, just_above, dearest], [1.0, 1.0, dearest]]))
    assert [str(point.placement) for point in points] == ["fa gdn", "gdn*2"]


def test_huge_and_tiny_costs_are_added_exactly():
    score = AdditiveScore(PlacementSpace(3, ("fa", "gdn")), 0.0, np.array([[0.0, -1.0]] * 3))
    points = pareto_placements(score, np.array([[1e300, 5e-324]] * 3))
    assert [point.cost for point in points] == [1.5e-323, 1e300, 2e300, 3e300]


def test_free_layers_leave_the_best_placement_alone():
    score = AdditiveScore(PlacementSpace(4), 0.0, np.arange(16.0).reshape(4, 4))
    (point,) = pareto_placements(score, np.zeros((4, 4)))
    assert (point.cost, point.value, str(point.placement)) == (0.0, 3 + 7 + 11 + 15, "kda*4")


def test_a_budget_below_the_cheapest_names_it():
    score = AdditiveScore(PlacementSpace(3, ("fa", "gdn")), 0.0, np.zeros((3, 2)))
    points = pareto_placements(score, np.tile([1.0, 0.25], (3, 1)))
    assert best_within(points, 0.75).placement == Placement.parse("gdn*3")
    with pytest.raises(BudgetError, match=r"0.5 cannot be met: the cheapest placement, gdn\*3, costs 0.75"):
        best_within(points, 0.5)


@pytest.mark.parametrize(("layers", "reach"), [(12, 1), (48, 1), (48, 2)])
def test_a_whole_model_takes_seconds(layers, reach):
    rng = np.random.default_rng(0)
    losses = -rng.gamma(2.0, 1.0, size=(layers, 4)) * [0.0, 0.4, 1.0, 0.8]
    pairs = tuple(rng.normal(0, 0.1, size=(layers - d, 4, 4)) for d in range(1, reach + 1))
    score = AdditiveScore(PlacementSpace(layers), 0.0, losses, pairs)
    start = time.perf_counter()
    points = pareto_placements(score, np.tile([1.0, 0.48, 0.21, 0.14], (layers, 1)))
    assert time.perf_counter() - start < 8
    assert len(points) > layers
