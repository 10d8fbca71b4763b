"""``gearshift cost``: fit a cost model to measured rows, and predict speed and memory with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gearshift.cli.options import gibibytes, read_rows
from gearshift.cli.tables import print_table, say_written
from gearshift.errors import GearshiftError
from gearshift.files import write_json
from gearshift.placement import Placement, PlacementSpace
from gearshift.workload import Workload

if TYPE_CHECKING:
    from gearshift.search.cost_fit import CostPrediction, EngineCost, Interval

KEPT = "nothing was written; run the same command again"
_GIB = 2**30

app = typer.Typer(
    help="What placements cost on your engine, fitted to measurements of it.", no_args_is_help=True
)


class NoWorkloadError(GearshiftError):
    """A prediction is asked for without saying how many sequences run."""


def fit(
    rows: Annotated[list[Path], typer.Argument(help="Rows that 'gearshift bench' wrote; one engine's.")],
    out: Annotated[Path, typer.Option(help="The cost model to write, a .json file.")],
    held_out: Annotated[
        Path | None, typer.Option(help="Rows to judge the model by, of other placements or workloads.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write the errors, a .json file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the error bars.")] = 0,
) -> None:
    """Fit the cost model, and say how far it is off on what it has not seen."""
    measured = [row for path in rows for row in read_rows(path, "gearshift bench")]
    unseen = [] if held_out is None else read_rows(held_out, "gearshift bench")

    from gearshift.provenance import provenance
    from gearshift.search.cost import save_costs
    from gearshift.search.cost_fit import fit_engine_cost
    from gearshift.search.cost_report import judge_costs
    from gearshift.search.cost_rows import read_cost_rows

    read = read_cost_rows(measured)
    cost = fit_engine_cost(read, seed)
    judged = read_cost_rows([*measured[:1], *unseen], read.space).steps[1:] if unseen else ()
    errors = judge_costs(cost, judged)
    save_costs(cost, out)
    if report is not None:
        write_json(report, {**errors.to_json(), "provenance": provenance()})
    typer.echo(str(errors))
    say_written(
        out, f"a cost model of {len(read.steps)} measurements", f"gearshift cost predict {out} --help"
    )


def predict(
    costs: Annotated[Path, typer.Argument(help="A cost model that 'gearshift cost fit' wrote.")],
    context: Annotated[list[int], typer.Option(min=1, help="Tokens of each sequence. May be repeated.")],
    placement: Annotated[
        list[str] | None, typer.Option(help="A placement, such as 'fa*12'. May be repeated.")
    ] = None,
    presets: Annotated[
        Path | None, typer.Option(help="Also every preset of this supernet directory.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at once, at most.")] = None,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GiB for caches; without --batch as many run as fit.")
    ] = None,
    prompt: Annotated[
        int, typer.Option(min=0, help="Tokens of a prompt, for the time to the first token; 0 for --context.")
    ] = 0,
) -> None:
    """Predict speed and memory, with 90% intervals."""
    from gearshift.search.cost import load_engine_cost

    cost = load_engine_cost(costs)
    asked = _asked(placement or (), presets, cost.space)
    if batch is None and memory is None:
        raise NoWorkloadError("how many sequences run? give --batch, --memory, or both")
    workloads = [
        Workload(length, prompt, 0, concurrency=batch, memory_bytes=gibibytes(memory)) for length in context
    ]
    columns = ("placement", "context", "batch", "tokens/s", "ms a token", "first token s", "GiB")
    print_table(f"{cost.rows.hardware}, 90% intervals", columns, _rows(cost, asked, workloads))


def _asked(texts: Sequence[str], presets: Path | None, space: PlacementSpace) -> list[Placement]:
    from gearshift.presets import read_presets

    found = [space.check(Placement.parse(text, space.num_layers)) for text in texts]
    if presets is not None:
        found += [preset.placement for preset in read_presets(presets, space).values()]
    return list(dict.fromkeys(found)) or [space.default]


def _rows(
    cost: EngineCost, placements: Sequence[Placement], workloads: Sequence[Workload]
) -> Iterator[tuple[str, ...]]:
    for workload in workloads:
        for placement in placements:
            yield _cells(placement, workload, cost.predict(placement, workload))


def _cells(placement: Placement, workload: Workload, found: CostPrediction) -> tuple[str, ...]:
    first, caches, weights = found.first_token_seconds, found.cache_bytes, found.weight_bytes
    memory = "-" if caches is None or weights is None else f"{(caches + weights) / _GIB:.2f}"
    return (
        str(placement),
        str(workload.context_length),
        str(found.batch_size),
        _interval(found.tokens_per_second),
        # What one of the users waits for: all sequences get a token in one step.
        _interval(found.step_seconds.map(1e3)),
        "-" if first is None else _interval(first),
        memory,
    )


def _interval(given: Interval) -> str:
    return f"{given.value:.4g} ({given.low:.4g}-{given.high:.4g})"


COMMANDS = {"fit": fit, "predict": predict}
