from __future__ import annotations

import pytest

from gearshift.train.recipe import AlignStage
from gearshift.train.schedule import learning_rate


def recipe(decay: str, warmup: int = 10) -> AlignStage:
    values = {"stage": "align", "steps": 110, "learning_rate": 2.0}
    return AlignStage.model_validate(values | {"warmup_steps": warmup, "decay": decay})


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_rises_to_the_peak_and_falls_to_a_tenth(decay):
    rates = [learning_rate(recipe(decay), step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in zip(rates[9:], rates[10:], strict=False))


def test_middle_of_both_shapes():
    assert learning_rate(recipe("linear"), 35) == pytest.approx(0.2 + 1.8 * 0.75)
    assert learning_rate(recipe("cosine"), 35) == pytest.approx(0.2 + 1.8 * (1 + 0.5**0.5) / 2)
    assert learning_rate(recipe("linear"), 60) == learning_rate(recipe("cosine"), 60) == pytest.approx(1.1)


def test_without_warm_up_it_starts_near_the_peak():
    assert 1.9 < learning_rate(recipe("cosine", warmup=0), 1) <= 2.0


def test_a_constant_rate_stays_after_the_warm_up():
    assert [learning_rate(recipe("constant"), step) for step in (5, 10, 60, 110)] == [1.0, 2.0, 2.0, 2.0]
