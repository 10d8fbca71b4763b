"""``gearshift stability``: whether rankings of placements settle during training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gearshift.cli.options import gibibytes, read_rows
from gearshift.cli.tables import print_table, say_written
from gearshift.errors import GearshiftError
from gearshift.files import write_json
from gearshift.placement import Placement, PlacementSpace
from gearshift.workload import Workload

if TYPE_CHECKING:
    from gearshift.search.cost import CostModel
    from gearshift.search.stability import RunStability

# Rows of evaluations by (seed of the run, step).
_Rows = dict[tuple[int, int], list[dict[str, Any]]]

KEPT = "nothing was written; run the same command again"
_LABEL = re.compile(r"(?P<step>[0-9]{1,12})(?:@(?P<seed>[0-9]{1,9}))?")


class LabelError(GearshiftError, ValueError):
    """A checkpoint has no step, or two have the same."""


def run(
    tables: Annotated[
        list[str],
        typer.Argument(
            help="STEP=TABLE, or STEP@SEED=TABLE for several runs: rows of 'gearshift evaluate' of one "
            "checkpoint. Or just TABLE, with --label for each of its checkpoints."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The result, a .json file.")],
    label: Annotated[
        list[str] | None, typer.Option(help="DIGEST=STEP or DIGEST=STEP@SEED; a digest may be shortened.")
    ] = None,
    target: Annotated[str, typer.Option(help="What is ranked: '-loss', '-kl', 'recall.copy' ...")] = "-loss",
    costs: Annotated[
        Path | None, typer.Option(help="A cost model, for the frontier and for regrets.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Context length of these costs.")] = 32768,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at once, for these costs.")] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="Or GiB for caches, as many as fit.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare the checkpoints of training runs: rank correlation, concordance, regret of an early pick."""
    rows = _labelled(tables, dict(_split(text, "--label") for text in label or ()))

    from gearshift.provenance import provenance
    from gearshift.search.cost import CostModel, load_engine_cost
    from gearshift.search.stability import measure_stability, stability_to_json
    from gearshift.search.table import build_table

    space = _space(rows)
    built = {key: build_table(given, space, target) for key, given in rows.items()}
    cost: CostModel | None = None
    if costs is not None:
        workload = Workload(context, concurrency=batch, memory_bytes=gibibytes(memory))
        cost = CostModel.of(load_engine_cost(costs), workload)
    runs = measure_stability(built, None if cost is None else cost.seconds, seed)
    workload_text = None if cost is None else cost.describe()
    write_json(out, stability_to_json(runs, target, workload_text, provenance()))
    columns = ("step", "Spearman", "on the frontier", "mean regret", "worst regret")
    for found in runs:
        print_table(_title(found, target), columns, _cells(found))
    say_written(out, "stability", "gearshift explore RUN shows it, if the file is in RUN")


def _split(text: str, what: str) -> tuple[str, str]:
    left, found, right = text.partition("=")
    if not found or not left or not right:
        raise LabelError(f"{what} {text!r}; expected two parts with '=' between them")
    return left, right


def _key(text: str) -> tuple[int, int]:
    """(seed, step) of ``2000`` or ``2000@1``."""
    match = _LABEL.fullmatch(text)
    if match is None:
        raise LabelError(f"the step {text!r}; expected a number such as 2000, or 2000@1 for seed 1")
    return int(match["seed"] or 0), int(match["step"])


def _labelled(
    tables: Sequence[str], labels: Mapping[str, str]
) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Rows by (seed, step)."""
    found: _Rows = {}
    for text in tables:
        step, given, path = text.partition("=")
        rows = read_rows(Path(path if given else text), "gearshift evaluate")
        if given:
            _add(found, _key(step), rows, text)
            continue
        for digest in dict.fromkeys(str(row.get("checkpoint")) for row in rows):
            mine = [row for row in rows if str(row.get("checkpoint")) == digest]
            _add(found, _key(_step_of(digest, labels, text)), mine, text)
    return found


def _add(
    found: _Rows,
    key: tuple[int, int],
    rows: list[dict[str, Any]],
    text: str,
) -> None:
    if key in found:
        raise LabelError(f"{text}: step {key[1]} of seed {key[0]} is there already; merge its tables first")
    found[key] = rows


def _step_of(digest: str, labels: Mapping[str, str], text: str) -> str:
    steps = [step for start, step in labels.items() if digest.startswith(start)]
    if len(steps) != 1:
        raise LabelError(
            f"{text} has the checkpoint {digest}, for which {len(steps)} labels stand; give one: "
            f"--label {digest[:8]}=STEP"
        )
    return steps[0]


def _space(rows: Mapping[tuple[int, int], Sequence[Mapping[str, Any]]]) -> PlacementSpace:
    placements = [Placement.of(row.get("placement", "")) for given in rows.values() for row in given]
    return PlacementSpace(len(placements[0]), tuple({mixer for p in placements for mixer in p}))


def _title(found: RunStability, target: str) -> str:
    front = f", frontier of {len(found.frontier)}: W {found.frontier_kendall_w}" if found.frontier else ""
    return f"{target}, seed {found.seed}: {found.placements} placements, Kendall's W {found.kendall_w}{front}"


def _cells(found: RunStability) -> Iterator[tuple[str, ...]]:
    for one in found.checkpoints:
        estimates = (one.spearman, one.frontier_spearman, one.mean_regret, one.worst_regret)
        yield str(one.step), *map(str, estimates)
