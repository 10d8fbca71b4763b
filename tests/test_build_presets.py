"""Presets by workload and retention, alone and together under a ceiling, against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from gearshift.build_presets import (
    Built,
    PresetBuildError,
    Wish,
    build_point,
    choose_each,
    choose_together,
    choose_until_kept,
    make_wishes,
    teacher_preset,
)
from gearshift.placement import MIXERS, Placement, PlacementSpace
from gearshift.search import Constraints, CostModel, Surrogate, build_table, fit_costs, fit_surrogate

SPACE = PlacementSpace(4, MIXERS[:3])
HARM = dict(zip(MIXERS, (0.0, 0.02, 0.06), strict=False))
SECONDS = dict(zip(MIXERS, (0.004, 0.003, 0.001), strict=False))
# By layer and mixer; all-FA takes 40, everything 4 * 31.
BYTES = np.array([[10.0, 12.0 + layer, 9.0 - layer] for layer in range(4)])
SHARED = 100


def loss(placement: Placement) -> float:
    return 1 + sum((1 + layer) * HARM[mixer] for layer, mixer in enumerate(placement))


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    rows = [
        {
            "checkpoint": "c",
            "data": "d",
            "placement": str(placement),
            "loss": loss(placement),
            "quality": math.exp(-loss(placement)),
        }
        for placement in SPACE.all_placements()
    ]
    return fit_surrogate(build_table(rows, SPACE, "-loss"), 0)


@pytest.fixture(scope="module")
def costs() -> list[CostModel]:
    rows = [
        {
            "placement": str(SPACE.mostly(mixer)),
            "context_length": context,
            "batch_size": 2,
            "seconds_per_step": 0.002 + context / 1000 * 4 * SECONDS[mixer] * (1 + (mixer == MIXERS[0])),
            "hardware": "made up",
        }
        for context in (1000, 4000)
        for mixer in SPACE.mixers
    ]
    return list(fit_costs(rows, SPACE).values())


def kept(placement: Placement) -> float:
    return math.exp(1 - loss(placement))


def test_wishes_are_named_by_retention_and_workload(costs):
    assert [wish.name for wish in make_wishes(costs[:1], (0.9, 0.995))] == ["r99.5", "r90"]
    both = make_wishes(costs, (0.9,))
    assert [(wish.name, wish.cost) for wish in both] == [("r90-1000x2", costs[0]), ("r90-4000x2", costs[1])]
    for wrong in ((), (0.0,), (97.0,), (0.9, 0.9)):
        with pytest.raises(
            PresetBuildError, match="expected different shares of the teacher's quality, 0 to 1"
        ):
            make_wishes(costs, wrong)


def test_each_is_the_fastest_that_keeps_enough(surrogate, costs):
    for built in choose_each(surrogate, make_wishes(costs, (0.99, 0.95, 0.9, 0.7))):
        wish = built.wish
        enough = [p for p in SPACE.all_placements() if kept(p) >= wish.retention * (1 + 1e-4)]
        fastest = min(wish.cost.seconds(placement) for placement in enough)
        assert built.point.retention >= wish.retention * (1 - 1e-9)
        assert wish.cost.seconds(built.point.placement) <= fastest * (1 + 1e-9)
        assert built.preset(0.5).predicted_quality == pytest.approx(0.5 * built.point.retention)


def test_constraints_and_what_was_measured_are_kept_to(surrogate, costs):
    (wish,) = make_wishes(costs[:1], (0.9,))
    (first,) = choose_each(surrogate, [wish])
    (second,) = choose_each(surrogate, [wish], measured={first.point.placement: 0.89})
    assert second.point.placement != first.point.placement
    assert second.point.speed_up <= first.point.speed_up
    (same,) = choose_each(surrogate, [wish], measured={first.point.placement: 0.91})
    assert same == first
    (wish,) = make_wishes(costs[:1], (0.8,))
    (fixed,) = choose_each(surrogate, [wish], constraints=Constraints(at_most={"fa": 0}))
    assert "full_attention" not in fixed.point.placement.mixers


def test_caution_costs_speed(costs):
    rng = np.random.default_rng(0)
    rows = [
        {"checkpoint": "c", "data": "d", "placement": str(p), "loss": loss(p) + 0.01 * rng.normal()}
        for p in SPACE.all_placements()
    ]
    noisy = fit_surrogate(build_table(rows, SPACE, "-loss"), 0)
    wishes = make_wishes(costs[:1], (0.97, 0.9, 0.8))
    bold, careful = choose_each(noisy, wishes), choose_each(noisy, wishes, cautious=True)
    for one, other in zip(bold, careful, strict=True):
        assert other.point.speed_up <= one.point.speed_up
        sure = noisy.retention(other.point.predicted - 1.2816 * other.point.predicted_std)
        assert sure >= other.wish.retention - 1e-4 or set(other.point.placement) == {"full_attention"}
    assert any(other.point.speed_up < one.point.speed_up for one, other in zip(bold, careful, strict=True))


def test_a_retention_that_nothing_keeps_names_the_best(surrogate, costs):
    wishes = make_wishes(costs[:1], (0.97,))
    with pytest.raises(
        PresetBuildError, match=r"'r97' asks for a retention of 0.97; .* keeps 0.8\d* as pred"
    ):
        choose_each(surrogate, wishes, constraints=Constraints(at_most={"fa": 0}))


def least_cost_together(wishes: Sequence[Wish], surrogate: Surrogate, ceiling: float) -> float:
    """Over every combination of placements that fits and keeps enough."""
    everything = list(SPACE.all_placements())
    predicted = [surrogate.retention(value) for value in surrogate.predict(everything)[0]]
    options = [
        [p for p, share in zip(everything, predicted, strict=True) if share >= wish.retention - 1e-12]
        for wish in wishes
    ]
    best = math.inf
    for combination in itertools.product(*options):
        if together_bytes(combination) <= ceiling:
            best = min(best, total_cost(wishes, combination))
    return best


def together_bytes(placements: Sequence[Placement]) -> float:
    used = {(layer, mixer) for placement in placements for layer, mixer in enumerate(placement)}
    return SHARED + sum(BYTES[layer, SPACE.mixers.index(mixer)] for layer, mixer in used)


def total_cost(wishes: Sequence[Wish], placements: Sequence[Placement]) -> float:
    return sum(1 / wish.cost.speed_up(p) for wish, p in zip(wishes, placements, strict=True))


@pytest.mark.parametrize("ceiling", [150, 160, 170, 185, 240])
def test_together_equals_brute_force(surrogate, costs, ceiling):
    wishes = [Wish("a", costs[0], 0.95), Wish("b", costs[1], 0.8)]
    built = choose_together(surrogate, wishes, BYTES, SHARED, ceiling)
    chosen = [each.point.placement for each in built]
    assert together_bytes(chosen) <= ceiling
    assert all(each.point.retention >= each.wish.retention - 1e-6 for each in built)
    assert total_cost(wishes, chosen) == pytest.approx(least_cost_together(wishes, surrogate, ceiling))


def test_a_ceiling_that_is_too_low_says_how_much_is_needed(surrogate, costs):
    wishes = [Wish("a", costs[0], 0.95), Wish("b", costs[1], 0.8)]
    with pytest.raises(
        PresetBuildError, match="may take 120 bytes; a, b need at least ([0-9,]+) together"
    ) as error:
        choose_together(surrogate, wishes, BYTES, SHARED, 120)
    least = float(str(error.value).split("at least ")[1].split(" together")[0].replace(",", ""))
    assert math.isinf(least_cost_together(wishes, surrogate, least - 1))
    assert choose_together(surrogate, wishes, BYTES, SHARED, least)
    with pytest.raises(PresetBuildError, match="no placement with at most 0 fa is predicted to keep 0.95"):
        choose_together(surrogate, wishes, BYTES, SHARED, 999, constraints=Constraints(at_most={"fa": 0}))


def test_what_keeps_too_little_is_chosen_again(surrogate, costs):
    """The evaluation finds every placement with Gated DeltaNet worse than predicted."""
    (wish,) = make_wishes(costs[:1], (0.9,))
    asked: list[Placement] = []

    def choose(measured) -> list[Built]:
        return choose_each(surrogate, [wish], measured=measured)

    def evaluate(placements):
        asked.extend(placements)
        return [{"retention": kept(p) - 0.2 * ("gated_delta_net" in p.mixers)} for p in placements]

    (built,) = choose_until_kept(choose, evaluate, attempts=20)
    assert "gated_delta_net" not in built.point.placement.mixers
    assert kept(built.point.placement) >= 0.9
    assert 1 < len(asked) == len(set(asked))
    asked.clear()
    choose_until_kept(choose, evaluate, attempts=2)
    assert len(asked) == 1


def test_the_teacher_and_predictions_of_one_placement(surrogate, costs):
    teacher = teacher_preset(surrogate)
    assert (teacher.name, str(teacher.placement), teacher.retention) == ("teacher", "fa*4", 1.0)
    assert teacher.quality == pytest.approx(math.exp(-1))
    point = build_point(surrogate, costs[0], Placement.parse("swa*4"))
    assert point.retention == pytest.approx(math.exp(-0.2), rel=1e-3)
    assert point.speed_up == pytest.approx(costs[0].speed_up(point.placement))
