"""From rows to presets, on made-up rows whose best placements are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gearshift.find_presets import (
    WorkloadNotMeasuredError,
    find_presets,
    frontier_to_json,
    with_measurements,
    write_found,
)
from gearshift.placement import MIXERS, Placement, PlacementSpace
from gearshift.presets import Preset, read_presets
from gearshift.search import load_costs, load_surrogate

SPACE = PlacementSpace(3)
# Nats and seconds that a layer adds; layers differ in what they lose, so that the frontier has an order.
LOSS = dict(zip(MIXERS, (0.0, 0.1, 0.3, 0.2), strict=True))
SECONDS = dict(zip(MIXERS, (0.004, 0.003, 0.001, 0.002), strict=True))
LAYER_WEIGHT = (1.0, 2.0, 3.0)


def loss(placement: Placement) -> float:
    return 1 + sum(weight * LOSS[mixer] for weight, mixer in zip(LAYER_WEIGHT, placement, strict=True))


def seconds(placement: Placement, context: int) -> float:
    return 0.002 + context / 1000 * sum(SECONDS[mixer] for mixer in placement)


@pytest.fixture
def evaluations() -> list[dict[str, Any]]:
    base = {"checkpoint": "c", "data": "d"}
    return [
        base
        | {
            "placement": str(placement),
            "loss": loss(placement),
            "kl": loss(placement) - 1,
            "quality": math.exp(-loss(placement)),
            "retention": math.exp(1 - loss(placement)),
        }
        for placement in SPACE.all_placements()
    ]


@pytest.fixture
def measurements() -> list[dict[str, Any]]:
    return [
        {
            "placement": str(placement),
            "context_length": context,
            "batch_size": 2,
            "seconds_per_step": seconds(placement, context) * jitter,
            "hardware": "made up",
        }
        for context in (1000, 2000)
        for placement in SPACE.all_placements()
        for jitter in (0.9, 1.0, 1.3)  # the median is 1
    ]


def true_frontier() -> set[Placement]:
    """By comparing every placement with every other."""
    everything = list(SPACE.all_placements())

    def beaten(one: Placement) -> bool:
        mine = (loss(one), seconds(one, 2000))
        others = [(loss(other), seconds(other, 2000)) for other in everything]
        return any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in others)

    return {placement for placement in everything if not beaten(placement)}


def test_the_frontier_is_the_true_one_and_the_presets_lie_on_it(evaluations, measurements):
    found = find_presets(evaluations, measurements, SPACE)
    values = {(round(loss(p), 6), round(seconds(p, 2000), 6)) for p in true_frontier()}
    assert {
        (round(loss(point.placement), 6), round(seconds(point.placement, 2000), 6))
        for point in found.frontier.points
    } == values
    assert {preset.placement for preset in found.presets} <= true_frontier()
    assert found.presets[0].name == "teacher"


def test_presets_carry_what_was_measured_of_them(evaluations, measurements):
    found = find_presets(evaluations, measurements, SPACE)
    teacher = Placement.parse("fa*3")
    for preset in found.presets:
        assert preset.retention == pytest.approx(math.exp(loss(teacher) - loss(preset.placement)))
        assert [m.workload.context_length for m in preset.measurements] == [1000, 2000]
        for measured in preset.measurements:
            context = measured.workload.context_length
            assert measured.seconds_per_token == pytest.approx(seconds(preset.placement, context) / 2)
            expected = seconds(teacher, context) / seconds(preset.placement, context)
            assert measured.speed_up == pytest.approx(expected)


def test_what_was_not_measured_stays_empty(evaluations, measurements):
    fast = Preset("fast", Placement.parse("gdn*3"))
    [unknown] = with_measurements([fast], [], [])
    assert unknown == fast
    without_teacher = [row for row in measurements if row["placement"] != "fa*3"]
    [no_speed_up] = with_measurements([fast], evaluations, without_teacher)
    assert no_speed_up.measurements == ()
    assert no_speed_up.retention is not None


def test_the_longest_context_is_searched_unless_another_is_asked_for(evaluations, measurements):
    assert find_presets(evaluations, measurements, SPACE).frontier.cost.context_length == 2000
    asked = find_presets(evaluations, measurements, SPACE, context_length=1000)
    assert asked.frontier.cost.context_length == 1000
    assert [cost.context_length for cost in asked.other_costs] == [2000]
    with pytest.raises(WorkloadNotMeasuredError, match=r"context length 500; measured are \[1000, 2000\]"):
        find_presets(evaluations, measurements, SPACE, context_length=500)


def test_every_file_is_written_and_can_be_read(evaluations, measurements, tmp_path: Path):
    found = find_presets(evaluations, measurements, SPACE)
    write_found(found, tmp_path / "out", supernet=tmp_path)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"surrogate.json", "costs.json", "frontier.json", "frontier.html", "frontier.png"}
    assert list(read_presets(tmp_path, SPACE).values()) == list(found.presets)
    assert load_costs(tmp_path / "out" / "costs.json").keys() == {(1000, 2), (2000, 2)}
    predicted = load_surrogate(tmp_path / "out" / "surrogate.json").predict([found.presets[-1].placement])
    expected = found.frontier.surrogate.predict([found.presets[-1].placement])
    assert [float(part[0]) for part in predicted] == pytest.approx([float(part[0]) for part in expected])


def test_the_frontiers_json_says_what_it_is_for(evaluations, measurements):
    content = json.loads(
        json.dumps(frontier_to_json(find_presets(evaluations, measurements, SPACE).frontier))
    )
    assert (content["context_length"], content["batch_size"], content["hardware"]) == (2000, 2, "made up")
    speed_ups = [point["speed_up"] for point in content["points"]]
    assert speed_ups == sorted(speed_ups)
    assert content["points"][0]["placement"] == "fa*3"
