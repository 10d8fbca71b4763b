"""Active search over a supernet directory: the search proposes placements, the evaluation judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.evaluate.quality import evaluate_placements
from gearshift.evaluate.table import read_table, select_rows
from gearshift.find_presets import choose_cost
from gearshift.placement import Placement
from gearshift.search import NO_CONSTRAINTS, Constraints, fit_costs
from gearshift.search.active import Plan, Searched, search_actively
from gearshift.supernet.checkpoint import read_config

ROUNDS = "rounds.jsonl"


@dataclass(frozen=True)
class HeldOutText:
    """What placements are judged by; see `gearshift.evaluate.quality.evaluate_placements`."""

    data: Path
    recall: Path | None = None
    tokens: int = 32768
    sequence_length: int = 512
    batch_size: int = 8
    device: str = "auto"


def search_supernet(
    supernet: Path,
    table: Path,
    held_out: HeldOutText,
    measurements: Sequence[Mapping[str, Any]],
    plan: Plan,
    out: Path,
    *,
    context_length: int | None = None,
    constraints: Constraints = NO_CONSTRAINTS,
    progress: bool = True,
) -> Searched:
    """Propose, evaluate and fit until the frontier stands still or the evaluations are spent.

    The rows that the table has for this checkpoint and text are the start. New ones are added to it, so that
    nothing is evaluated twice; the rounds are logged in ``rounds.jsonl``, and an interrupted search goes on.

    Args:
        supernet: a supernet directory.
        table: evaluation rows, which may be missing.
        held_out: what placements are judged by.
        measurements: rows of ``gearshift bench``.
        plan: how to search.
        out: the folder of the log.
        context_length: of the frontier's cost; None takes the longest measured.
        constraints: what proposed frontiers must keep to.
        progress: show how far it is.

    Raises:
        GearshiftError: a row, the supernet or the text cannot be used; the rounds before are kept.
    """
    space = read_config(supernet).placement_space
    cost = choose_cost(list(fit_costs(measurements, space).values()), context_length)

    def evaluate(placements: Sequence[Placement]) -> list[dict[str, Any]]:
        return evaluate_placements(
            supernet,
            placements,
            held_out.data,
            held_out.recall,
            table,
            tokens=held_out.tokens,
            sequence_length=held_out.sequence_length,
            batch_size=held_out.batch_size,
            device=held_out.device,
            progress=False,
        )

    (teacher,) = evaluate([space.teacher()])
    given = select_rows(read_table(table), teacher["checkpoint"], teacher["data"])
    return search_actively(
        space,
        cost.layer_costs(space),
        evaluate,
        plan,
        given=list(given.values()),
        constraints=constraints,
        log=out / ROUNDS,
        progress=progress,
    )
