"""Options of ``gearshift search``: how to fit, what placements must keep to, and how to search actively."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from gearshift.errors import GearshiftError

if TYPE_CHECKING:
    from gearshift.find_presets import Wishes

K = TypeVar("K")
V = TypeVar("V")

_PANEL = "What placements must keep to"
_ACTIVE = "Active search"

ContextOption = Annotated[
    int | None, typer.Option(help="The context length to search for; by default the longest measured.")
]
TargetOption = Annotated[
    str, typer.Option(help="What to predict: '-sqrt(kl)', '-loss', 'quality', 'recall.copy' ...")
]
OrderOption = Annotated[
    int | None,
    typer.Option(min=1, max=4, help="How many layers interact at most; by default the evidence chooses."),
]
RangeOption = Annotated[
    int | None,
    typer.Option("--range", min=0, max=4, help="How far layers interact; by default the evidence chooses."),
]
DataOption = Annotated[
    Path | None,
    typer.Option(help="Held-out text; with it, what is proposed is evaluated.", rich_help_panel=_ACTIVE),
]
RecallOption = Annotated[
    Path | None, typer.Option(help="Recall examples, a .jsonl file.", rich_help_panel=_ACTIVE)
]
EvaluationsOption = Annotated[
    int, typer.Option(help="The most rows, with those that are there already.", rich_help_panel=_ACTIVE)
]
BatchOption = Annotated[int, typer.Option(help="Placements of a round.", rich_help_panel=_ACTIVE)]
ToleranceOption = Annotated[
    float,
    typer.Option(help="Share of the range within which the frontier stands still.", rich_help_panel=_ACTIVE),
]
SeedOption = Annotated[int, typer.Option(help="Seed of the proposals.", rich_help_panel=_ACTIVE)]
TokensOption = Annotated[
    int, typer.Option(help="How many tokens of the data to use at most.", rich_help_panel=_ACTIVE)
]
SequenceOption = Annotated[
    int, typer.Option(help="Tokens that a placement sees at a time.", rich_help_panel=_ACTIVE)
]

AtLeastOption = Annotated[
    list[str] | None,
    typer.Option(help="The fewest layers of a mixer: fa=4. May be repeated.", rich_help_panel=_PANEL),
]
AtMostOption = Annotated[
    list[str] | None,
    typer.Option(help="The most layers of a mixer: gdn=10. May be repeated.", rich_help_panel=_PANEL),
]
FixOption = Annotated[
    list[str] | None,
    typer.Option(help="A layer's mixer, layers from 0: 0=fa. May be repeated.", rich_help_panel=_PANEL),
]
FloorOption = Annotated[
    list[str] | None,
    typer.Option(
        help="The least of another column, by a surrogate of its own: recall.copy=0.9. May be repeated.",
        rich_help_panel=_PANEL,
    ),
]


class ConstraintOptionError(GearshiftError, ValueError):
    """A constraint on the command line cannot be read."""


def read_wishes(
    at_least: Sequence[str] | None,
    at_most: Sequence[str] | None,
    fix: Sequence[str] | None,
    floor: Sequence[str] | None,
) -> Wishes:
    """Constraints and floors from their texts.

    Raises:
        ConstraintOptionError: a text is not of its form, or two say something of the same.
        PlacementError: a mixer is unknown.
    """
    from gearshift.find_presets import Wishes
    from gearshift.search import Constraints

    constraints = Constraints(
        at_least=_read("--at-least", at_least, str, int),
        at_most=_read("--at-most", at_most, str, int),
        fixed=_read("--fix", fix, int, str),
    )
    return Wishes(constraints, _read("--floor", floor, str, float))


def _read(
    option: str, texts: Sequence[str] | None, read_key: Callable[[str], K], read_value: Callable[[str], V]
) -> dict[K, V]:
    found: dict[K, V] = {}
    for text in texts or ():
        key, _, value = text.partition("=")
        try:
            pair = read_key(key.strip()), read_value(value.strip())
        except ValueError:
            pair = None
        if pair is None or not key or not value or pair[0] in found:
            form = {"--fix": "layer=mixer, such as 0=fa", "--floor": "column=number, such as recall.copy=0.9"}
            raise ConstraintOptionError(
                f"{option} {text}; expected {form.get(option, 'mixer=layers, such as fa=4')}, each once"
            )
        found[pair[0]] = pair[1]
    return found
