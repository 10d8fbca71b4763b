from __future__ import annotations

from dataclasses import fields, replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.errors import GearshiftError
from gearshift.train.calibrate import PARTS, CalibrationError, CalibrationSettings

positive = st.floats(min_value=1e-9, max_value=1e3)
VALUES = {
    "tokens": st.integers(1, 10**7),
    "sequence_length": st.integers(2, 10**5),
    "steps": st.integers(1, 10**4),
    "batch_size": st.integers(1, 100),
    "learning_rate": st.none() | positive,
    "ridge": positive,
    "seed": st.integers(0, 2**70),
    "parts": st.lists(st.sampled_from(PARTS), min_size=1, unique=True).map(tuple),
}
some_settings = st.builds(CalibrationSettings, **VALUES)


def test_there_is_a_strategy_for_every_setting():
    assert set(VALUES) == {field.name for field in fields(CalibrationSettings)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens": 0}, "tokens is 0; expected a whole number of at least 1"),
        ({"tokens": 1e5}, "tokens is 100000.0; expected a whole number"),
        ({"sequence_length": 1}, "sequence_length is 1; expected a whole number of at least 2"),
        ({"steps": 0}, "steps is 0; expected a whole number of at least 1"),
        ({"steps": "many"}, "steps is 'many'; expected a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"seed": -1}, "seed is -1; expected a whole number of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"ridge": 0}, "ridge is 0; expected a positive number"),
        ({"ridge": -1e-3}, "ridge is -0.001"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"ridge": None}, "ridge is None; expected a positive number"),
        ({"parts": ()}, "parts are none; expected some of decay, steps, ridge, each once"),
        ({"parts": ("",)}, "parts are none; expected some of"),
        ({"parts": ("decay", "decay")}, "parts are decay, decay; expected some of"),
        ({"parts": ("steps", "magic")}, "parts are steps, magic; expected some of"),
        ({"parts": (1, None)}, "parts are 1, None; expected some of"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], told: str):
    with pytest.raises(CalibrationError) as caught:
        CalibrationSettings(**changes)
    assert str(caught.value).startswith(told)
    assert isinstance(caught.value, GearshiftError)


def test_a_learning_rate_may_be_left_out_and_whole_numbers_are_numbers():
    assert CalibrationSettings().learning_rate is None
    assert CalibrationSettings(learning_rate=1, ridge=2).ridge == 2


@pytest.mark.parametrize("parts", list(permutations(PARTS)))
def test_the_order_of_parts_says_nothing(parts: tuple[str, ...]):
    assert CalibrationSettings(parts=parts) == CalibrationSettings()
    assert CalibrationSettings(parts=parts[:2]).parts == tuple(part for part in PARTS if part in parts[:2])


@given(some_settings)
def test_settings_do_not_differ_from_themselves(settings: CalibrationSettings):
    assert settings.differences(replace(settings)) == []


@given(some_settings, some_settings)
def test_differences_name_what_changed_and_nothing_else(one: CalibrationSettings, other: CalibrationSettings):
    told = one.differences(other)
    changed = {field.name for field in fields(one) if getattr(one, field.name) != getattr(other, field.name)}
    assert {line.partition(":")[0] for line in told} == changed
    for name in changed:
        assert f"{name}: was {getattr(one, name)}, now {getattr(other, name)}" in told
