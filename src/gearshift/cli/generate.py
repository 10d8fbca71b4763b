"""``gearshift generate``: a prompt through one or several presets, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from gearshift.cli.options import DeviceOption, PlacementOption, SupernetArgument
from gearshift.generate import choose_placements, generate_side_by_side
from gearshift.inspect_directory import supernet_space
from gearshift.presets import read_presets

KEPT = "nothing is written by this command"


def run(
    supernet: SupernetArgument,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    preset: Annotated[
        list[str] | None, typer.Option(help="A preset of the supernet. May be repeated.")
    ] = None,
    placement: PlacementOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    device: DeviceOption = "auto",
) -> None:
    """Complete a prompt with several presets of one checkpoint; without any named, with all of them."""
    space = supernet_space(supernet)
    chosen = choose_placements(space, read_presets(supernet, space), preset or (), placement or ())

    from gearshift.supernet import load_supernet
    from gearshift.train.device import choose_device
    from gearshift.train.tokens import load_tokenizer

    model, tokenizer = load_supernet(supernet, device=choose_device(device)), load_tokenizer(supernet)
    for result in generate_side_by_side(model, tokenizer, prompt, chosen, max_new_tokens=max_new_tokens):
        typer.secho(
            f"--- {result.name}: {result.placement}, {result.tokens_per_second:.1f} tokens/s", bold=True
        )
        typer.echo(prompt + result.text)
