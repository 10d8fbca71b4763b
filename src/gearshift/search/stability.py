"""Do rankings of placements settle in training? Agreement of checkpoints, and what an early pick costs.

Letters: K checkpoints of one run, n placements that all of them evaluated, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from gearshift.errors import GearshiftError
from gearshift.files import read_json
from gearshift.placement import Placement
from gearshift.search.space import Array
from gearshift.search.table import EvaluationTable

# Which placements a resample takes, and a number that is computed of them.
Rows = NDArray[np.int64]
Statistic = Callable[[Rows], float | None]

FORMAT = "gearshift-stability-1"
RESAMPLES = 1000
# Fewer placements have no ranking worth the name.
LEAST_PLACEMENTS = 5


class StabilityError(GearshiftError, ValueError):
    """Tables whose rankings cannot be compared, or a file that holds no comparison."""


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 90% bootstrap interval over placements; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        interval = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{interval}"


@dataclass(frozen=True)
class CheckpointStability:
    """One checkpoint against the last of its run.

    Attributes:
        step: of training.
        checkpoint: digest.
        spearman: of its values with the last one's, over all placements.
        frontier_spearman: the same over the last one's frontier alone.
        mean_regret: quality lost by taking, at each budget of the last frontier, what this checkpoint takes
            for best: in the target's unit, a mean over budgets.
        worst_regret: the largest of these losses.
    """

    step: int
    checkpoint: str
    spearman: Estimate
    frontier_spearman: Estimate
    mean_regret: Estimate
    worst_regret: Estimate


@dataclass(frozen=True)
class RunStability:
    """One training run.

    Attributes:
        seed: of the run.
        checkpoints: by rising step.
        kendall_w: agreement of all checkpoints over all placements: 0 for none, 1 for one ranking.
        frontier_kendall_w: the same over the last one's frontier alone.
        placements: evaluated at every checkpoint.
        frontier: those that no other beats in both value and cost at the last one; empty without costs.
    """

    seed: int
    checkpoints: tuple[CheckpointStability, ...]
    kendall_w: Estimate
    frontier_kendall_w: Estimate
    placements: int
    frontier: tuple[Placement, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "frontier": [str(placement) for placement in self.frontier]}


def spearman(one: Array, other: Array) -> float | None:
    """Rank correlation of values (n,), ties sharing their mean rank; None if either is constant."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def kendall_w(values: Array) -> float | None:
    """Kendall's coefficient of concordance of K rankings of n things, corrected for ties; None if undefined.

    W = 12 S / (K^2 (n^3 - n) - K T), with S the squared deviations of the rank sums from their mean and T the
    sum of t^3 - t over all groups of t tied values (Kendall and Babington Smith 1939).

    Args:
        values: (K, n).
    """
    judges, things = values.shape
    if judges < 2 or things < 2:
        return None
    ranks = np.stack([rankdata(row) for row in values])
    sums = ranks.sum(axis=0)
    groups = [np.unique(row, return_counts=True)[1] for row in ranks]
    tied = sum(int((counts.astype(np.int64) ** 3 - counts).sum()) for counts in groups)
    scale = judges**2 * (things**3 - things) - judges * tied
    return float(12 * ((sums - sums.mean()) ** 2).sum() / scale) if scale else None


def frontier_of(values: Array, costs: Array) -> list[int]:
    """Indices of the things that no other beats in both value (higher) and cost (lower), by rising cost."""
    best, kept = -np.inf, []
    for index in np.lexsort((-values, costs)).tolist():
        if values[index] > best:
            best = values[index]
            kept.append(index)
    return kept


def regrets(early: Array, final: Array, costs: Array) -> Array:
    """What picks by ``early`` values lose in ``final`` ones: one number for each of the final frontier."""
    lost = []
    for index in frontier_of(final, costs):
        within = np.flatnonzero(costs <= costs[index])
        lost.append(final[index] - final[within[np.argmax(early[within])]])
    return np.array(lost)


def measure_stability(
    tables: Mapping[tuple[int, int], EvaluationTable],
    cost: Callable[[Placement], float] | None = None,
    resampling_seed: int = 0,
) -> list[RunStability]:
    """Compare the checkpoints of each run with one another.

    Args:
        tables: by (seed of the run, step).
        cost: seconds of a placement; None leaves frontiers out.
        resampling_seed: of the bootstrap.

    Raises:
        StabilityError: a run has a single checkpoint, or its checkpoints share too few placements, or were
            evaluated on different data.
    """
    runs: dict[int, dict[int, EvaluationTable]] = {}
    for (seed, step), table in sorted(tables.items(), key=lambda item: item[0]):
        runs.setdefault(seed, {})[step] = table
    return [_measure_run(seed, run, cost, resampling_seed) for seed, run in runs.items()]


def _measure_run(
    seed: int,
    tables: Mapping[int, EvaluationTable],
    cost: Callable[[Placement], float] | None,
    resampling_seed: int,
) -> RunStability:
    placements, values = _common_values(seed, tables)
    costs = None if cost is None else np.array([cost(placement) for placement in placements])
    front = [] if costs is None else frontier_of(values[-1], costs)
    resamples = _resamples(len(placements), resampling_seed)
    on_front = _resamples(len(front), resampling_seed)

    def over_all(statistic: Statistic) -> Estimate:
        return _estimate(statistic, np.arange(len(placements)), resamples)

    def over_front(statistic: Statistic) -> Estimate:
        return _estimate(lambda rows: statistic(np.array(front)[rows]), np.arange(len(front)), on_front)

    def one(number: int, step: int, digest: str) -> CheckpointStability:
        mine, last = values[number], values[-1]
        lost = [_regret(mine, last, costs, how) for how in (np.mean, np.max)]
        return CheckpointStability(
            step,
            digest,
            over_all(lambda rows: spearman(mine[rows], last[rows])),
            over_front(lambda rows: spearman(mine[rows], last[rows])) if front else Estimate(None),
            *(over_all(statistic) if costs is not None else Estimate(None) for statistic in lost),
        )

    return RunStability(
        seed,
        tuple(one(number, step, table.checkpoint) for number, (step, table) in enumerate(tables.items())),
        over_all(lambda rows: kendall_w(values[:, rows])),
        over_front(lambda rows: kendall_w(values[:, rows])) if front else Estimate(None),
        len(placements),
        tuple(placements[index] for index in front),
    )


def _regret(early: Array, final: Array, costs: Array | None, how: Callable[[Array], Any]) -> Statistic:
    def statistic(rows: Rows) -> float | None:
        assert costs is not None
        return float(how(regrets(early[rows], final[rows], costs[rows])))

    return statistic


def _common_values(seed: int, tables: Mapping[int, EvaluationTable]) -> tuple[list[Placement], Array]:
    """Placements that every checkpoint evaluated, and their values (K, n)."""
    if len(tables) < 2:
        raise StabilityError(f"the run with seed {seed} has {len(tables)} checkpoint; expected two or more")
    data = {table.data for table in tables.values()}
    if len(data) > 1:
        raise StabilityError(
            f"the checkpoints of seed {seed} were evaluated on {', '.join(sorted(data))}; expected one"
        )
    by_step = [dict(zip(table.placements, table.values.tolist(), strict=True)) for table in tables.values()]
    common = [placement for placement in by_step[0] if all(placement in values for values in by_step)]
    if len(common) < LEAST_PLACEMENTS:
        raise StabilityError(
            f"{len(common)} placements were evaluated at every checkpoint of seed {seed}; expected at least "
            f"{LEAST_PLACEMENTS}: evaluate the same ones at each, such as with the same --random and --seed"
        )
    return common, np.array([[values[placement] for placement in common] for values in by_step])


def _resamples(size: int, seed: int) -> Rows:
    """(R, size) indices drawn with replacement."""
    return np.random.default_rng(seed).integers(max(size, 1), size=(RESAMPLES, size))


def _estimate(statistic: Statistic, everything: Rows, resamples: Rows) -> Estimate:
    """The statistic with its percentile interval; resamples in which it is undefined are left out."""
    value = statistic(everything)
    found = [again for rows in resamples if (again := statistic(rows)) is not None]
    if value is None or not found:
        return Estimate(value)
    low, high = np.quantile(found, [0.05, 0.95])
    return Estimate(value, float(low), float(high))


def stability_to_json(
    runs: Sequence[RunStability], target: str, workload: str | None, provenance: Mapping[str, str]
) -> dict[str, Any]:
    """What `gearshift stability` writes."""
    return {
        "format": FORMAT,
        "target": target,
        "workload": workload,
        "runs": [run.to_json() for run in runs],
        "provenance": dict(provenance),
    }


def read_stability(path: Path) -> dict[str, Any]:
    """Read the JSON form, for whoever shows it.

    Raises:
        StabilityError: the file holds something else.
        FileFormatError: it is not JSON.
    """
    content = read_json(path)
    known = isinstance(content, dict) and content.get("format") == FORMAT
    if not known or not isinstance(content.get("runs"), list):
        raise StabilityError(f'{path} holds no stability; expected a JSON object with "format": {FORMAT!r}')
    return content
