"""``gearshift calibrate``: bring a converted supernet's mixers near to its teacher, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gearshift.cli.options import DeviceOption, SupernetArgument

KEPT = "finished layers are kept; run the same command again with --resume to go on with the next"


def run(
    supernet: SupernetArgument,
    data: Annotated[
        Path, typer.Option(help="Text: a .jsonl, .txt or .py file, or a folder of Python files.")
    ],
    out: Annotated[Path, typer.Option(help="The directory to make; the result is OUT/supernet.")],
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use at most.")] = 200_000,
    sequence_length: Annotated[int, typer.Option(help="Tokens that a mixer sees at a time.")] = 512,
    steps: Annotated[int, typer.Option(help="Steps of each mixer.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Sequences in a step.")] = 2,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the steps; 1 / hidden size if left out.")
    ] = None,
    ridge: Annotated[
        float, typer.Option(help="How strongly output projections are held to what they were.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of the batches.")] = 0,
    parts: Annotated[
        str, typer.Option(help="What to do, comma-separated: decay, steps, ridge.")
    ] = "decay,steps,ridge",
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in OUT.")] = False,
) -> None:
    """Bring every mixer near to the teacher's attention of its layer, with a little text."""
    from gearshift.cli.tables import say_written
    from gearshift.train.calibrate import CalibrationSettings, calibrate

    settings = CalibrationSettings(
        tokens=tokens,
        sequence_length=sequence_length,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        ridge=ridge,
        seed=seed,
        parts=tuple(part.strip() for part in parts.split(",")),
    )
    print("relative error of each mixer's output, before and after")
    written = calibrate(supernet, data, out, settings, device=device, resume=resume, layer_done=_print_layer)
    say_written(written, "supernet", next_step=f"gearshift train recipes/demo.yaml --set supernet={written}")


def _print_layer(rows: Sequence[dict[str, Any]]) -> None:
    from gearshift.placement import short_name

    if not rows:
        return
    mixers = "  ".join(
        f"{short_name(row['mixer'])} {_shown(row['before'])} -> {_shown(row['after'])}" for row in rows
    )
    print(f"layer {rows[0]['layer']:<3} {mixers}", flush=True)
    for row in rows:
        for note in row["notes"]:
            print(f"          {short_name(row['mixer'])}: {note}", flush=True)


def _shown(error: float | None) -> str:
    return "no number" if error is None else f"{error:.3f}"
