"""Placements: text and JSON forms, spaces, samplers, and what is refused."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift import placement as module
from gearshift.placement import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    KIMI_DELTA_ATTENTION,
    MIXERS,
    SLIDING_ATTENTION,
    Placement,
    PlacementError,
    PlacementSpace,
    known_mixers,
    long_name,
    register_mixer_name,
    short_name,
)

placements = st.lists(st.sampled_from(MIXERS), min_size=1, max_size=60).map(
    lambda names: Placement(tuple(names))
)


@pytest.fixture
def fresh_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test end with it."""
    monkeypatch.setattr(module, "_short_names", dict(module._short_names))


@given(placements)
def test_text_and_json_round_trip(placement: Placement) -> None:
    assert Placement.parse(str(placement)) == placement
    assert Placement.parse(str(placement), len(placement)) == placement
    assert Placement.from_json(placement.to_json()) == placement
    assert hash(Placement.parse(str(placement))) == hash(placement)


@given(placements)
def test_text_is_the_shortest_run_length_form(placement: Placement) -> None:
    runs = str(placement).split(" ")
    names = [run.partition("*")[0] for run in runs]
    assert all(left != right for left, right in zip(names, names[1:], strict=False))
    assert all(run.partition("*")[2] not in ("0", "1") for run in runs)


def test_text_form_of_the_design() -> None:
    placement = Placement.parse("fa*2 swa*10 fa kda*3 gdn*32")
    assert len(placement) == 48
    assert str(placement) == "fa*2 swa*10 fa kda*3 gdn*32"
    assert placement[0] == placement[12] == FULL_ATTENTION
    assert placement.counts() == {
        FULL_ATTENTION: 3,
        SLIDING_ATTENTION: 10,
        GATED_DELTA_NET: 32,
        KIMI_DELTA_ATTENTION: 3,
    }
    assert list(placement)[13:16] == [KIMI_DELTA_ATTENTION] * 3


@pytest.mark.parametrize(
    "text",
    [
        "fa*2,swa",
        "fa*2, swa",
        "  fa  fa\tswa\n",
        "full_attention*2 sliding_attention",
        "FA * 2 SWA",
        "fa*1 fa*01 swa*1",
    ],
)
def test_lenient_forms_mean_the_same(text: str) -> None:
    assert str(Placement.parse(text)) == "fa*2 swa"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (" , ", "is empty"),
        ("fa mamba*3", "unknown mixer 'mamba'; expected one of fa (full_attention), swa"),
        ("fa*0", "the count '0' of 'fa*0'"),
        ("fa*-1", "the count '-1' of 'fa*-1'"),
        ("fa*x", "the count 'x' of 'fa*x'"),
        ("fa*", "the count '' of 'fa*'"),
        ("fa*2*3", "the count '2*3'"),
        ("fa*1.5", "the count '1.5'"),
        ("fa*٣", "expected a whole number of layers, at least 1"),
        ("*3", "'*3' in the placement '*3'; expected a mixer"),
        ("fa*999999999", "expected at most 4096"),
        ("fa*" + "9" * 5000, "expected a whole number"),
    ],
)
def test_bad_text_is_refused(text: str, says: str) -> None:
    with pytest.raises(PlacementError) as caught:
        Placement.parse(text)
    assert says in str(caught.value)


def test_wrong_length_names_given_and_expected() -> None:
    with pytest.raises(PlacementError, match=r"'fa\*3 gdn' has 4 layers; expected 12"):
        Placement.parse("fa*3 gdn", num_layers=12)
    with pytest.raises(PlacementError, match="has 1 layers; expected 2"):
        Placement.of([FULL_ATTENTION], 2)


@pytest.mark.parametrize("names", ["fa", None, [1], {"fa": 1}, [], ["fa", "mamba"]])
def test_bad_json_is_refused(names: object) -> None:
    with pytest.raises(PlacementError):
        Placement.from_json(names)


def test_names_inside_must_be_long() -> None:
    with pytest.raises(PlacementError, match="layer 1: unknown mixer 'fa'"):
        Placement((FULL_ATTENTION, "fa"))


def test_of_takes_every_form() -> None:
    expected = Placement((FULL_ATTENTION, GATED_DELTA_NET))
    for value in (expected, "fa gdn", ["fa", "gdn"], [FULL_ATTENTION, GATED_DELTA_NET]):
        assert Placement.of(value, 2) == expected
    with pytest.raises(PlacementError, match="the placement 7; expected a list"):
        Placement.of(7)  # pyright: ignore[reportArgumentType] - what a file may hold
    assert Placement.uniform("kda", 3) == Placement((KIMI_DELTA_ATTENTION,) * 3)


def test_a_fifth_mixer_joins(fresh_names: None) -> None:
    register_mixer_name("mamba_two", "m2")
    register_mixer_name("mamba_two", "m2")
    assert known_mixers() == (*MIXERS, "mamba_two")
    assert Placement.parse("m2*2 fa").mixers == ("mamba_two", "mamba_two", FULL_ATTENTION)
    assert str(Placement.parse("m2*2 fa")) == "m2*2 fa"
    assert long_name("m2") == "mamba_two"
    assert short_name("mamba_two") == short_name("m2") == "m2"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("full_attention", "full"),
        ("fa", "fb"),
        ("new", "swa"),
        ("new", "gated_delta_net"),
        ("Bad Name", "bad"),
        ("good", "b*d"),
        ("same", "same"),
        ("", "x"),
    ],
)
def test_colliding_and_malformed_names_are_refused(fresh_names: None, name: str, short: str) -> None:
    before = known_mixers()
    with pytest.raises(PlacementError):
        register_mixer_name(name, short)
    assert known_mixers() == before


def test_space_checks_its_placements() -> None:
    space = PlacementSpace(3, ("fa", "gdn"))
    inside = Placement.parse("fa gdn*2")
    assert space.mixers == (FULL_ATTENTION, GATED_DELTA_NET)
    assert space.check(inside) is inside
    with pytest.raises(PlacementError, match="has kda in layer 2; this model holds only fa, gdn"):
        space.check(Placement.parse("fa*2 kda"))
    with pytest.raises(PlacementError, match="has 2 layers; expected 3"):
        space.check(Placement.parse("fa*2"))


@pytest.mark.parametrize(
    ("num_layers", "mixers"),
    [(0, MIXERS), (-1, MIXERS), (10**9, MIXERS), (2, ()), (2, ("fa", "fa")), (2, ("x",))],
)
def test_bad_spaces_are_refused(num_layers: int, mixers: tuple[str, ...]) -> None:
    with pytest.raises(PlacementError):
        PlacementSpace(num_layers, mixers)


def test_a_space_has_one_order_of_its_mixers_whoever_wrote_it() -> None:
    assert PlacementSpace(2, ("kda", "fa", "gdn")).mixers == tuple(long_name(m) for m in ("fa", "gdn", "kda"))
    assert PlacementSpace(2, tuple(reversed(MIXERS))) == PlacementSpace(2)


def test_all_placements_are_all_and_distinct() -> None:
    space = PlacementSpace(4)
    everything = list(space.all_placements())
    assert len(everything) == len(set(everything)) == space.size == 256
    assert all(space.check(placement) for placement in everything)


def test_samples_lie_in_the_space_and_follow_the_seed() -> None:
    space = PlacementSpace(7, ("fa", "swa", "kda"))
    for draw in (space.sample_uniform, space.sample_composition):
        first = [space.check(draw(random.Random(5))) for _ in range(3)]
        assert first == [first[0]] * 3
        assert len({draw(random.Random(seed)) for seed in range(40)}) > 20


def test_uniform_sampling_gives_each_mixer_its_share_of_every_layer() -> None:
    rng = random.Random(0)
    drawn = [PlacementSpace(3).sample_uniform(rng) for _ in range(4000)]
    for layer in range(3):
        shares = Counter(placement[layer] for placement in drawn)
        assert all(abs(shares[mixer] - 1000) < 150 for mixer in MIXERS)


def test_composition_sampling_is_uniform_over_counts_and_arrangements() -> None:
    space, rng = PlacementSpace(3, ("fa", "gdn")), random.Random(1)
    drawn = Counter(space.sample_composition(rng) for _ in range(8000))
    by_count: Counter[int] = Counter()
    for placement, times in drawn.items():
        by_count[placement.counts().get(FULL_ATTENTION, 0)] += times
    assert all(abs(by_count[count] - 2000) < 200 for count in range(4))
    one_fa = [drawn[Placement.parse(text)] for text in ("fa gdn*2", "gdn fa gdn", "gdn*2 fa")]
    assert all(abs(times - 2000 / 3) < 120 for times in one_fa)


UNLIKE = PlacementSpace(4, ("fa", "swa", "kda"), (("fa",), ("kda", "swa"), ("swa", "fa", "kda"), ("kda",)))


def test_a_layer_allows_what_it_holds() -> None:
    assert UNLIKE.layers[:2] == ((FULL_ATTENTION,), ("sliding_attention", "kimi_delta_attention"))
    assert UNLIKE.allowed(2) == UNLIKE.mixers
    assert str(UNLIKE.default) == "fa swa fa kda"
    assert str(UNLIKE.mostly("kimi_delta_attention")) == "fa kda*3"
    inside = Placement.parse("fa kda fa kda")
    assert UNLIKE.check(inside) is inside
    assert UNLIKE.holds(inside) and not UNLIKE.holds(Placement.parse("fa kda fa*2"))
    assert not UNLIKE.holds(Placement.parse("fa kda"))
    with pytest.raises(PlacementError, match="has fa in layer 1; this layer holds only swa, kda"):
        UNLIKE.check(Placement.parse("fa*4"))
    with pytest.raises(PlacementError, match="has gdn in layer 0; this model holds only fa, swa, kda"):
        UNLIKE.check(Placement.parse("gdn*4"))


def test_the_teacher_needs_full_attention_everywhere() -> None:
    assert str(PlacementSpace(2, ("fa", "kda"), (("fa",), ("fa", "kda"))).teacher()) == "fa*2"
    with pytest.raises(PlacementError, match="no full_attention in layers 1, 3: the teacher is none of"):
        UNLIKE.teacher()


def test_all_placements_of_unlike_layers() -> None:
    brute = [p for p in PlacementSpace(4, UNLIKE.mixers).all_placements() if UNLIKE.holds(p)]
    assert list(UNLIKE.all_placements()) == brute
    assert len(brute) == UNLIKE.size == 6


def test_layers_that_hold_everything_are_no_restriction() -> None:
    """Equal spaces compare equal, and old seeds draw what they drew."""
    assert PlacementSpace(2, ("fa", "gdn"), (("gdn", "fa"), ("fa", "gdn"))) == PlacementSpace(
        2, ("fa", "gdn")
    )


@pytest.mark.parametrize(
    ("layer_mixers", "says"),
    [
        ((("fa",),), "the mixers of 1 layers; expected those of 2"),
        ((("fa", "gdn"), ()), r"layer 1 with the mixers \[\]"),
        ((("fa", "fa"), ("gdn",)), "layer 0 with .*each once"),
        (
            (("fa",), ("fa",)),
            "the layers hold full_attention; expected exactly full_attention, gated_delta_net",
        ),
        (
            (("fa", "gdn"), ("swa",)),
            "the layers hold full_attention, sliding_attention, gated_delta_net; expected",
        ),
        ((("fa", "gdn"), ("mamba",)), "unknown mixer 'mamba'"),
    ],
)
def test_bad_layers_are_refused(layer_mixers: tuple[tuple[str, ...], ...], says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        PlacementSpace(2, ("fa", "gdn"), layer_mixers)


def test_samples_of_unlike_layers_lie_in_the_space_and_follow_the_seed() -> None:
    for draw in (UNLIKE.sample_uniform, UNLIKE.sample_composition):
        drawn = [UNLIKE.check(draw(random.Random(seed))) for seed in range(200)]
        assert drawn == [draw(random.Random(seed)) for seed in range(200)]
        assert len(set(drawn)) == UNLIKE.size


def test_shares_of_unlike_layers_are_uniform_too() -> None:
    """Of two mixers with shares w and 1 - w, w uniform, n layers get k of one with chance 1 / (n + 1)."""
    space = PlacementSpace(4, ("fa", "gdn"), (("fa", "gdn"), ("fa",), ("fa", "gdn"), ("gdn", "fa")))
    rng = random.Random(2)
    counts = Counter(space.sample_composition(rng).counts().get(GATED_DELTA_NET, 0) for _ in range(8000))
    assert all(abs(counts[count] - 2000) < 200 for count in range(4))


def test_uniform_sampling_of_unlike_layers_gives_each_held_mixer_its_share() -> None:
    rng = random.Random(3)
    drawn = Counter(UNLIKE.sample_uniform(rng)[2] for _ in range(3000))
    assert all(abs(drawn[mixer] - 1000) < 130 for mixer in UNLIKE.mixers)


def test_composition_sampling_with_one_mixer() -> None:
    assert PlacementSpace(4, ("swa",)).sample_composition(random.Random(0)) == Placement.uniform("swa", 4)
