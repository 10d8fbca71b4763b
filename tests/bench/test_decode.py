"""Which placements are measured; what comes of measuring is tested with ``gearshift bench``."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gearshift.bench.decode import DecodeSettings, cost_placements, measure_decode
from gearshift.placement import MIXERS, PlacementSpace
from gearshift.search import fit_costs
from gearshift.supernet import SupernetForCausalLM
from tests.supernet.tools import only_holding, tiny_supernet

SECONDS = dict(zip(MIXERS, (5.0, 3.0, 1.0, 2.0), strict=True))


def rows_of(space: PlacementSpace) -> list[dict[str, Any]]:
    """Made-up measurements of what a cost model asks for."""
    return [
        {
            "placement": str(placement),
            "context_length": 64,
            "batch_size": 1,
            "hardware": "h",
            "seconds_per_step": 7.0 + sum(SECONDS[mixer] for mixer in placement),
        }
        for placement in cost_placements(space)
    ]


@st.composite
def spaces(draw) -> PlacementSpace:
    some = st.lists(st.sampled_from(MIXERS), min_size=1, max_size=4, unique=True).map(tuple)
    held = tuple(draw(st.lists(some, min_size=1, max_size=6)))
    return PlacementSpace(len(held), tuple({mixer for mixers in held for mixer in mixers}), held)


def test_each_mixer_everywhere_and_in_every_other_layer():
    assert list(map(str, cost_placements(PlacementSpace(5, ("fa", "swa", "gdn"))))) == [
        "fa*5",
        "swa*5",
        "gdn*5",
        "swa fa swa fa swa",
        "gdn fa gdn fa gdn",
    ]


# Layers 0 and 2 may both have KDA, and only measuring one without the other tells FA from SWA.
APART = PlacementSpace(3, ("fa", "swa", "kda"), (("fa", "kda"), ("fa",), ("swa", "kda")))


@given(spaces())
@example(APART)
def test_whatever_layers_hold_the_costs_that_matter_are_settled(space: PlacementSpace):
    (model,) = fit_costs(rows_of(space), space).values()
    for placement in list(space.all_placements())[:200]:
        assert model.seconds(placement) == pytest.approx(7.0 + sum(SECONDS[mixer] for mixer in placement))


@pytest.fixture(scope="module")
def model() -> SupernetForCausalLM:
    return tiny_supernet(3)


def test_a_model_without_its_teacher_is_measured_without_it(model: SupernetForCausalLM):
    held = [("gated_delta_net",), *[("full_attention", "kimi_delta_attention")] * 3]
    thin = only_holding(model, held)
    placements = cost_placements(thin.placement_space)
    rows = measure_decode(thin, placements, [16], DecodeSettings(steps=1, rounds=1), progress=False)
    assert [row["placement"] for row in rows] == [str(placement) for placement in placements]
    assert rows[0]["placement"] == "gdn fa*3"
