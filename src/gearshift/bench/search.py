"""The search: seconds, regret and coverage on made-up truths, and curves on a real supernet.

    python -m gearshift.bench.search --out benchmarks/search.json

The curves read evaluated placements from ``--table``. What active search or greedy search asks for and the
table does not have is evaluated with ``--supernet`` and ``--data`` and added to it; with the table of the
repository nothing is missing, unless another machine's rounding leads the search elsewhere.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.bench.search_curves import Evaluations, held_out_rows, search_rows
from gearshift.bench.search_truth import Truth, make_truth
from gearshift.files import read_json, write_json
from gearshift.memory import peak_resident_memory
from gearshift.placement import Placement, PlacementSpace
from gearshift.provenance import provenance
from gearshift.search.active import Plan, search_actively
from gearshift.search.constraints import Constraints, layer_limit
from gearshift.search.optimize import best_within, pareto_placements
from gearshift.search.program import best_by_program
from gearshift.search.space import Array
from gearshift.search.surrogate import Surrogate, fit_surrogate
from gearshift.search.table import build_table

Row = dict[str, Any]

LAYERS, COST_LEVELS, FITTED = 48, 500, 1000
SEEDS = range(5)
EVALUATIONS, UNSEEN = 400, 400
# Budgets at which the frontier is proven by a solver that shares nothing with the dynamic program.
PROVEN = 5
NINETY_PERCENT = 1.6448536269514722


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds on the wall, and the result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def row(metric: str, value: float, bar: float | None = None, **more: object) -> Row:
    """A row; ``passes`` says whether the value is at most the bar."""
    verdict = {} if bar is None else {"bar": bar, "ratio": value / bar, "passes": bool(value <= bar)}
    return {"metric": metric, "value": value, **verdict, **more}


def time_rows() -> Iterator[Row]:
    """The optimiser and the fit at the size of a model of 48 layers."""
    truth = make_truth(LAYERS, seed=0)
    costs = levelled_costs(truth.score.space, COST_LEVELS)
    seconds, points = timed(lambda: pareto_placements(truth.score, costs))
    shape = {"layers": LAYERS, "mixers": 4, "range": 3, "cost_levels": COST_LEVELS}
    yield row("frontier_seconds", seconds, 10.0, points=len(points), **shape)
    peak = peak_resident_memory()
    yield row("frontier_peak_bytes", peak, 2e9, note="of the whole process, with Python and its libraries")
    budgets = np.linspace(points[0].cost, points[-1].cost, PROVEN + 2)[1:-1]
    seconds, proofs = timed(lambda: [best_by_program(truth.score, costs, budget) for budget in budgets])
    gaps = [
        proof.bound - best_within(points, budget).value for proof, budget in zip(proofs, budgets, strict=True)
    ]
    yield row("certificate_gap", max(map(abs, gaps)) / truth.span, 1e-6, budgets=PROVEN, seconds=seconds)
    memory = layer_limit("memory", truth.score.space, np.tile([4.0, 1.0, 0.3, 0.3], (LAYERS, 1)), 60.0)
    for name, constraints in (
        ("counts", Constraints(at_least={"fa": 4}, at_most={"gdn": 10})),
        ("memory", Constraints(limits=(memory,))),
    ):
        seconds, found = timed(lambda c=constraints: pareto_placements(truth.score, costs, c))
        yield row(f"frontier_seconds, {name}", seconds, points=len(found), constraints=str(constraints))
    yield fit_row(truth)


def levelled_costs(space: PlacementSpace, levels: int) -> Array:
    """Whole costs by layer and mixer whose sums are exactly 0 to ``levels`` at most, all mixers different."""
    rng = np.random.default_rng(0)
    share = np.full(space.num_layers, 1 / space.num_layers)
    dearest = 5 + rng.multinomial(levels - 5 * space.num_layers, share)
    return np.stack([dearest, dearest // 2, 0 * dearest, 0 * dearest + 1], axis=1).astype(np.float64)


def fit_row(truth: Truth) -> Row:
    """Seconds of a fit to random placements, every choice and the cross-validation among them."""
    rows = truth.evaluate(draw(truth.score.space, FITTED, 0), np.random.default_rng(0))
    table = build_table(rows, truth.score.space, "quality")
    seconds, surrogate = timed(lambda: fit_surrogate(table))
    return row(
        "fit_seconds",
        seconds,
        20.0,
        rows=FITTED,
        layers=LAYERS,
        order=surrogate.report.order,
        range=surrogate.report.interaction_range,
        cross_validated=str(surrogate.report.cross_validated),
    )


def draw(space: PlacementSpace, count: int, seed: int) -> list[Placement]:
    """Different random placements."""
    rng, found = random.Random(seed), dict[Placement, None]()
    while len(found) < count:
        found[space.sample_composition(rng)] = None
    return list(found)


def synthetic_rows(layers: int, evaluations: int = EVALUATIONS, seeds: range = SEEDS) -> Iterator[Row]:
    """Regret of active search, and coverage of a fit to as many random placements: by seed, and the means."""
    found = [synthetic_row(make_truth(layers, seed), evaluations, seed) for seed in seeds]
    yield from found
    regrets = [each["value"] for each in found]
    yield row(
        f"synthetic_regret, {layers} layers",
        float(np.mean(regrets)),
        0.01,
        least=min(regrets),
        most=max(regrets),
    )
    for kind in ("random", "frontier", "active"):
        inside = float(np.mean([each[f"coverage_{kind}"] for each in found]))
        passes = {} if kind == "active" else {"bar": "0.85 to 0.95", "passes": 0.85 <= inside <= 0.95}
        yield {"metric": f"synthetic_coverage, {layers} layers, {kind}", "value": inside, **passes}


def synthetic_row(truth: Truth, evaluations: int, seed: int) -> Row:
    """One made-up supernet: how near active search comes to its frontier, and what 90% intervals cover."""
    rng = np.random.default_rng([seed, 1])
    plan = Plan(target="quality", evaluations=evaluations, patience=evaluations, seed=seed)
    space = truth.score.space
    searched = search_actively(
        space, truth.layer_costs, lambda some: truth.evaluate(some, rng), plan, progress=False
    )
    points = pareto_placements(searched.surrogate.score, truth.layer_costs)
    regrets = truth.regrets(points)
    seen = {Placement.parse(str(each["placement"])) for each in searched.rows}
    unseen = [placement for placement in draw(space, UNSEEN, seed + 1000) if placement not in seen]
    random_rows = truth.evaluate(draw(space, evaluations, seed + 2000), rng)
    fitted = fit_surrogate(build_table(random_rows, space, "quality"))
    return row(
        f"synthetic_regret, {space.num_layers} layers, seed {seed}",
        float(regrets.mean()),
        worst=float(regrets.max()),
        evaluations=len(searched.rows),
        order=searched.surrogate.report.order,
        range=searched.surrogate.report.interaction_range,
        coverage_random=coverage(fitted, truth, unseen, rng),
        coverage_frontier=coverage(searched.surrogate, truth, [point.placement for point in points], rng),
        coverage_active=coverage(searched.surrogate, truth, unseen, rng),
    )


def coverage(
    surrogate: Surrogate, truth: Truth, placements: list[Placement], rng: np.random.Generator
) -> float:
    """The share of fresh, noisy evaluations inside their 90% intervals."""
    values = np.array([each["quality"] for each in truth.evaluate(placements, rng)])
    mean, std = surrogate.predict(placements)
    return float(np.mean(np.abs(values - mean) <= NINETY_PERCENT * std))


def main() -> None:
    """Measure everything, print a line each, write the JSON after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--parts", default=",".join(PARTS), help="which rows to make anew, comma-separated")
    parser.add_argument("--table", type=Path, default=Path("benchmarks/search_rows.jsonl"), help="rows")
    parser.add_argument("--supernet", type=Path, help="to evaluate what the table lacks")
    parser.add_argument("--data", type=Path, help="the held-out text of the table")
    arguments = parser.parse_args()
    evaluations = Evaluations(arguments.table, arguments.supernet, arguments.data)
    content = read_json(arguments.out) if arguments.out.exists() else {"provenance": {}, "rows": []}
    for part in arguments.parts.split(","):
        content["rows"] = [made for made in content["rows"] if made["part"] != part]
        content["provenance"][part] = provenance()
        for measured in PARTS[part](evaluations):
            content["rows"].append({"part": part, **measured})
            shown = ("metric", "value", "bar", "passes")
            print({key: measured[key] for key in shown if key in measured}, flush=True)
            write_json(arguments.out, content)


# What a part's rows are made by; each part keeps the provenance of its own run.
PARTS: dict[str, Callable[[Evaluations], Iterator[Row]]] = {
    "times": lambda evaluations: time_rows(),
    "synthetic-12": lambda evaluations: synthetic_rows(12),
    "synthetic-48": lambda evaluations: synthetic_rows(LAYERS),
    "held-out": held_out_rows,
    "searches": search_rows,
}

if __name__ == "__main__":
    main()
