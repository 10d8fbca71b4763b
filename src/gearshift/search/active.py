"""Active search: propose placements, evaluate them, fit again, until the frontier stops moving.

Half of each round's placements lie on the frontier that the fit predicts, where it matters to be right; most
others lie on frontiers of draws from the fit's posterior (Thompson sampling), where it may be wrong; the rest
is random, so that no part of the space stays unseen. What is proposed depends on the seed and on the rows
before, so that an interrupted search goes on as if it had never stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.errors import GearshiftError
from gearshift.files import append_json_line, read_json_lines
from gearshift.placement import Placement, PlacementSpace
from gearshift.progress import Report, show_progress
from gearshift.search.constraints import NO_CONSTRAINTS, Constraints
from gearshift.search.optimize import ParetoPoint, pareto_placements
from gearshift.search.space import AdditiveScore, Array
from gearshift.search.surrogate import Surrogate, fit_surrogate, least_rows
from gearshift.search.table import build_table

Row = Mapping[str, Any]
# Evaluation rows of placements, in their order.
Evaluate = Callable[[Sequence[Placement]], Sequence[Row]]

# Shares of a round: on the predicted frontier, on frontiers of posterior draws; the rest is random.
_ON_FRONTIER, _THOMPSON = 0.5, 0.375
# Draws of a random placement that may be known already before the round goes without it.
_TRIES = 50


class ActiveSearchError(GearshiftError, ValueError):
    """A search cannot start or go on."""


@dataclass(frozen=True)
class Plan:
    """How to search.

    Attributes:
        target: what to predict, see `gearshift.search.Target`.
        evaluations: the most rows, those that are given at the start among them.
        batch: placements of a round.
        tolerance: the frontier stands still when a new fit finds one that is better by less than this share
            of the range of predicted values.
        patience: rounds in succession in which it must stand still.
        seed: of all draws.
        order: the most layers that interact; None lets the evidence choose.
        interaction_range: how far apart they may be; None lets the evidence choose.
    """

    target: str = "-sqrt(kl)"
    evaluations: int = 200
    batch: int = 16
    tolerance: float = 0.005
    patience: int = 2
    seed: int = 0
    order: int | None = None
    interaction_range: int | None = None


@dataclass(frozen=True)
class Round:
    """One round of a search.

    Attributes:
        number: from 0.
        proposed: placements by what proposed them: ``given``, ``uniform``, ``frontier``, ``thompson``,
            ``random``.
        moved: by how much the frontier had moved since the round before, as a share of the range of values;
            None where there was no frontier to compare with.
        spearman: the fit's cross-validated rank correlation, on which the proposals were based; None before
            any fit.
    """

    number: int
    proposed: dict[str, tuple[str, ...]]
    moved: float | None = None
    spearman: float | None = None

    @property
    def placements(self) -> list[Placement]:
        """All that was proposed."""
        return [Placement.parse(text) for texts in self.proposed.values() for text in texts]


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        rows: the evaluation rows, in the order of their proposals.
        rounds: the rounds.
        surrogate: fitted to all rows.
        why_ended: a sentence.
    """

    rows: tuple[Row, ...]
    rounds: tuple[Round, ...]
    surrogate: Surrogate
    why_ended: str


def search_actively(
    space: PlacementSpace,
    layer_costs: Array,
    evaluate: Evaluate,
    plan: Plan,
    *,
    given: Sequence[Row] = (),
    constraints: Constraints = NO_CONSTRAINTS,
    log: Path | None = None,
    progress: bool = True,
) -> Searched:
    """Search until the frontier stands still, every placement is known or the evaluations are spent.

    Args:
        space: the placements.
        layer_costs: (num_layers, mixers), of which the frontier is a function.
        evaluate: gives evaluation rows; it is called once a round, and may remember what it was asked before.
        plan: how.
        given: rows that are there already.
        constraints: what the proposed frontiers must keep to.
        log: JSON lines of rounds; one that exists is gone on with.
        progress: show how far it is.

    Raises:
        ActiveSearchError: the log is of another search, or the evaluations are too few to fit anything.
        GearshiftError: whatever evaluating or fitting raises; the rounds before are in the log.
    """
    least = least_rows(space)
    if plan.evaluations < least or plan.batch < 1:
        raise ActiveSearchError(
            f"{plan.evaluations} evaluations, {plan.batch} a round; expected at least {least} for this "
            "space, and rounds of at least 1"
        )
    search = _Search(space, layer_costs, plan, constraints, _Log(log, plan))
    with show_progress("search", plan.evaluations, enabled=progress) as report:
        return search.run(evaluate, given, report)


class _Log:
    """Rounds on the disk, after a first line that says which search they are of."""

    def __init__(self, path: Path | None, plan: Plan) -> None:
        self.path = path
        self.rounds: list[Round] = []
        rows = read_json_lines(path) if path is not None and path.exists() else []
        if rows and rows[0] != asdict(plan):
            raise ActiveSearchError(
                f"{path} is the log of a search with {rows[0]}; expected {asdict(plan)}: search into another "
                "folder, or with these settings"
            )
        try:
            self.rounds = [_round_of(row) for row in rows[1:]]
        except TypeError as error:
            raise ActiveSearchError(f"{path} is no log of a search ({error}); remove it") from None
        if path is not None and not rows:
            append_json_line(path, asdict(plan))

    def add(self, new: Round) -> None:
        self.rounds.append(new)
        if self.path is not None:
            append_json_line(self.path, asdict(new))


def _round_of(row: Mapping[str, Any]) -> Round:
    return Round(**{**row, "proposed": {kind: tuple(texts) for kind, texts in row["proposed"].items()}})


class _Search:
    def __init__(
        self, space: PlacementSpace, layer_costs: Array, plan: Plan, constraints: Constraints, log: _Log
    ) -> None:
        self.space, self.layer_costs, self.plan, self.constraints = space, layer_costs, plan, constraints
        self.log = log
        self.rows: dict[Placement, Row] = {}
        self.last: list[Placement] = []
        self.still = 0

    def run(self, evaluate: Evaluate, given: Sequence[Row], report: Report) -> Searched:
        """Go through the rounds of the log, then through new ones."""
        known = {Placement.of(row["placement"]): row for row in given}
        number, why = 0, None
        while why is None:
            logged = self.log.rounds[number] if number < len(self.log.rounds) else None
            new = self._first(list(known)) if number == 0 and logged is None else logged
            if number:
                new, why = self._next(number, logged)
            if new is not None:
                if logged is None:
                    self.log.add(new)
                self._evaluate(new.placements, evaluate, known)
                report(min(len(self.rows), self.plan.evaluations), _note(new))
            number += 1
        return Searched(tuple(self.rows.values()), tuple(self.log.rounds), self._fit(), why)

    def _evaluate(
        self, placements: Sequence[Placement], evaluate: Evaluate, known: Mapping[Placement, Row]
    ) -> None:
        """Add rows; those that were given are not asked for again."""
        wanted = [placement for placement in placements if placement not in known]
        found = dict(zip(wanted, evaluate(wanted) if wanted else (), strict=True))
        self.rows |= {placement: found.get(placement) or known[placement] for placement in placements}

    def _first(self, given: Sequence[Placement]) -> Round:
        """Each mixer everywhere, and random placements until something can be fitted."""
        uniform = [p for mixer in self.space.mixers if (p := self.space.mostly(mixer)) not in given]
        uniform = list(dict.fromkeys(uniform))
        there = {*given, *uniform}
        wanted = max(least_rows(self.space), self.plan.batch) - len(there)
        drawn = self._random(0, wanted, there)
        return Round(0, _texts({"given": given, "uniform": uniform, "random": drawn}))

    def _next(self, number: int, logged: Round | None) -> tuple[Round | None, str | None]:
        """The next round, if there is one, or why there is none."""
        surrogate = self._fit()
        frontier = pareto_placements(surrogate.score, self.layer_costs, self.constraints)
        moved = self._moved(surrogate.score, frontier)
        self.still = self.still + 1 if moved is not None and moved < self.plan.tolerance else 0
        self.last = [point.placement for point in frontier]
        if self.still >= self.plan.patience:
            return None, f"the frontier stood still for {self.still} rounds"
        room = self.plan.evaluations - len(self.rows)
        if room <= 0:
            return None, f"all {self.plan.evaluations} evaluations are spent"
        if logged is not None:
            return logged, None
        proposed = self._propose(number, surrogate, self.last, min(self.plan.batch, room))
        if not any(proposed.values()):
            return None, "every placement that could be proposed is evaluated"
        spearman = surrogate.report.cross_validated.spearman
        return Round(number, _texts(proposed), moved, spearman), None

    def _fit(self) -> Surrogate:
        table = build_table(self.rows.values(), self.space, self.plan.target)
        return fit_surrogate(table, self.plan.interaction_range, order=self.plan.order, seed=self.plan.seed)

    def _moved(self, score: AdditiveScore, frontier: Sequence[ParetoPoint]) -> float | None:
        """How much better the new frontier is than the last one by the new fit, over the range of values."""
        if not self.last:
            return None
        costs = AdditiveScore.of_layers(self.space, self.layer_costs)
        new = np.array([[point.cost, point.value] for point in frontier])
        old = np.stack([costs.values(self.last), score.values(self.last)], axis=1)
        span = float(np.ptp(new[:, 1]))
        if span == 0.0:
            return 0.0
        cheapest, dearest = float(new[:, 0].min()), float(max(new[:, 0].max(), old[:, 0].max()))
        low = float(min(new[:, 1].min(), old[:, 1].min()))
        reached, before = (
            frontier_area(points[:, 0], points[:, 1], cheapest, dearest, low) for points in (new, old)
        )
        return (reached - before) / span

    def _propose(
        self, number: int, surrogate: Surrogate, frontier: Sequence[Placement], count: int
    ) -> dict[str, list[Placement]]:
        """New placements of each kind; what one kind cannot fill the next one does."""
        rng = np.random.default_rng([self.plan.seed, number])
        known = set(self.rows)
        exact = _spread([p for p in frontier if p not in known], round(_ON_FRONTIER * count))
        known |= set(exact)
        wanted = round((_ON_FRONTIER + _THOMPSON) * count) - len(exact)
        drawn = list(self._thompson(surrogate, rng, wanted, known))
        known |= set(drawn)
        others = self._random(number, count - len(exact) - len(drawn), known)
        return {"frontier": exact, "thompson": drawn, "random": others}

    def _thompson(
        self, surrogate: Surrogate, rng: np.random.Generator, count: int, known: set[Placement]
    ) -> Iterator[Placement]:
        """From the frontier of each draw one placement that is not known yet."""
        found: set[Placement] = set()
        for _ in range(count):
            score = surrogate.posterior.sample(rng)
            points = pareto_placements(score, self.layer_costs, self.constraints)
            new = [point.placement for point in points if point.placement not in known | found]
            if new:
                chosen = new[int(rng.integers(len(new)))]
                found.add(chosen)
                yield chosen

    def _random(self, number: int, count: int, known: set[Placement]) -> list[Placement]:
        rng = random.Random(f"{self.plan.seed} {number}")
        found: dict[Placement, None] = {}
        for _ in range(_TRIES * max(count, 0)):
            if len(found) == count:
                break
            drawn = self.space.sample_composition(rng)
            if drawn not in known:
                found[drawn] = None
        return list(found)


def _spread(placements: Sequence[Placement], count: int) -> list[Placement]:
    """Some of the placements, evenly spread, the ends among them."""
    chosen = np.linspace(0, len(placements) - 1, min(count, len(placements))).round().astype(int)
    return [placements[index] for index in dict.fromkeys(chosen.tolist())]


def _texts(proposed: Mapping[str, Sequence[Placement]]) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(map(str, placements)) for kind, placements in proposed.items()}


def _note(made: Round) -> str:
    moved = "" if made.moved is None else f", the frontier moved by {made.moved:.2%}"
    fit = "" if made.spearman is None else f", Spearman {made.spearman:.3f}"
    return f"round {made.number}{fit}{moved}"


def frontier_area(costs: Array, values: Array, cheapest: float, dearest: float, low: float) -> float:
    """The mean, over budgets from ``cheapest`` to ``dearest``, of how far the best value lies above ``low``.

    A hypervolume in two dimensions, divided by the width: it grows with every placement that is better than
    all others at its budget. Where no placement is affordable, nothing is counted.

    Args:
        costs: (n,) of placements.
        values: (n,), at least ``low`` where they shall count.
        cheapest: the least budget.
        dearest: the largest one.
        low: the value from which to count.
    """
    if dearest <= cheapest:
        return float(max(values.max() - low, 0.0))
    order = np.argsort(costs, kind="stable")
    best = np.maximum(np.maximum.accumulate(values[order]) - low, 0.0)
    edges = np.clip(np.append(costs[order], dearest), cheapest, dearest)
    return float(best @ np.diff(edges) / (dearest - cheapest))
