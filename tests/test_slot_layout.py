"""The cut of the cache: every placement finds seats, no two layers share one, and little is wasted."""

from __future__ import annotations

import itertools
import random

import pytest

from gearshift.slot_layout import KINDS, Demand, Kind, SlotLayout, pieces

# The 15B shape: 48 layers, 8 key/value heads of 128 in bf16, states of 2 MiB and their convolutions' inputs.
LAYERS, BLOCK, PAGE, STATE, WINDOW = 48, 128, 2 * 128 * 8 * 128 * 2, 2**21 + 3 * 12288 * 2, 4096
# FA, SWA, KDA and GDN layers of the published presets.
PRESETS = [(12, 26, 6, 4), (13, 32, 1, 2), (3, 25, 4, 16), (0, 30, 5, 13), (0, 16, 13, 19), (0, 10, 5, 33)]


def big_layout(slots: int = 12, block: int = BLOCK) -> SlotLayout:
    page = PAGE * block // BLOCK
    demands: dict[Kind, Demand] = {
        "full": Demand(page, LAYERS),
        "window": Demand(page, LAYERS),
        "state": Demand(STATE, LAYERS),
    }
    return SlotLayout.plan(demands, layers=LAYERS, block_tokens=block, slots=slots, window=WINDOW)


def exact_bytes(counts: dict[Kind, int], tokens: int) -> float:
    token = PAGE / BLOCK
    return (
        counts["full"] * tokens * token
        + counts["window"] * min(tokens, WINDOW) * token
        + counts["state"] * STATE
    )


@pytest.mark.parametrize("slots", [1, 2, 3, 6, 7, 12])
def test_any_number_of_layers_is_split_into_what_fills_super_pages(slots):
    for count in range(1, 60):
        sizes = pieces(count, slots)
        assert sum(sizes) == count and all(slots % size == 0 for size in sizes)
        assert sizes.count(slots) == count // slots


def test_no_two_layers_of_a_request_share_a_page():
    layout, rng = big_layout(), random.Random(0)
    for _ in range(50):
        kinds = rng.choices(KINDS, weights=[rng.random() for _ in KINDS], k=LAYERS)
        pages = set()
        for seat in layout.seats(kinds):
            cut = layout[seat.kind]
            assert seat.group < cut.groups
            for block in range(3 * seat.fold):
                place = seat.group, block // seat.fold, block % seat.fold * seat.stride + seat.offset
                assert place[2] < cut.slots
                assert (seat.kind, *place) not in pages
                if seat.kind != "state" or block == 0:
                    pages.add((seat.kind, *place))


def test_a_page_fits_between_its_neighbours_and_a_block_holds_its_pages():
    layout = big_layout()
    sizes: dict[Kind, int] = {"full": PAGE, "window": PAGE, "state": STATE}
    for kind, size in sizes.items():
        assert layout[kind].page_bytes >= size and layout[kind].page_bytes % 16 == 0
        assert layout[kind].page_bytes * layout[kind].slots == layout.block_bytes
    assert (layout["full"].slots, layout["state"].slots) == (12, 3)


def test_a_state_larger_than_the_attention_pages_makes_the_block():
    demands: dict[Kind, Demand] = {"full": Demand(1000, 4), "state": Demand(100_000, 4)}
    layout = SlotLayout.plan(demands, layers=4, block_tokens=16, slots=2, window=0)
    assert layout.block_bytes >= 100_000 and layout["state"].slots == 1 and layout["full"].slots == 2


# A third state makes a super-page 3.5 % larger than its attention pages need.
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("tokens", "most"), [(32 * 1024, 1.15), (16 * 1024, 1.15), (1024, 1.21)])
def test_the_published_presets_hold_little_more_than_they_need(preset, tokens, most):
    full, window, kda, gdn = preset
    counts: dict[Kind, int] = {"full": full, "window": window, "state": kda + gdn}
    layout = big_layout()
    held = sum(layout.blocks(kind, count, tokens, 1) for kind, count in counts.items()) * layout.block_bytes
    assert 1 <= held / exact_bytes(counts, tokens) <= most


def test_the_worst_case_is_no_smaller_than_any_placement():
    layout = big_layout()
    worst = layout.worst_case_blocks(5000, 512)
    rng = random.Random(0)
    for _ in range(200):
        split = sorted(rng.choices(range(LAYERS + 1), k=2))
        counts = (split[0], split[1] - split[0], LAYERS - split[1])
        assert worst >= sum(
            layout.blocks(kind, count, 5000, 512) for kind, count in zip(KINDS, counts, strict=True)
        )


def test_shares_cover_whole_super_pages_and_come_in_the_order_of_the_groups():
    layout = big_layout()
    counts: list[tuple[Kind, int]] = [("full", 15), ("state", 7), ("window", 26)]
    kinds: list[Kind] = [kind for kind, count in counts for _ in range(count)]
    shares = layout.shares(kinds)
    assert [(s.kind, s.group, s.block_tokens // BLOCK) for s in shares] == [
        *(("full", 0, 1), ("full", 1, 4)),
        *(("window", 0, 1), ("window", 1, 1), ("window", 2, 6)),
        *(("state", 0, 1), ("state", 1, 1), ("state", 2, 1)),
    ]
    names = layout.group_names()
    assert [names.index((s.kind, s.group)) for s in shares] == sorted(
        names.index((s.kind, s.group)) for s in shares
    )
    assert all(a <= b for a, b in itertools.pairwise(KINDS.index(kind) for kind, _ in names))
