"""Measured decode steps: rows of `gearshift bench`, read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gearshift._checks import check_keys, is_count, is_number
from gearshift.placement import Placement, PlacementError, PlacementSpace
from gearshift.search.cost_engine import CostError, Engine

_KEYS = ("placement", "context_length", "batch_size", "seconds_per_step", "hardware")


@dataclass(frozen=True)
class MeasuredStep:
    """A measured decode step.

    Attributes:
        placement: what ran.
        seconds: of one step, in which every sequence of the batch gets one token.
        context_length: tokens that each sequence held.
        batch_size: sequences decoded together.
        memory_bytes: where as many sequences ran as fit, the memory for their caches; else None.
        prefill_seconds: that one sequence took to read a prompt as long as the context; None if not measured.
    """

    placement: Placement
    seconds: float
    context_length: int
    batch_size: int
    memory_bytes: int | None = None
    prefill_seconds: float | None = None

    def __post_init__(self) -> None:
        if not is_number(self.seconds) or self.seconds <= 0:
            raise CostError(f"seconds_per_step = {self.seconds!r}; expected a finite number above 0")
        sizes = (self.context_length, self.batch_size)
        if not all(is_count(size, 1) for size in sizes):
            raise CostError(f"context_length and batch_size are {sizes}; expected whole numbers, at least 1")
        if self.memory_bytes is not None and not is_count(self.memory_bytes, 1):
            raise CostError(f"memory_bytes = {self.memory_bytes!r}; expected a whole number, at least 1")
        prefill = self.prefill_seconds
        if prefill is not None and (not is_number(prefill) or prefill <= 0):
            raise CostError(f"prefill_seconds = {prefill!r}; expected a finite number above 0")

    @property
    def workload(self) -> tuple[int, int | None, int | None]:
        """(context length, batch size or None for as many as fit, memory for caches)."""
        batch = self.batch_size if self.memory_bytes is None else None
        return self.context_length, batch, self.memory_bytes

    @classmethod
    def from_json(cls, given: object) -> MeasuredStep:
        """Read the JSON form.

        Raises:
            CostError: a key is missing or unknown, or a value is wrong.
            PlacementError: the placement cannot be read.
        """
        values = check_keys(cls, given, "a measured step", CostError)
        return cls(**{**values, "placement": Placement.parse(values["placement"])})

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**vars(self), "placement": str(self.placement)}


@dataclass(frozen=True)
class CostRows:
    """Measured steps of one machine and engine.

    Attributes:
        steps: at least one.
        space: where their placements lie.
        hardware: the machine.
        engine: how the engine keeps caches, if the rows say so.
    """

    steps: tuple[MeasuredStep, ...]
    space: PlacementSpace
    hardware: str
    engine: Engine | None = None


def read_cost_rows(rows: Iterable[Mapping[str, Any]], space: PlacementSpace | None = None) -> CostRows:
    """Read rows as `gearshift bench` writes them.

    Args:
        rows: see docs/directories.md, "Cost rows".
        space: where the placements must lie; None takes the engine's, or else the smallest that fits.

    Raises:
        CostError: there are no rows, one is wrong, or they are of different machines or engines. The message
            names the row.
    """
    given = list(rows)
    if not given:
        raise CostError("there are no measurements; run the decode benchmark first")
    for number, row in enumerate(given, start=1):
        missing = [key for key in _KEYS if key not in row]
        if missing:
            raise CostError(f"measurement {number} has no {missing[0]!r}; it has {sorted(row)}")
    hardware = str(_the_only(given, "hardware"))
    described = _the_only(given, "engine")
    engine = None if described is None else Engine.from_json(described)
    if space is None:
        space = _smallest_space(given) if engine is None else engine.space
    steps = tuple(_read_row(number, row, space) for number, row in enumerate(given, start=1))
    if engine is not None:
        _check_held(engine, space)
    return CostRows(steps, space, hardware, engine)


def _the_only(rows: list[Mapping[str, Any]], key: str) -> Any:  # noqa: ANN401 - any JSON value
    """What all rows have under a key."""
    first = rows[0].get(key)
    for number, row in enumerate(rows, start=1):
        if row.get(key) != first:
            given = [f"{value!r:.80}" for value in (row.get(key), first)]
            noun = {"hardware": "machine"}.get(key, key)
            raise CostError(
                f"measurement {number} is of {given[0]}, those before of {given[1]}; expected one {noun}"
            )
    return first


def _smallest_space(rows: list[Mapping[str, Any]]) -> PlacementSpace:
    placements = [Placement.of(row["placement"]) for row in rows]
    mixers = {mixer for placement in placements for mixer in placement}
    return PlacementSpace(len(placements[0]), tuple(mixers))


def _read_row(number: int, row: Mapping[str, Any], space: PlacementSpace) -> MeasuredStep:
    what = f"measurement {number} ({row['placement']})"
    try:
        return MeasuredStep(
            space.check(Placement.of(row["placement"])),
            row["seconds_per_step"],
            row["context_length"],
            row["batch_size"],
            row.get("memory_bytes"),
            row.get("prefill_seconds"),
        )
    except (PlacementError, CostError) as error:
        raise CostError(f"{what}: {error}") from None


def _check_held(engine: Engine, space: PlacementSpace) -> None:
    for number, mixers in enumerate(space.layers):
        held = engine.layers[number] if number < len(engine.layers) else {}
        if lacking := [mixer for mixer in mixers if mixer not in held]:
            raise CostError(
                f"the measured engine has no {lacking[0]} in layer {number}; measure the same supernet"
            )
