"""Memory as engines allocate it: against caches that were really made, and against a page-by-page count."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from gearshift.bench.engine import describe_embedded
from gearshift.placement import Placement
from gearshift.search.cost_engine import CostError, Engine, MixerMemory
from gearshift.serve.embedded import cache_bytes
from gearshift.slot_layout import SlotLayout
from tests.search.cost_scene import draw, made_up_engine
from tests.supernet.tools import tiny_supernet


@pytest.fixture(scope="module")
def slots() -> Engine:
    return made_up_engine()


@pytest.mark.parametrize("context", [1, 4, 5, 6, 100])
def test_the_embedded_engine_is_described_as_its_caches_are(context):
    model = tiny_supernet(0)
    engine = describe_embedded(model)
    for placement in [model.placement_space.sample_uniform(random.Random(n)) for n in range(20)]:
        expected = cache_bytes(model, placement, context)
        assert engine.sequence_bytes(placement, context) == expected
        chosen = [engine.space.mixers.index(mixer) for mixer in placement]
        by_layer = engine.layer_bytes(engine.space, context)
        assert by_layer[np.arange(len(chosen)), chosen].sum() == expected
    assert engine.weight_bytes() == sum(parameter.nbytes for parameter in model.parameters())


def test_weights_of_a_thin_model_are_those_that_its_placements_use():
    model = tiny_supernet(0)
    engine, placements = describe_embedded(model), [Placement.parse("fa*4"), Placement.parse("fa gdn*3")]
    used = [{"full_attention"}, *[{"full_attention", "gated_delta_net"}] * 3]
    expected = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if ".mixers." not in name or name.split(".")[4] in used[int(name.split(".")[2])]
    )
    assert engine.weight_bytes(placements) == expected


def touched_blocks(layout: SlotLayout, kinds: list, tokens: int) -> int:
    """Blocks that a request of so many tokens touches, token block by token block."""
    blocks = set()
    for seat in layout.seats(kinds):
        pages = range(1) if seat.kind == "state" else range(-(-tokens // layout.block_tokens))
        if seat.kind == "window":
            # Whatever the window holds, at the worst moment of the request.
            pages = [page for page in pages if (page + 1) * layout.block_tokens > tokens - layout.window]
        blocks |= {(seat.kind, seat.group, page // seat.fold) for page in pages}
    return len(blocks)


def test_blocks_are_those_that_a_requests_pages_touch(slots):
    layout = slots.slots
    assert layout is not None
    for number, placement in enumerate(draw(slots, 40, seed=1)):
        tokens = 64 * random.Random(number).randint(1, 400) - number
        kinds = [layer[mixer].kind for layer, mixer in zip(slots.layers, placement, strict=True)]
        held = slots.sequence_bytes(placement, tokens) // layout.block_bytes
        touched = touched_blocks(layout, kinds, tokens)
        # A window may begin within a block, which needs one more for each group of layers with a window.
        assert touched <= held <= touched + layout["window"].groups


def test_pages_of_layers_add_up_to_blocks_nearly(slots):
    for placement in draw(slots, 40, seed=2):
        chosen = [slots.space.mixers.index(mixer) for mixer in placement]
        added = slots.layer_bytes(slots.space, 32768)[np.arange(48), chosen].sum()
        assert added == pytest.approx(slots.sequence_bytes(placement, 32768), rel=0.1)


def test_the_published_shape_has_the_published_size(slots):
    assert slots.weight_bytes() / 2**30 == pytest.approx(45.9, abs=0.05)
    assert slots.sequence_bytes(Placement.uniform("fa", 48), 32768) / 2**30 == pytest.approx(6, rel=0.01)


def test_a_batch_fills_the_memory_and_no_more(slots):
    for placement in draw(slots, 10, seed=3):
        size = slots.largest_batch(placement, 16384, 70 * 2**30)
        each = slots.sequence_bytes(placement, 16384)
        assert size * each <= 70 * 2**30 < (size + 1) * each
    with pytest.raises(CostError, match=r"a sequence of 131072 tokens of fa\*48 holds 25,769,"):
        slots.largest_batch(Placement.uniform("fa", 48), 131072, 2**30)


def test_descriptions_are_read_as_they_were_written(slots):
    for engine in (slots, describe_embedded(tiny_supernet(0))):
        assert Engine.from_json(json.loads(json.dumps(engine.to_json()))) == engine
    assert len(slots.to_json()["layers"]) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": 3}, "the engine's description is damaged"),
        ({"layers": [[1, {"full_attention": {"kind": "full"}}]]}, "has no key 'cache_bytes'"),
        ({"slots": {"block_tokens": 3}}, "the engine's description is damaged"),
        ({"speed": 3}, "unknown key 'speed'"),
    ],
)
def test_damaged_descriptions_are_refused(slots, change, says):
    with pytest.raises(CostError, match=says):
        Engine.from_json({**slots.to_json(), **change})


@pytest.mark.parametrize("wrong", [("window", 4, 4), ("full", 4, 4, 3), ("full", -1, 4), ("book", 1, 1)])
def test_impossible_memory_is_refused(wrong):
    with pytest.raises(CostError, match="the memory of a mixer is"):
        MixerMemory(*wrong)


def test_a_prompt_attends_over_the_sum_of_what_its_tokens_read():
    for memory in (MixerMemory("full", 1, 1), MixerMemory("window", 1, 1, 7), MixerMemory("state", 1, 1)):
        for tokens in (1, 6, 7, 8, 30):
            assert memory.pairs_read(tokens) == sum(memory.tokens_read(n) for n in range(1, tokens + 1))
