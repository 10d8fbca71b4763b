"""The frontier of a fitted surrogate and cost model, and the presets chosen from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gearshift.presets import read_presets, write_presets
from gearshift.search.cost import fit_costs
from gearshift.search.frontier import Frontier, FrontierError, build_frontier, choose_presets
from gearshift.search.optimize import best_within, pareto_placements
from gearshift.search.surrogate import fit_surrogate
from gearshift.search.table import build_table


@pytest.fixture(scope="module")
def frontier(made_up) -> Frontier:
    surrogate = fit_surrogate(
        build_table(made_up.evaluate(made_up.draw(80), 0.005), made_up.space, "-loss"), folds=3
    )
    (cost,) = fit_costs(made_up.bench(made_up.uniform, 2048), made_up.space).values()
    return build_frontier(surrogate, cost)


def test_points_rise_in_speed_up_and_fall_in_quality(frontier):
    assert len(frontier.points) > 10
    for slower, faster in zip(frontier.points, frontier.points[1:], strict=False):
        assert slower.speed_up < faster.speed_up
        assert slower.predicted > faster.predicted
        assert slower.retention > faster.retention


def test_no_placement_beats_a_point(frontier, made_up):
    for other in frontier.predict(made_up.draw(400, seed=11)):
        better = [point for point in frontier.points if point.speed_up >= other.speed_up * (1 - 1e-9)]
        assert max(point.predicted for point in better) >= other.predicted - 1e-9


def test_points_agree_with_surrogate_and_cost(frontier):
    placements = [point.placement for point in frontier.points]
    means, stds = frontier.surrogate.predict(placements)
    for point, mean, std in zip(frontier.points, means, stds, strict=True):
        assert (point.predicted, point.predicted_std) == (pytest.approx(mean), pytest.approx(std))
        assert point.seconds == pytest.approx(frontier.cost.seconds(point.placement))
        assert point.retention == pytest.approx(math.exp(mean - frontier.surrogate.teacher_value))
        assert point.to_json()["placement"] == str(point.placement)


def test_little_is_lost_against_the_truth_at_any_speed(frontier, made_up):
    """The made-up supernet's own frontier is known, since its truth is a sum over layers and neighbours."""
    true_points = pareto_placements(made_up.truth, frontier.cost.layer_costs(made_up.space))
    reach = true_points[-1].value - true_points[0].value
    for point in frontier.points:
        best = best_within(true_points, (point.seconds - frontier.cost.base_seconds) * (1 + 1e-9))
        (value,) = made_up.truth.values([point.placement])
        assert best.value - value < 0.12 * reach


def test_default_presets_are_distinct_and_ordered(frontier, tmp_path):
    presets = choose_presets(frontier)
    assert [preset.name for preset in presets] == ["teacher", "quality", "balanced", "fast", "fastest"]
    assert len({preset.placement for preset in presets}) == 5
    speeds = [frontier.cost.speed_up(preset.placement) for preset in presets]
    assert speeds == sorted(speeds)
    assert speeds[-1] == pytest.approx(frontier.points[-1].speed_up)
    qualities = [preset.predicted_quality or 0.0 for preset in presets]
    assert all(qualities)
    assert qualities == sorted(qualities, reverse=True)
    assert (presets[0].retention, presets[0].quality) == (1.0, frontier.surrogate.table.teacher_quality)
    write_presets(tmp_path, presets)
    assert list(read_presets(tmp_path).values()) == presets


def test_speed_up_targets_take_the_best_placement_fast_enough(frontier):
    _, chosen = choose_presets(frontier, speed_ups={"double": 2.0})
    point = next(point for point in frontier.points if point.speed_up >= 2.0)
    assert (chosen.name, chosen.placement) == ("double", point.placement)


def test_retention_targets_take_the_fastest_placement_good_enough(frontier):
    _, chosen = choose_presets(frontier, retentions={"r80": 0.8})
    good = [point for point in frontier.points if point.retention >= 0.8]
    assert chosen.placement == good[-1].placement


def test_a_taken_placement_is_passed_over(frontier):
    _, first, second, last, before_last = choose_presets(
        frontier,
        speed_ups={"a": 2.0, "b": 2.0},
        retentions={"c": frontier.points[-1].retention, "d": frontier.points[-1].retention},
    )
    order = [point.placement for point in frontier.points]
    assert order.index(second.placement) == order.index(first.placement) + 1
    assert order.index(last.placement) == len(order) - 1
    assert order.index(before_last.placement) == len(order) - 2


def test_targets_out_of_reach_name_the_nearest(frontier):
    fastest = frontier.points[-1].speed_up
    with pytest.raises(FrontierError, match=f"'x' asks for a speed-up of 99; the highest is {fastest:.4g}"):
        choose_presets(frontier, speed_ups={"x": 99})
    with pytest.raises(FrontierError, match="'x' asks for a retention of 1.5; below the teacher the highest"):
        choose_presets(frontier, retentions={"x": 1.5})


def test_a_short_frontier_names_what_it_has(frontier):
    two = replace(frontier, points=frontier.points[-2:])
    assert [preset.name for preset in choose_presets(two)] == ["teacher", "quality", "balanced"]
    assert [preset.name for preset in choose_presets(replace(frontier, points=()))] == ["teacher"]


def test_without_the_teachers_quality_none_is_predicted(frontier):
    table = replace(frontier.surrogate.table, teacher_quality=None)
    presets = choose_presets(replace(frontier, surrogate=replace(frontier.surrogate, table=table)))
    assert {preset.predicted_quality for preset in presets} == {None}
