"""A run's log as a table and as a picture. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.errors import GearshiftError
from gearshift.files import atomic_file, read_json_lines
from gearshift.train.directory import RunDirectory

Row = dict[str, Any]


class NoRunError(GearshiftError):
    """There is no run to show, or nothing to draw it with."""


@dataclass(frozen=True)
class Summary:
    """Several steps of one stage in a row of a table.

    Attributes:
        steps: as in ``1-50``.
        stage: its kind.
        loss: mean; None in a stage without one.
        mixers: mean distance to the teacher, by mixer.
        tokens: read up to the last of the steps.
        tokens_per_second: mean.
        retention: of the placements that were last judged in these steps.
    """

    steps: str
    stage: str
    loss: float | None
    mixers: dict[str, float]
    tokens: int
    tokens_per_second: float
    retention: dict[str, float]


def read_run(root: Path) -> list[Row]:
    """The rows of a run directory.

    Raises:
        NoRunError: there is none, or it has not taken a step.
    """
    path = RunDirectory(root).metrics
    if not path.is_file():
        raise NoRunError(f"{root} is no run directory: it has no {path.name}; give the 'out' of a recipe")
    rows = read_json_lines(path)
    if not rows:
        raise NoRunError(f"{path} is empty: the run has not finished a step yet")
    return rows


def summarise(rows: Sequence[Row], parts: int = 12) -> list[Summary]:
    """The rows in about so many parts of equal length, none of which spans two stages."""
    size = -(-len(rows) // parts)
    pieces: list[list[Row]] = []
    for row in rows:
        if not pieces or len(pieces[-1]) == size or pieces[-1][-1]["stage"] != row["stage"]:
            pieces.append([])
        pieces[-1].append(row)
    return [_summary(piece) for piece in pieces]


def _summary(rows: Sequence[Row]) -> Summary:
    names = dict.fromkeys(name for row in rows for name in row.get("mixers", {}))
    by_mixer = {
        name: _mean(row.get("mixers", {}).get(name, {}).get("activation") for row in rows) for name in names
    }
    judged = next((row["held_out"] for row in reversed(rows) if "held_out" in row), {})
    return Summary(
        steps=f"{rows[0]['step']}-{rows[-1]['step']}",
        stage=rows[0]["stage"],
        loss=_mean(row.get("loss") for row in rows),
        mixers={name: value for name, value in by_mixer.items() if value is not None},
        tokens=rows[-1]["tokens"],
        tokens_per_second=_mean(row["tokens_per_second"] for row in rows) or 0.0,
        retention={name: values["retention"] for name, values in judged.items() if name != "teacher"},
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def plot_run(rows: Sequence[Row], path: Path) -> None:
    """Draw loss, distances by mixer, gradient norm, and held-out retention over steps, as a PNG.

    Raises:
        NoRunError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NoRunError("drawing takes matplotlib; pip install 'gearshift[viz]'") from None
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).flatten()
    curves = (("loss", _losses(rows)), ("distance to the teacher", _distances(rows)))
    curves += (("gradient norm", _norms(rows)), ("held-out retention", _retentions(rows)))
    for axis, (title, lines) in zip(axes, curves, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        for name, points in lines.items():
            axis.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1)
        if lines:
            axis.legend(fontsize="small")
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


Lines = dict[str, list[tuple[int, float]]]


def _losses(rows: Sequence[Row]) -> Lines:
    names = ("loss", "forward_kl", "reverse_kl", "cross_entropy")
    return _lines((row["step"], name, row.get(name)) for row in rows for name in names)


def _distances(rows: Sequence[Row]) -> Lines:
    return _lines(
        (row["step"], name, values["activation"])
        for row in rows
        for name, values in row.get("mixers", {}).items()
    )


def _norms(rows: Sequence[Row]) -> Lines:
    return _lines(
        (row["step"], name, values["gradient_norm"])
        for row in rows
        for name, values in row.get("mixers", {}).items()
    )


def _retentions(rows: Sequence[Row]) -> Lines:
    return _lines(
        (row["step"], name, values["retention"])
        for row in rows
        for name, values in row.get("held_out", {}).items()
    )


def _lines(points: Iterable[tuple[int, str, float | None]]) -> Lines:
    lines: Lines = {}
    for step, name, value in points:
        if value is not None:
            lines.setdefault(name, []).append((step, value))
    return lines
