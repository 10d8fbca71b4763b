"""Ranking stability against scipy and brute force, and on made-up runs that settle or do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import friedmanchisquare, spearmanr

from gearshift.files import write_json
from gearshift.placement import Placement
from gearshift.search import stability
from gearshift.search.stability import (
    StabilityError,
    frontier_of,
    kendall_w,
    measure_stability,
    read_stability,
    regrets,
    spearman,
    stability_to_json,
)
from gearshift.search.table import EvaluationTable, build_table

values = st.lists(st.integers(0, 6), min_size=3, max_size=9).map(lambda given: np.array(given, float))


@given(values, st.randoms(use_true_random=False))
def test_spearman_is_scipys(one, rng):
    other = np.array(rng.choices(range(5), k=len(one)), float)
    if np.ptp(one) and np.ptp(other):
        assert spearman(one, other) == pytest.approx(spearmanr(one, other)[0])
    else:
        assert spearman(one, other) is None


@given(st.integers(3, 5), st.integers(3, 8), st.integers(2, 20), st.integers(0, 99))
def test_kendalls_w_is_friedmans_statistic(judges, things, levels, seed):
    """W = chi^2 / (K (n - 1)), ties corrected in both."""
    given_values = np.random.default_rng(seed).integers(levels, size=(judges, things)).astype(float)
    if all(np.ptp(row) == 0 for row in given_values):
        assert kendall_w(given_values) is None
        return
    statistic = friedmanchisquare(*given_values.T).statistic
    assert kendall_w(given_values) == pytest.approx(statistic / (judges * (things - 1)))


def test_one_ranking_has_w_1_and_opposite_ones_0():
    ranking = np.arange(6.0)
    assert kendall_w(np.stack([ranking, 2 * ranking])) == pytest.approx(1)
    assert kendall_w(np.stack([ranking, -ranking])) == pytest.approx(0)


@given(st.integers(1, 9), st.integers(0, 99))
def test_frontier_and_regret_are_those_of_brute_force(size, seed):
    rng = np.random.default_rng(seed)
    early, final, costs = rng.integers(5, size=(3, size)).astype(float)
    front = frontier_of(final, costs)
    for index in range(size):
        beaten = [
            final[other] >= final[index]
            and costs[other] <= costs[index]
            and (final[other], costs[other]) != (final[index], costs[index])
            for other in range(size)
        ]
        same = [other for other in front if (final[other], costs[other]) == (final[index], costs[index])]
        assert len(same) == (0 if any(beaten) else 1)
    expected = []
    for budget in sorted({costs[index] for index in front}):
        within = [index for index in range(size) if costs[index] <= budget]
        pick = max(within, key=lambda index: early[index])
        expected.append(max(final[index] for index in within) - final[pick])
    assert regrets(early, final, costs).tolist() == expected


def run_tables(
    made_up, noises: list[float], count: int = 60, seed: int = 0
) -> dict[tuple[int, int], EvaluationTable]:
    """Checkpoints whose values are the truth and noise of their own."""
    placements = made_up.draw(count)
    tables = {}
    for number, noise in enumerate(noises):
        rng = np.random.default_rng([number, seed])
        rows = made_up.evaluate(placements)
        for row in rows:
            row["loss"] += noise * float(rng.normal())
            row["checkpoint"] = f"digest {number}"
        tables[seed, 1000 * (number + 1)] = build_table(rows, made_up.space, "-loss")
    return tables


def ends(estimate: stability.Estimate) -> tuple[float, float, float]:
    """Low end, value and high end, which must be there and in order."""
    assert estimate.value is not None and estimate.low is not None and estimate.high is not None
    assert estimate.low <= estimate.value <= estimate.high
    return estimate.low, estimate.value, estimate.high


def cost(placement: Placement) -> float:
    return sum({"full_attention": 4, "sliding_attention": 2}.get(mixer, 1) for mixer in placement)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(stability, "RESAMPLES", 200)


def test_a_run_that_settles(made_up):
    (run,) = measure_stability(run_tables(made_up, [0.5, 0.05, 0.0]), cost)
    first, middle, last = run.checkpoints
    assert [one.step for one in run.checkpoints] == [1000, 2000, 3000]
    assert first.checkpoint == "digest 0"
    assert last.spearman.value == 1 and last.mean_regret.value == last.worst_regret.value == 0
    (low, early, high), (later_low, later, later_high) = map(ends, (first.spearman, middle.spearman))
    assert early < later < 1
    assert later_high - later_low < high - low
    assert ends(first.worst_regret)[1] >= ends(first.mean_regret)[1] > ends(middle.mean_regret)[1] >= 0
    assert 0 < ends(run.kendall_w)[1] < 1
    table = run_tables(made_up, [0.0])[0, 1000]
    costs = np.array([cost(placement) for placement in table.placements])
    assert set(run.frontier) == {table.placements[index] for index in frontier_of(table.values, costs)}


def test_intervals_cover_the_correlation_of_many_placements(made_up):
    first, last = (table.values for table in run_tables(made_up, [0.15, 0.0], count=2000).values())
    truth, inside = spearman(first, last), []
    assert truth is not None
    for seed in range(12):
        (run,) = measure_stability(run_tables(made_up, [0.15, 0.0], count=40, seed=seed))
        low, _, high = ends(run.checkpoints[0].spearman)
        inside.append(low <= truth <= high)
    assert np.mean(inside) > 0.7


def test_runs_of_several_seeds_are_apart(made_up):
    tables = run_tables(made_up, [0.1, 0.0], seed=1) | run_tables(made_up, [0.2, 0.0], seed=2)
    runs = measure_stability(tables)
    assert [run.seed for run in runs] == [1, 2]
    assert runs[0].frontier == () and runs[0].checkpoints[0].mean_regret.value is None
    again = measure_stability(tables)
    assert again == runs


def test_what_cannot_be_compared_is_refused(made_up):
    tables = run_tables(made_up, [0.1, 0.0])
    with pytest.raises(StabilityError, match="seed 0 has 1 checkpoint"):
        measure_stability({(0, 1): tables[0, 1000]})
    few = build_table(made_up.evaluate(made_up.draw(4)), made_up.space, "-loss")
    with pytest.raises(StabilityError, match="4 placements were evaluated at every checkpoint of seed 0"):
        measure_stability({**tables, (0, 9): few})
    rows = [{**row, "data": "other"} for row in made_up.evaluate(made_up.draw(60))]
    with pytest.raises(StabilityError, match="were evaluated on held-out, other; expected one"):
        measure_stability({**tables, (0, 9): build_table(rows, made_up.space, "-loss")})


def test_the_file_is_read_as_it_was_written(made_up, tmp_path):
    runs = measure_stability(run_tables(made_up, [0.1, 0.0]), cost)
    content = stability_to_json(runs, "-loss", "context 1, batch 1", {"commit": "abc"})
    write_json(tmp_path / "stability.json", content)
    read = read_stability(tmp_path / "stability.json")
    assert read["runs"][0]["checkpoints"][0]["spearman"]["value"] == runs[0].checkpoints[0].spearman.value
    write_json(tmp_path / "other.json", {"runs": []})
    with pytest.raises(StabilityError, match="other.json holds no stability"):
        read_stability(tmp_path / "other.json")
