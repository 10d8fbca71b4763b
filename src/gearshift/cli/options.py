"""Options that several commands share, and what they mean."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gearshift.errors import GearshiftError
from gearshift.files import read_json_lines
from gearshift.inspect_directory import supernet_space
from gearshift.placement import Placement, PlacementSpace
from gearshift.presets import read_presets

SupernetArgument = Annotated[Path, typer.Argument(help="A supernet directory.")]
PlacementOption = Annotated[
    list[str] | None, typer.Option(help="A placement, such as 'fa*12'. May be repeated.")
]
PresetsOption = Annotated[bool, typer.Option("--presets", help="Also every preset of the supernet.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")]
RandomOption = Annotated[
    int, typer.Option("--random", min=0, help="Also so many different random placements.")
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run; auto takes a GPU if there is one.")
]


class NoRowsError(GearshiftError):
    """A file of rows is missing or empty."""


def read_rows(path: Path, writer: str) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file.

    Raises:
        NoRowsError: it is missing or has none; the message names the command that writes some.
        FileFormatError: a line is not a JSON object.
    """
    rows = read_json_lines(path) if path.is_file() else []
    if not rows:
        raise NoRowsError(f"{path} is missing or holds no rows; write some with {writer}")
    return rows


def asked_placements(
    supernet: Path, texts: Sequence[str], presets: bool, random_count: int, seed: int
) -> list[Placement]:
    """Placements given as text, then those of the presets, then random ones; nothing heavy is loaded."""
    space = supernet_space(supernet)
    asked = [space.check(Placement.parse(text, space.num_layers)) for text in texts]
    if presets:
        asked += [preset.placement for preset in read_presets(supernet, space).values()]
    return [*asked, *islice(random_placements(space, seed), random_count)]


def random_placements(space: PlacementSpace, seed: int) -> Iterator[Placement]:
    """Different random placements, every count of a mixer's layers as likely as any other."""
    rng = random.Random(seed)
    seen: set[Placement] = set()
    while len(seen) < space.size:
        drawn = space.sample_composition(rng)
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def gibibytes(given: float | None) -> int | None:
    """Bytes of a number of GiB, as commands ask for it; None stays None."""
    return None if given is None else int(given * 2**30)
