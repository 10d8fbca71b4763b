"""Effects of layers and pairs of layers, against a surrogate whose score is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gearshift.explore.diagnostics import importance_figure, interaction_figure, stability_figures
from gearshift.explore.effects import layer_effects, strongest_interactions
from gearshift.placement import Placement, PlacementSpace

SPACE = PlacementSpace(4, ("fa", "swa", "gdn"), (("fa", "swa"), *[("fa", "swa", "gdn")] * 3))
LOSS = {"full_attention": 0.0, "sliding_attention": 1.0, "gated_delta_net": 3.0}


def surrogate_with(interaction: float) -> Any:
    """Layer i loses (i + 1) times what its mixer loses; GDN in layers 1 and 3 together, more."""

    def value(placement: Placement) -> float:
        both = placement[1] == placement[3] == "gated_delta_net"
        return 7 - sum((i + 1) * LOSS[m] for i, m in enumerate(placement)) - interaction * both

    score = SimpleNamespace(values=lambda placements: np.array([value(p) for p in placements]))
    return SimpleNamespace(score=score, table=SimpleNamespace(space=SPACE, target="-loss"))


def test_a_layers_effect_is_what_it_loses():
    effects = layer_effects(surrogate_with(0.0))
    assert np.isnan(effects[0, 2])
    assert effects[:, 0].tolist() == [0] * 4
    assert effects[:, 1].tolist() == [-1, -2, -3, -4]
    assert effects[1:, 2].tolist() == [-6, -9, -12]


def test_only_pairs_that_interact_are_told():
    assert strongest_interactions(surrogate_with(0.0)) == []
    (found,) = strongest_interactions(surrogate_with(0.5))
    assert found.layers == (1, 3)
    assert found.mixers == ("gated_delta_net", "gated_delta_net")
    assert found.value == pytest.approx(-0.5)


def test_of_several_mixers_the_strongest_pair_is_told(scene):
    """Against every pair of mixers, on a surrogate that was fitted."""
    surrogate = scene.frontier.surrogate
    space, base = surrogate.table.space, surrogate.score.values([surrogate.table.space.default])[0]
    for found in strongest_interactions(surrogate):
        i, j = found.layers
        alone = layer_effects(surrogate)
        for a, b in [(a, b) for a in range(4) for b in range(4)]:
            mixers = list(space.default)
            mixers[i], mixers[j] = space.mixers[a], space.mixers[b]
            both = surrogate.score.values([Placement(tuple(mixers))])[0]
            assert abs(both - base - alone[i, a] - alone[j, b]) <= abs(found.value) + 1e-9


def test_figures_show_the_same_numbers():
    bars = importance_figure(surrogate_with(0.5)).to_dict()["data"]
    assert [bar["name"] for bar in bars] == ["swa", "gdn"]
    assert list(bars[1]["y"]) == [None, -6, -9, -12]
    assert len({bar["marker"]["pattern"]["shape"] for bar in bars}) == 2
    (heat,) = interaction_figure(surrogate_with(0.5)).to_dict()["data"]
    assert heat["z"][3][1] == heat["z"][1][3] == pytest.approx(-0.5)
    assert heat["text"][3][1] == "layer 1 with gdn and layer 3 with gdn: -0.5 together"
    nothing = interaction_figure(surrogate_with(0.0))
    assert nothing.layout.annotations[0].text == "none: the effects of layers add up"


def stability() -> dict[str, Any]:
    def of(value: float | None) -> dict[str, Any]:
        ends = (None, None) if value is None else (value - 0.1, value + 0.05)
        return {"value": value, "low": ends[0], "high": ends[1]}

    def checkpoint(step: int, value: float, frontier: float | None) -> dict[str, Any]:
        columns = {"spearman": value, "mean_regret": 1 - value, "worst_regret": 2 - 2 * value}
        return {"step": step, "frontier_spearman": of(frontier), **{k: of(v) for k, v in columns.items()}}

    checkpoints = [checkpoint(100, 0.5, None), checkpoint(200, 0.75, 0.25), checkpoint(300, 1.0, 1.0)]
    return {"target": "-loss", "runs": [{"seed": 0, "checkpoints": checkpoints}]}


def test_rankings_over_training_have_their_intervals():
    correlation, regret = (figure.to_dict()["data"] for figure in stability_figures(stability()))
    assert list(correlation[0]["y"]) == [0.5, 0.75, 1.0]
    assert list(correlation[0]["error_y"]["array"]) == pytest.approx([0.05] * 3)
    assert list(correlation[0]["error_y"]["arrayminus"]) == pytest.approx([0.1] * 3)
    assert list(correlation[1]["x"]) == [200, 300]
    assert list(regret[1]["y"]) == [1.0, 0.5, 0.0]
    both = stability()
    both["runs"].append({**both["runs"][0], "seed": 1})
    assert len(stability_figures(both)[0].to_dict()["data"]) == 4
