"""Targets: text form, order-preserving values, inverse and retention."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.search.target import Target, TargetError

TEXTS = [
    "quality",
    "-loss",
    "log(quality)",
    "-sqrt(kl)",
    "-log(loss)",
    "sqrt(retention)",
    "-kl",
    "recall.copy",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trip(text):
    assert str(Target.parse(text)) == text
    assert Target.parse(f" {text} ") == Target.parse(text)


@pytest.mark.parametrize("text", ["", "-", "exp(loss)", "log(quality", "a b-c", "--loss", "log()", "+loss"])
def test_malformed_targets_are_refused(text):
    with pytest.raises(TargetError, match="expected a column such as 'quality'"):
        Target.parse(text)


@given(st.sampled_from(TEXTS), st.floats(0.01, 10), st.floats(0.01, 10))
def test_values_follow_the_sign_and_are_undone(text, first, second):
    target = Target.parse(text)
    rises = target.of_column(first) <= target.of_column(second)
    assert rises == (first <= second if target.sign > 0 else first >= second)
    assert target.to_column(target.of_column(first)) == pytest.approx(first)


def test_a_predicted_root_below_zero_counts_as_zero():
    assert Target.parse("-sqrt(kl)").to_column(0.3) == 0.0


def test_a_dot_looks_inside_a_column():
    row = {"recall": {"copy": 0.5}, "loss": 2.0}
    assert Target.parse("recall.copy").of_row(row) == 0.5
    with pytest.raises(TargetError, match="no column 'recall.needle'"):
        Target.parse("recall.needle").of_row(row)
    with pytest.raises(TargetError, match="no column 'loss.copy'"):
        Target.parse("loss.copy").of_row(row)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "2", True, [1.0]])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(TargetError, match="loss = .*; expected a finite number"):
        Target.parse("-loss").of_row({"loss": value})


def test_a_number_that_has_no_logarithm_is_refused():
    with pytest.raises(TargetError, match=r"kl = 0.0 has no log; choose another target"):
        Target.parse("-log(kl)").of_row({"kl": 0.0})


def test_retention():
    loss, teacher_loss = 2.0, 1.5
    expected = math.exp(-2.0) / math.exp(-1.5)
    assert Target.parse("-loss").retention(-loss, -teacher_loss) == pytest.approx(expected)
    assert Target.parse("quality").retention(math.exp(-2.0), math.exp(-1.5)) == pytest.approx(expected)
    assert Target.parse("log(quality)").retention(-2.0, -1.5) == pytest.approx(expected)
    assert Target.parse("-kl").retention(-0.5, 0.0) == pytest.approx(expected)
    assert Target.parse("-sqrt(kl)").retention(-math.sqrt(0.5), 0.0) == pytest.approx(expected)
    assert Target.parse("-kl").retention(0.01, 0.0) == 1.0
    assert Target.parse("-perplexity").retention(-20.0, -10.0) == pytest.approx(0.5)
    assert math.isnan(Target.parse("recall.copy").retention(0.5, 0.0))


@given(st.sampled_from(TEXTS), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_the_value_at_a_retention_has_it(text, retention, teachers):
    target = Target.parse(text)
    teacher_value = target.of_column(0.0 if target.column == "kl" and target.function != "log" else teachers)
    value = target.value_at(retention, teacher_value)
    assert target.retention(value, teacher_value) == pytest.approx(retention)
