"""Shared prefixes against plain passes, bit for bit; and how much they save and keep."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gearshift.evaluate.prefixes import (
    _depths_to_keep,
    hidden_states,
    in_tree_order,
    layers_saved,
    shared_prefixes,
)
from gearshift.placement import Placement, PlacementSpace
from tests.supernet.tools import random_tokens, tiny_supernet

SPACE = PlacementSpace(4)


def drawn(count: int, seed: int) -> list[Placement]:
    rng = random.Random(seed)
    return [SPACE.sample_uniform(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    return tiny_supernet(0)


def layers_run(model, monkeypatch) -> list[str]:
    """The mixers of every layer that runs, from now on."""
    ran: list[str] = []
    run = model.run_layer
    monkeypatch.setattr(model, "run_layer", lambda depth, *rest: ran.append(f"{depth}") or run(depth, *rest))
    return ran


@pytest.mark.parametrize("kept_bytes", [0, 5000, 1 << 30])
@pytest.mark.parametrize("ordered", [True, False])
@torch.inference_mode()
def test_every_placement_gets_what_it_gets_alone(model, kept_bytes, ordered):
    tokens = random_tokens(1, 2, 11)
    placements = drawn(40, 1)
    order = in_tree_order(placements, SPACE) if ordered else placements
    for placement, hidden in hidden_states(model, tokens, order, kept_bytes):
        logits = model.lm_head(hidden)
        assert torch.equal(logits, model(tokens, placement=placement).logits)


@torch.inference_mode()
def test_only_the_layers_that_differ_are_run(model, monkeypatch):
    order = in_tree_order(drawn(30, 2), SPACE)
    ran = layers_run(model, monkeypatch)
    list(hidden_states(model, random_tokens(1, 1, 5), order))
    assert len(ran) == sum(4 - shared for shared in shared_prefixes(order))
    assert layers_saved(order) == pytest.approx(1 - len(ran) / 120)
    assert len(ran) < 100
    # With room for one state only, some layers are run again, but never more than without sharing.
    ran.clear()
    list(hidden_states(model, random_tokens(1, 1, 5), order, 0))
    assert 120 * (1 - layers_saved(order)) < len(ran) < 120


def test_order_is_that_of_a_tree():
    placements = drawn(50, 3)
    order = in_tree_order(placements, SPACE)
    assert sorted(map(str, order)) == sorted(map(str, placements))
    seen: set[tuple[str, ...]] = set()
    for before, after in zip(order, order[1:], strict=False):
        # A branch that was left is never entered again.
        seen |= {
            before.mixers[:depth] for depth in range(1, 5) if before.mixers[:depth] != after.mixers[:depth]
        }
        assert not any(after.mixers[:depth] in seen for depth in range(1, 5))
    assert in_tree_order([*placements, Placement.uniform("fa", 4)], SPACE)[0] == Placement.uniform("fa", 4)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_what_is_kept_is_what_later_placements_start_from(shared):
    """Against the definition: a later placement starts where all since the present one begin alike."""
    starts = {min(shared[: later + 1]) for later in range(len(shared))}
    assert _depths_to_keep(shared, 4, 99) == starts - {0}
    assert _depths_to_keep(shared, 4, 1) <= {max(starts, default=0)}
