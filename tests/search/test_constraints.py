"""Constraints: what they mean, what is refused, and what is said where none can be met."""

from __future__ import annotations

import numpy as np
import pytest

from gearshift.placement import Placement, PlacementError, PlacementSpace
from gearshift.search.constraints import ConstraintError, Constraints, Limit, layer_limit
from gearshift.search.optimize import pareto_placements
from gearshift.search.space import AdditiveScore

SPACE = PlacementSpace(4, ("fa", "gdn", "kda"), (("fa", "gdn", "kda"), ("fa", "gdn"), ("fa",), ("fa", "kda")))
BYTES = np.tile([8.0, 2.0, 3.0], (4, 1))


def frontier(constraints: Constraints):
    score = AdditiveScore.of_layers(SPACE, np.tile([3.0, 2.0, 1.0], (4, 1)))
    return pareto_placements(score, np.tile([3.0, 2.0, 1.0], (4, 1)), constraints)


def test_each_kind_is_met_or_not():
    memory = layer_limit("memory", SPACE, BYTES, 21)
    placement = Placement.parse("gdn fa fa kda")
    assert Constraints(at_least={"fa": 2}, at_most={"kda": 1}, fixed={0: "gdn"}, limits=(memory,)).met(
        placement
    )
    assert not Constraints(at_least={"fa": 3}).met(placement)
    assert not Constraints(at_most={"full_attention": 1}).met(placement)
    assert not Constraints(fixed={3: "fa"}).met(placement)
    assert not Constraints(limits=(layer_limit("memory", SPACE, BYTES, 20.9),)).met(placement)
    assert Constraints(limits=(Limit("recall", memory.score, 21, floor=True),)).met(placement)
    assert not Constraints(limits=(Limit("recall", memory.score, 21.1, floor=True),)).met(placement)


def test_a_bound_that_is_a_sum_of_decimals_can_be_reached():
    tenths = layer_limit("memory", SPACE, np.tile([0.1, 0.2, 0.7], (4, 1)), 0.1 + 0.1 + 0.7 + 0.7)
    assert tenths.met(Placement.parse("kda fa fa kda"))


def test_they_say_what_they_are():
    constraints = Constraints(
        {"fa": 2}, {"gated_delta_net": 3}, {0: "kda"}, (layer_limit("memory", SPACE, BYTES, 9),)
    )
    assert str(constraints) == "at least 2 fa, at most 3 gdn, kda in layer 0, memory of at most 9"
    assert str(Constraints()) == "no constraints"


@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        (Constraints(at_least={"gdn": 3}), "2 layers can have gdn, 0 can have nothing else"),
        (Constraints(at_most={"fa": 0}), "4 layers can have fa, 1 can have nothing else"),
        (Constraints(at_least={"fa": 3}, at_most={"fa": 2}), "4 layers can have fa"),
        (Constraints(at_least={"fa": 3, "gdn": 2}), "the counts add up to 5 layers; the model has 4"),
        (
            Constraints(at_least={"swa": 1}),
            "a count of 1 for swa; expected at least 0, and one of fa, gdn, kda",
        ),
        (Constraints(at_most={"fa": -1}), "a count of -1 for fa"),
        (Constraints(fixed={2: "gdn"}), "layer 2 is to have gdn; expected a layer from 0 to 3 and a mixer"),
        (Constraints(fixed={4: "fa"}), "layer 4 is to have fa"),
    ],
)
def test_what_no_placement_can_have_is_refused(constraints, said):
    with pytest.raises(ConstraintError, match=said.replace("(", r"\(")):
        frontier(constraints)


def test_unknown_mixers_are_refused():
    with pytest.raises(PlacementError, match="unknown mixer 'mamba'"):
        Constraints(at_least={"mamba": 1})


def test_an_unreachable_limit_names_the_placement_nearest_to_it():
    memory = layer_limit("memory", SPACE, BYTES, 10)
    said = (
        r"no placement has at least 2 fa, memory of at most 10; without memory of at most 10 there are "
        r"some, such as gdn\*2 fa\*2, whose memory is 20: loosen it"
    )
    with pytest.raises(ConstraintError, match=said):
        frontier(Constraints(at_least={"fa": 2}, limits=(memory,)))
    with pytest.raises(ConstraintError, match=r"such as fa\*4, whose bytes is 32"):
        frontier(Constraints(limits=(Limit("bytes", memory.score, 33, floor=True),)))


def test_counts_that_are_possible_alone_but_not_together():
    """Layers 0, 1 can have gdn and 0, 3 kda: two of each are one layer too many."""
    with pytest.raises(ConstraintError, match="without at least 2 gdn there are some, such as kda fa.2 kda"):
        frontier(Constraints(at_least={"gdn": 2, "kda": 2}))


def test_the_cheapest_and_best_that_keep_to_them():
    points = frontier(Constraints(at_least={"fa": 2}, at_most={"kda": 1}))
    assert points[0].cost == 9.0  # fa, fa, gdn and kda; without the constraints kda gdn fa kda costs 7
    assert frontier(Constraints())[0].cost == 7.0
    assert points[-1].placement == Placement.parse("fa*4")
