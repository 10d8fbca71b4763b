from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.placement import FULL_ATTENTION, GATED_DELTA_NET, KIMI_DELTA_ATTENTION, SLIDING_ATTENTION
from gearshift.supernet.mixers import Mixer
from gearshift.train.calibrate import fit
from gearshift.train.calibrate.fit import Fitted, Material, fit_mixer, round_error
from gearshift.train.calibrate.steps import Batch
from gearshift.train.calibrate.walk import TeacherWalk
from tests.train.calibrate.tools import (
    LENGTH,
    lively_supernet,
    mixer_of,
    observe_all,
    random_windows,
    relative_error,
    tiny_settings,
    walk_of,
)

NAMES = (SLIDING_ATTENTION, GATED_DELTA_NET, KIMI_DELTA_ATTENTION)
LAYER = 1
each_mixer = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
NOTHING = "nothing brought it nearer, so it stays as it was"

Seen = tuple[TeacherWalk, Callable[..., Material]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A walk, and what the mixers of the layer without a window learn from."""
    folder = tmp_path_factory.mktemp("fit")
    walk = walk_of(lively_supernet(folder), random_windows(count=30))
    observed = list(observe_all(walk, folder / "work", LAYER + 1))[LAYER]
    return walk, lambda **changes: Material(LAYER, observed, walk.windows, tiny_settings(**changes))


def fitted(
    mixer: Mixer,
    material: Material,
    dtype: torch.dtype = torch.float32,
    told: Callable[[int, float], None] = lambda step, error: None,
) -> Fitted:
    dtypes = {name: dtype for name, _ in mixer.named_parameters()}
    return fit_mixer(mixer, material, dtypes, told)


@torch.no_grad()
def error_of(walk: TeacherWalk, material: Material, name: str, weights: dict[str, Tensor]) -> float:
    """The relative error of a mixer with these weights on the windows that judge, all at once."""
    mixer = mixer_of(walk, LAYER, name)
    mixer.load_state_dict({key: value.float() for key, value in weights.items()}, strict=True)
    x, context, targets = material.observed.batch(slice(0, walk.windows.judging))
    return relative_error(mixer(x, context, None), targets)


def stored(walk: TeacherWalk, name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {key: value.detach().to(dtype) for key, value in mixer_of(walk, LAYER, name).named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@each_mixer
@each_dtype
def test_errors_are_those_of_what_is_stored(seen: Seen, name: str, dtype: torch.dtype):
    walk, make = seen
    result = fitted(mixer_of(walk, LAYER, name), material := make(steps=20), dtype)
    assert {value.dtype for value in result.weights.values()} == {dtype}
    assert result.before == pytest.approx(error_of(walk, material, name, stored(walk, name, dtype)), rel=1e-4)
    assert result.after == pytest.approx(error_of(walk, material, name, result.weights), rel=1e-4)
    # Sliding attention starts with the teacher's own weights, and full attention has no more to give.
    assert result.after < (1 if name == SLIDING_ATTENTION else 0.9) * result.before
    assert result.notes == []


@each_mixer
def test_each_part_is_done_once_and_in_order(seen: Seen, name: str):
    walk, make = seen
    result = fitted(mixer_of(walk, LAYER, name), make())
    has_decay = name != SLIDING_ATTENTION
    assert list(result.parts) == (["decay"] if has_decay else []) + ["steps", "ridge"]
    assert result.after == min(result.before, *result.parts.values())


@pytest.mark.parametrize(
    ("part", "moved"), [("decay", {"dt_bias"}), ("ridge", {"out_proj.weight"}), ("steps", None)]
)
def test_parts_that_are_not_asked_for_are_not_done(
    seen: Seen, part: str, moved: set[str] | None, monkeypatch: pytest.MonkeyPatch
):
    walk, make = seen
    before = stored(walk, GATED_DELTA_NET)
    if part == "decay":  # whatever it brings
        monkeypatch.setattr(fit._Fit, "judge", _always_better(fit._Fit.judge))
    result = fitted(mixer_of(walk, LAYER, GATED_DELTA_NET), make(parts=(part,), steps=4))
    assert list(result.parts) == [part]
    changed = {name for name, value in result.weights.items() if not torch.equal(value, before[name])}
    assert changed == (set(before) if moved is None else moved)


def _always_better(judge: Callable[..., float]) -> Callable[..., float]:
    def judged(self: Any) -> float:
        self.error = math.inf
        return judge(self)

    return judged


def ruin(mixer: Mixer, *_: object) -> bool:
    with torch.no_grad():
        mixer.get_parameter("out_proj.weight").mul_(-3)
    return True


@pytest.mark.parametrize("part", ["decay", "ridge", "steps"])
@each_dtype
def test_a_part_that_hurts_is_not_kept(
    seen: Seen, part: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    walk, make = seen
    function = {"decay": "set_time_scales", "ridge": "fit_output_projection", "steps": "take_steps"}[part]
    monkeypatch.setattr(fit, function, ruin)
    result = fitted(mixer_of(walk, LAYER, GATED_DELTA_NET), make(parts=(part,)), dtype)
    assert same(result.weights, stored(walk, GATED_DELTA_NET, dtype))
    assert result.after == result.before
    assert result.notes[-1] == NOTHING
    assert part == "steps" or result.parts[part] > result.before


def test_what_follows_starts_from_the_best(seen: Seen, monkeypatch: pytest.MonkeyPatch):
    walk, make = seen
    plain = fitted(mixer_of(walk, LAYER, GATED_DELTA_NET), make(parts=("steps", "ridge")))
    monkeypatch.setattr(fit, "set_time_scales", ruin)
    ruined = fitted(mixer_of(walk, LAYER, GATED_DELTA_NET), make())
    assert ruined.parts["decay"] > ruined.before
    assert same(plain.weights, ruined.weights)
    assert plain.after == ruined.after


@each_dtype
def test_rounding_cannot_make_a_mixer_worse(seen: Seen, dtype: torch.dtype):
    """Steps so small that bfloat16 does not show them, or shows them as a step back."""
    walk, make = seen
    for rate in (1e-7, 1e-5, 1e-4):
        material = make(learning_rate=rate, parts=("steps",))
        result = fitted(mixer_of(walk, LAYER, GATED_DELTA_NET), material, dtype)
        before = error_of(walk, material, GATED_DELTA_NET, stored(walk, GATED_DELTA_NET, dtype))
        assert error_of(walk, material, GATED_DELTA_NET, result.weights) <= before * (1 + 1e-6)
        assert result.after <= result.before


def test_steps_too_large_end_early_and_leave_what_was_best(seen: Seen):
    walk, make = seen
    material = make(learning_rate=10.0, parts=("steps",), steps=40)
    told: list[int] = []
    result = fitted(mixer_of(walk, LAYER, GATED_DELTA_NET), material, told=lambda step, _: told.append(step))
    assert told[-1] < 40
    assert result.notes[0].startswith("its steps ended early: ")
    assert result.notes[0].endswith("; a smaller learning_rate may help")
    assert result.after <= result.before


def test_a_mixer_that_is_near_enough_is_left_alone(seen: Seen):
    """Full attention itself."""
    walk, make = seen
    told: list[int] = []
    mixer = mixer_of(walk, LAYER, FULL_ATTENTION)
    result = fitted(mixer, make(), torch.bfloat16, lambda step, _: told.append(step))
    assert result.before < 5e-3
    assert result.after == result.before
    assert (result.notes, result.parts, told) == (["it was near enough"], {}, [])
    assert same(result.weights, stored(walk, FULL_ATTENTION, torch.bfloat16))


def poison(mixer: Mixer, *_: object) -> bool:
    with torch.no_grad():
        mixer.get_parameter("out_proj.weight")[0, 0] = float("nan")
    return True


@pytest.mark.parametrize("part", ["decay", "ridge"])
def test_a_part_that_gives_no_numbers_is_survived(seen: Seen, part: str, monkeypatch: pytest.MonkeyPatch):
    walk, make = seen
    monkeypatch.setattr(fit, {"decay": "set_time_scales", "ridge": "fit_output_projection"}[part], poison)
    result = fitted(mixer_of(walk, LAYER, GATED_DELTA_NET), make(steps=20))
    assert math.isnan(result.parts[part])
    assert result.after < result.before
    assert all(value.isfinite().all() for value in result.weights.values())
    assert result.row(1, GATED_DELTA_NET)["parts"][part] is None


def too_large(walk: TeacherWalk) -> Mixer:
    """A mixer whose weights are numbers and whose outputs are none."""
    mixer = mixer_of(walk, LAYER, GATED_DELTA_NET)
    mixer.get_parameter("out_proj.weight").data.mul_(1e39).clamp_(-3e38, 3e38)
    return mixer


def test_a_mixer_without_an_error_stays_if_nothing_mends_it(seen: Seen):
    walk, make = seen
    result = fitted(too_large(walk), make(parts=("steps",)))
    assert same(result.weights, {key: value.detach() for key, value in too_large(walk).named_parameters()})
    assert not math.isfinite(result.before)
    assert not math.isfinite(result.after)
    assert result.notes[0].startswith("its steps ended early: step 1 gave an error or a gradient that is not")
    assert result.notes[1] == NOTHING
    row = result.row(0, GATED_DELTA_NET)
    assert (row["before"], row["after"]) == (None, None)
    json.dumps(row, allow_nan=False)


def test_a_mixer_without_an_error_takes_whatever_mends_it(seen: Seen, monkeypatch: pytest.MonkeyPatch):
    walk, make = seen

    def mend(mixer: Mixer, *_: object) -> bool:
        mixer.get_parameter("out_proj.weight").data.fill_(1e-3)
        return True

    monkeypatch.setattr(fit, "set_time_scales", mend)
    result = fitted(too_large(walk), make())
    assert not math.isfinite(result.before)
    assert result.after <= result.parts["decay"] < 100
    assert result.notes == []


def test_judging_windows_are_never_learned_from(seen: Seen, monkeypatch: pytest.MonkeyPatch):
    """Other targets in them change what is judged, and nothing that is learned."""
    walk, make = seen
    observed = make().observed
    other = observed.targets_NTD.clone()
    other[: walk.windows.judging] = 0.1 * torch.randn(other[:3].shape, generator=torch.Generator())
    changed = type(observed)(**{**vars(observed), "targets_NTD": other})
    learned: list[list[Tensor]] = []
    take_steps, fit_projection = fit.take_steps, fit.fit_output_projection

    def spy(mixer: Mixer, *arguments: Any) -> Any:
        function = take_steps if len(arguments) == 5 else fit_projection
        result = function(mixer, *arguments)
        learned[-1] += [parameter.detach().clone() for parameter in mixer.parameters()]
        return result

    monkeypatch.setattr(fit, "take_steps", spy)
    monkeypatch.setattr(fit, "fit_output_projection", spy)
    monkeypatch.setattr(fit._Fit, "take_best", lambda self: None)
    results = []
    for given in (observed, changed):
        learned.append([])
        material = Material(LAYER, given, walk.windows, tiny_settings(learning_rate=1e-4))
        results.append(fitted(mixer_of(walk, LAYER, GATED_DELTA_NET), material))
    assert results[0].before != results[1].before
    assert len(learned[0]) == len(learned[1]) > 0
    assert all(map(torch.equal, *learned))


def test_material_is_cut_as_asked(seen: Seen):
    walk, make = seen
    material, judging = make(), walk.windows.judging

    def targets(batches: Any) -> Tensor:
        return torch.cat([batch[2] for batch in batches])

    observed = material.observed.targets_NTD
    assert torch.equal(targets(material.judging()), observed[:judging])
    assert torch.equal(targets(material.learning(2 * LENGTH + 1)), observed[judging : judging + 3])
    assert torch.equal(targets(material.learning(10**9)), observed[judging:])
    drawn: Batch = material.step(5)
    places = walk.windows.draw(material.settings, LAYER, 5)
    assert torch.equal(drawn[2], observed[torch.from_numpy(places)])


def test_the_teacher_s_pass_is_left_as_it_was(seen: Seen):
    walk, make = seen
    observed = make().observed
    before = [observed.hidden_NTD.clone(), observed.targets_NTD.clone(), observed.scales_H.clone()]
    norm = [parameter.clone() for parameter in observed.norm.parameters()]
    fitted(mixer_of(walk, LAYER, KIMI_DELTA_ATTENTION), make())
    assert all(map(torch.equal, before, (observed.hidden_NTD, observed.targets_NTD, observed.scales_H)))
    assert all(map(torch.equal, norm, observed.norm.parameters()))


def test_the_same_material_gives_the_same_bits(seen: Seen):
    walk, make = seen
    one, other = (fitted(mixer_of(walk, LAYER, KIMI_DELTA_ATTENTION), make()) for _ in range(2))
    assert same(one.weights, other.weights)
    assert not same(one.weights, fitted(mixer_of(walk, LAYER, KIMI_DELTA_ATTENTION), make(seed=4)).weights)


def test_rows_have_six_digits():
    result = Fitted({}, 0.123456789, 1 / 3, {"steps": 1e-7 / 3, "ridge": math.nan}, ["a note"])
    assert result.row(2, GATED_DELTA_NET) == {
        "layer": 2,
        "mixer": "gated_delta_net",
        "before": 0.123457,
        "after": 0.333333,
        "parts": {"steps": 3.33333e-08, "ridge": None},
        "notes": ["a note"],
    }
    assert [round_error(error) for error in (math.inf, -math.inf, math.nan, 0.0)] == [None, None, None, 0.0]
