"""Curves on a real supernet: what surrogates know, and what searches find, after so many evaluations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.errors import GearshiftError
from gearshift.files import append_json_line, read_json_lines
from gearshift.placement import Placement, PlacementSpace
from gearshift.search.active import Plan, frontier_area, search_actively
from gearshift.search.optimize import pareto_placements
from gearshift.search.report import Scores
from gearshift.search.space import AdditiveScore, Array, mixer_indices
from gearshift.search.surrogate import fit_surrogate
from gearshift.search.table import build_table
from gearshift.search.target import Target

Row = dict[str, Any]

KEPT = ("checkpoint", "data", "placement", "loss", "kl", "quality", "retention")
# How the table's placements are evaluated.
TOKENS, SEQUENCE_TOKENS, BATCH = 2048, 512, 4

TARGETS = ("-sqrt(kl)", "-kl")
HELD_OUT, FITTED = 100, (25, 50, 100, 200, 400)
SPLITS = 5
ORDERS: dict[str, tuple[int | None, int | None]] = {
    "order 1": (1, None),
    "order 2": (2, 3),
    "order 3": (3, 3),
    "chosen by evidence": (None, None),
}
SEARCHED, SEARCHES, GREEDY = 112, 2, 150
AT = (25, 50, 75, 100, 112, 150, 200, 300, 400, 499)
# Seconds that a layer adds to a decode step of 8 sequences of 2,048 tokens, measured by `gearshift demo`.
LAYER_SECONDS = {
    "full_attention": 0.004134579697482816,
    "sliding_attention": 0.0,
    "gated_delta_net": 0.0003976043410965067,
    "kimi_delta_attention": 0.0005213222436228474,
}


class MissingRowsError(GearshiftError):
    """The table lacks placements, and there is no supernet to evaluate them with."""


class Evaluations:
    """Evaluated placements from a table; what it lacks is evaluated and added.

    Args:
        table: JSON lines with the columns `KEPT`; ``drawn`` marks the random placements.
        supernet: a supernet directory, or None.
        data: held-out text.
    """

    def __init__(self, table: Path, supernet: Path | None, data: Path | None) -> None:
        self.table, self.supernet, self.data = table, supernet, data
        rows = read_json_lines(table)
        self.rows = {Placement.parse(row["placement"]): row for row in rows}
        self.drawn = [placement for placement, row in self.rows.items() if row.get("drawn")]
        used = {mixer for placement in self.rows for mixer in placement}
        self.space = PlacementSpace(len(next(iter(self.rows))), tuple(used))

    def __call__(self, placements: Sequence[Placement]) -> list[Row]:
        """The rows of placements.

        Raises:
            MissingRowsError: one is not in the table, and no supernet is given.
        """
        missing = [placement for placement in placements if placement not in self.rows]
        if missing:
            self._add(missing)
        return [self.rows[placement] for placement in placements]

    def _add(self, placements: Sequence[Placement]) -> None:
        if self.supernet is None or self.data is None:
            raise MissingRowsError(
                f"{self.table} lacks {len(placements)} placements such as {placements[0]}; "
                "give --supernet and --data to evaluate them"
            )
        from gearshift.evaluate.quality import evaluate_placements

        found = evaluate_placements(
            self.supernet,
            placements,
            self.data,
            None,
            self.table.with_suffix(".evaluated.jsonl"),
            tokens=TOKENS,
            sequence_length=SEQUENCE_TOKENS,
            batch_size=BATCH,
            progress=False,
        )
        for placement, row in zip(placements, found, strict=True):
            kept = {key: row[key] for key in KEPT}
            append_json_line(self.table, kept)
            self.rows[placement] = kept


def held_out_rows(evaluations: Evaluations) -> Iterator[Row]:
    """Scores on placements that a surrogate has not seen, by number of evaluations."""
    for target in TARGETS:
        yield per_layer_row(evaluations, target)
        for name, order in ORDERS.items():
            yield held_out_row(evaluations, target, name, *order)


def held_out_row(
    evaluations: Evaluations, target: str, name: str, order: int | None, reach: int | None
) -> Row:
    """Scores of one kind of surrogate on placements it has not seen, over several splits."""
    curve = {}
    for count in FITTED:
        scores = [_split_scores(evaluations, target, order, reach, count, seed) for seed in range(SPLITS)]
        curve[count] = {
            key: float(np.mean([getattr(score, key) for score in scores]))
            for key in ("r2", "spearman", "coverage")
        }
    return {
        "metric": f"held_out, {target}, {name}",
        "value": curve[FITTED[-1]]["r2"],
        "by_evaluations": curve,
    }


def _split_scores(
    evaluations: Evaluations, target: str, order: int | None, reach: int | None, count: int, seed: int
) -> Scores:
    drawn = random.Random(seed).sample(evaluations.drawn, len(evaluations.drawn))
    teacher = evaluations.space.teacher()
    fitted = list(dict.fromkeys([teacher, *drawn[HELD_OUT : HELD_OUT + count - 1]]))
    held_out = [placement for placement in drawn[:HELD_OUT] if placement != teacher]
    tables = [build_table(evaluations(some), evaluations.space, target) for some in (fitted, held_out)]
    return fit_surrogate(tables[0], reach, order=order).assess(tables[1])


def single_changes(space: PlacementSpace) -> list[Placement]:
    """All-FA with one layer changed, each layer to each other mixer."""
    teacher = space.teacher()
    return [
        _changed(teacher, layer, mixer)
        for layer, mixers in enumerate(space.layers)
        for mixer in mixers
        if mixer != teacher[layer]
    ]


def _changed(placement: Placement, layer: int, mixer: str) -> Placement:
    return Placement((*placement.mixers[:layer], mixer, *placement.mixers[layer + 1 :]))


def per_layer_score(evaluations: Evaluations, target: str) -> AdditiveScore:
    """What single changes lose, added up: the score that needs no fit."""
    space, read = evaluations.space, Target.parse(target)
    (teacher,) = evaluations([space.teacher()])
    changes = single_changes(space)
    rows = evaluations(changes)
    harm = np.zeros((space.num_layers, len(space.mixers)))
    base = read.of_row(teacher)
    reference = mixer_indices(space, [space.teacher()])[0]
    for indices, row in zip(mixer_indices(space, changes), rows, strict=True):
        (layer,) = np.flatnonzero(indices != reference)
        harm[layer, indices[layer]] = read.of_row(row) - base
    return AdditiveScore.of_layers(space, harm, base)


def per_layer_row(evaluations: Evaluations, target: str) -> Row:
    """How well added-up single changes predict random placements."""
    table = build_table(evaluations(evaluations.drawn), evaluations.space, target)
    predicted = per_layer_score(evaluations, target).values(table.placements)
    scores = Scores.of(table.values, predicted, np.zeros_like(predicted))
    return {
        "metric": f"held_out, {target}, per-layer scores",
        "value": scores.r2,
        "spearman": scores.spearman,
        "evaluations": len(single_changes(evaluations.space)) + 1,
    }


def search_rows(evaluations: Evaluations) -> Iterator[Row]:
    """The area under the frontier found by each search, and how many evaluations active search saves."""
    space = evaluations.space
    seconds = [LAYER_SECONDS[mixer] for mixer in space.mixers]
    layer_costs = np.tile(seconds, (space.num_layers, 1))
    measure = _Area(evaluations, layer_costs)
    uniform = [space.mostly(mixer) for mixer in space.mixers]
    shuffled = [
        list(
            dict.fromkeys([*uniform, *random.Random(seed).sample(evaluations.drawn, len(evaluations.drawn))])
        )
        for seed in range(SPLITS)
    ]
    random_areas = np.mean([measure.curve(order) for order in shuffled], axis=0)
    yield _area_row("random, mean of 5 orders", random_areas)
    for seed in range(SEARCHES):
        plan = Plan(evaluations=SEARCHED, patience=SEARCHED, seed=seed)
        searched = search_actively(space, layer_costs, evaluations, plan, progress=False)
        found = measure.curve([Placement.parse(str(row["placement"])) for row in searched.rows])
        yield _area_row(f"active, seed {seed}", found)
        yield ratio_row(found, random_areas, seed)
    yield _area_row("greedy", measure.curve(greedy_order(evaluations, layer_costs, GREEDY)))
    changes = per_layer_score(evaluations, "-kl")
    frontier = [point.placement for point in pareto_placements(changes, layer_costs)]
    ordered = list(dict.fromkeys([*uniform, *single_changes(space), *frontier]))
    evaluations(ordered)
    yield _area_row("per-layer scores, then their frontier", measure.curve(ordered))


def ratio_row(active: Array, at_random: Array, seed: int) -> Row:
    """Evaluations that active search needs for what random search has in the end, over those of that one."""
    reached = np.flatnonzero(active >= at_random[-1])
    needed = int(reached[0]) + 1 if len(reached) else len(active)
    ratio = needed / len(at_random)
    return {
        "metric": f"active_evaluations_ratio, seed {seed}",
        "value": ratio,
        "bar": 0.5,
        "ratio": ratio / 0.5,
        "passes": bool(len(reached) and ratio <= 0.5),
        "active": needed,
        "random": len(at_random),
    }


def _area_row(name: str, areas: Array) -> Row:
    curve = {count: float(areas[count - 1]) for count in AT if count <= len(areas)}
    return {
        "metric": f"frontier_area, {name}",
        "value": float(areas[min(SEARCHED, len(areas)) - 1]),
        "evaluations": min(SEARCHED, len(areas)),
        "by_evaluations": curve,
    }


class _Area:
    """The mean, over budgets from the cheapest to that of all-FA, of the best retention found so far."""

    def __init__(self, evaluations: Evaluations, layer_costs: Array) -> None:
        self.evaluations = evaluations
        self.costs = AdditiveScore.of_layers(evaluations.space, layer_costs)
        self.cheapest = float(layer_costs.min(axis=1).sum())
        self.dearest = float(self.costs.values([evaluations.space.teacher()])[0])

    def curve(self, placements: Sequence[Placement]) -> Array:
        """After each of the placements."""
        costs = self.costs.values(placements)
        kept = np.exp([-row["kl"] for row in self.evaluations(placements)])
        return np.array(
            [
                frontier_area(costs[:count], kept[:count], self.cheapest, self.dearest, 0.0)
                for count in range(1, len(placements) + 1)
            ]
        )


def greedy_order(evaluations: Evaluations, layer_costs: Array, most: int) -> list[Placement]:
    """What greedy search evaluates: from all-FA on, every cheaper mixer for one layer, then the best of them.

    The best loses the least for what it saves.
    """
    space = evaluations.space
    costs = AdditiveScore.of_layers(space, layer_costs)
    now = space.teacher()
    order = [now]
    while len(order) < most:
        moves = [
            move
            for layer, mixers in enumerate(space.layers)
            for mixer in mixers
            if costs.values([move := _changed(now, layer, mixer)])[0] < costs.values([now])[0]
        ]
        if not moves:
            break
        order += [move for move in moves if move not in order]
        lost = np.array([row["kl"] for row in evaluations(moves)]) - evaluations([now])[0]["kl"]
        saved = costs.values([now])[0] - costs.values(moves)
        now = moves[int(np.argmin(lost / saved))]
    return order[:most]
