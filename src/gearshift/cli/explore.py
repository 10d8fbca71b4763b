"""``gearshift explore``: what a search found, as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gearshift.cli.options import gibibytes
from gearshift.cli.tables import say_written
from gearshift.errors import GearshiftError
from gearshift.workload import Workload

if TYPE_CHECKING:
    from gearshift.presets import Preset
    from gearshift.search.cost import CostModel
    from gearshift.search.cost_fit import EngineCost
    from gearshift.search.frontier import Frontier

KEPT = "nothing was written; run the same command again"


class NothingToExploreError(GearshiftError):
    """A folder that no search wrote."""


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that 'gearshift search' wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page; RUN/explore.html if not given.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also a picture of the frontier, a .png file.")] = None,
    supernet: Annotated[Path | None, typer.Option(help="The supernet whose presets are shown.")] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Context lengths of the slider; else those measured.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once; else the most measured.")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="Or GiB for caches, as many as fit.")] = None,
    stability: Annotated[
        Path | None, typer.Option(help="What 'gearshift stability' wrote; else RUN/stability.json.")
    ] = None,
) -> None:
    """Write one page with the frontier at several contexts, the presets, and what lies behind them."""
    from gearshift.explore import write_frontier_page, write_frontier_png
    from gearshift.provenance import provenance
    from gearshift.search import build_frontier, load_surrogate
    from gearshift.search.cost import load_engine_cost, measured_workloads
    from gearshift.search.stability import read_stability

    for name in ("surrogate.json", "costs.json"):
        if not (folder / name).is_file():
            raise NothingToExploreError(f"{folder} has no {name}; give a folder that gearshift search wrote")
    surrogate, fit = load_surrogate(folder / "surrogate.json"), load_engine_cost(folder / "costs.json")
    measured = measured_workloads(fit)
    costs = _costs(fit, measured, context, batch, gibibytes(memory))
    frontiers = [build_frontier(surrogate, cost) for cost in costs]
    main, presets = frontiers[-1], _presets(folder if supernet is None else supernet, frontiers[-1])
    ranked = folder / "stability.json" if stability is None else stability
    shown = [cost for cost in measured.values() if cost != main.cost]
    page = write_frontier_page(
        folder / "explore.html" if out is None else out,
        main,
        presets,
        other_costs=shown,
        other_contexts=frontiers[:-1],
        stability=read_stability(ranked) if stability is not None or ranked.exists() else None,
        provenance=provenance(),
    )
    if png is not None:
        write_frontier_png(png, main, presets)
    say_written(page, "the page", "open it in a browser; it needs no network")


def _costs(
    fit: EngineCost,
    measured: dict[tuple[int, int], CostModel],
    contexts: list[int] | None,
    batch: int | None,
    memory_bytes: int | None,
) -> list[CostModel]:
    """One cost model for each context length, rising."""
    from gearshift.search.cost import CostModel

    wanted = sorted(set(contexts or [step.context_length for step in fit.rows.steps]))
    if batch is None and memory_bytes is None:
        batch = max((size for _, size in measured), default=None)
    return [CostModel.of(fit, Workload(c, concurrency=batch, memory_bytes=memory_bytes)) for c in wanted]


def _presets(directory: Path, frontier: Frontier) -> list[Preset]:
    """The presets in a folder, or else some along the frontier."""
    from gearshift.presets import read_presets
    from gearshift.search import choose_presets

    return list(read_presets(directory, frontier.surrogate.table.space).values()) or choose_presets(frontier)
