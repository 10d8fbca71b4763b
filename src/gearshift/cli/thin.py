"""``gearshift thin``: a supernet with only the mixers that some of its presets use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gearshift.cli.options import OverwriteOption, SupernetArgument
from gearshift.placement import FULL_ATTENTION

if TYPE_CHECKING:
    from gearshift.convert.thin import Thinned

KEPT = "nothing was written; run the same command again"


def run(
    supernet: SupernetArgument,
    out: Annotated[Path, typer.Argument(help="The supernet directory to make.")],
    presets: Annotated[str, typer.Option(help="The presets that shall still run, comma-separated.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Drop the mixers that none of some presets uses: fewer bytes, and the same at these presets."""
    from gearshift.cli.tables import say_written
    from gearshift.convert.thin import thin_supernet

    names = [name.strip() for name in presets.split(",") if name.strip()]
    thinned = thin_supernet(supernet, out, names, overwrite=overwrite, progress=True)
    say_written(out, "supernet", next_step=f"gearshift info {out}", notes=_notes(thinned))


def _notes(thinned: Thinned) -> Iterator[str]:
    before = thinned.nbytes + thinned.saved
    share = thinned.saved / before
    yield f"{thinned.nbytes:,} bytes of weights: {thinned.saved:,} of {before:,} saved, {share:.0%}"
    yield f"presets: {', '.join(thinned.presets)}; default placement: {thinned.default}"
    if not all(FULL_ATTENTION in mixers for mixers in thinned.layers):
        yield "the teacher is not among its placements: name its preset, too, if it is needed"
    yield "it loads with Gearshift: in Transformers, after 'import gearshift', by AutoModelForCausalLM"
