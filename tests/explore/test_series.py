"""What the pictures draw: measured where something was measured, else predicted."""

from __future__ import annotations

import numpy as np
import pytest

from gearshift.explore.series import evaluated_dots, frontier_dots, measurement_for, preset_dots, summary


def test_frontier_dots_carry_their_intervals(scene):
    points, dots = scene.frontier.points, frontier_dots(scene.frontier)
    assert [dot.placement for dot in dots] == [point.placement for point in points]
    for point, dot in zip(points, dots, strict=True):
        assert dot.low < dot.retention < dot.high
        # The target is minus the loss, so that the interval is symmetric in the logarithm of the retention.
        reach = 1.6448536 * point.predicted_std
        assert np.log([dot.low, dot.high]) - np.log(dot.retention) == pytest.approx([-reach, reach])


def test_evaluated_dots_show_the_evaluated_retention(scene):
    table = scene.held_out
    dots = evaluated_dots(scene.frontier, table)
    assert len(dots) == len(table)
    for placement, value, dot in zip(table.placements, table.values, dots, strict=True):
        assert dot.retention == pytest.approx(np.exp(value + 1.5))
        assert dot.speed_up == scene.frontier.cost.speed_up(placement)
        assert dot.measured == "retention"


def test_presets_stand_where_they_were_measured(scene):
    teacher, quality, balanced, *_ = preset_dots(scene.frontier, scene.presets)
    assert (teacher.speed_up, teacher.retention, teacher.measured) == (1.0, 1.0, "retention")
    assert (quality.speed_up, quality.retention, quality.label) == (1.875, 0.875, "quality")
    assert quality.measured == "speed-up and retention"
    (predicted,) = scene.frontier.predict([balanced.placement])
    assert (balanced.speed_up, balanced.retention) == (predicted.speed_up, predicted.retention)
    assert balanced.measured == ""


def test_a_measurement_of_another_workload_is_not_taken(scene):
    assert measurement_for(scene.presets[1], scene.frontier.cost) is scene.presets[1].measurements[0]
    assert measurement_for(scene.presets[1], scene.other_cost) is None


def test_summary_names_every_preset_but_the_teacher(scene):
    text = summary(scene.frontier, scene.presets)
    assert "6 layers with 4 mixers give 4,096 placements. 45 were evaluated" in text
    assert "At context 2,048, batch 1: quality 1.88× at 88% of the teacher's quality, balanced" in text
    assert "teacher 1.00" not in text
    assert summary(scene.frontier, scene.presets[:1]).endswith("no placement is faster than the teacher.")
