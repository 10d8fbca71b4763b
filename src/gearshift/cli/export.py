"""``gearshift export``: one placement of a supernet as a model of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gearshift.cli.options import OverwriteOption, SupernetArgument
from gearshift.errors import GearshiftError
from gearshift.inspect_directory import supernet_space
from gearshift.placement import Placement
from gearshift.presets import named_preset, read_presets

if TYPE_CHECKING:
    from gearshift.convert.export import Export

KEPT = "nothing was written; run the same command again"


class NothingToExportError(GearshiftError):
    """The command was given no placement, or two."""


def run(
    supernet: SupernetArgument,
    out: Annotated[Path, typer.Argument(help="The model directory to make.")],
    preset: Annotated[str | None, typer.Option(help="The preset to write.")] = None,
    placement: Annotated[
        str | None, typer.Option(help="Or the placement to write, such as 'fa*12' for the teacher.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write one placement in the plainest form that computes it: the teacher's class, if it can be."""
    chosen = _chosen(supernet, preset, placement)

    from gearshift.cli.tables import say_written
    from gearshift.convert.export import export_placement

    export = export_placement(supernet, out, chosen, overwrite=overwrite, progress=True)
    what = f"{'supernet' if export.form is None else export.form.class_name} ({export.placement})"
    say_written(out, what, next_step=f"gearshift info {out}", notes=_notes(export))


def _chosen(supernet: Path, preset: str | None, placement: str | None) -> Placement:
    if (preset is None) == (placement is None):
        raise NothingToExportError("give either --preset or --placement, such as --placement 'fa*12'")
    space = supernet_space(supernet)
    if placement is not None:
        return space.check(Placement.parse(placement, space.num_layers))
    assert preset is not None
    return named_preset(read_presets(supernet, space), preset).placement


def _notes(export: Export) -> Iterator[str]:
    """How large it is, and which programs can load it."""
    form = export.form
    yield f"{export.nbytes:,} bytes of weights"
    if form is None:
        yield f"no class of Transformers computes this placement: {export.why_supernet}"
        yield "it loads with Gearshift: in Transformers, after 'import gearshift', by AutoModelForCausalLM"
    elif form.is_teacher:
        yield f"what loads the teacher loads it, as {form.class_name}: config.json is the teacher's own"
    elif not any(form.windows):
        yield f"it loads in what reads {form.class_name} checkpoints, Transformers first of all"
    else:
        fields = "layer_types and sliding_window" if "layer_types" in form.config else "sliding_window"
        yield f"it loads in Transformers as {form.class_name}, and in what heeds {fields} of this class:"
        yield "a program that does not computes full attention; vLLM does with --model-impl transformers"
    if export.is_part:
        yield "it is the teacher's text model alone, without the parts that read images"
