"""The cost model: seconds of a decode step, as a sum over layers fitted to measurements.

What the optimiser needs of a cost is `base_seconds` and `layer_costs`; any cost that is additive over layers
has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from gearshift._checks import check_keys, is_count, is_number
from gearshift.errors import GearshiftError
from gearshift.files import read_json, write_json
from gearshift.placement import FULL_ATTENTION, Placement, PlacementError, PlacementSpace, short_name
from gearshift.search.space import Array, mixer_indices

FORMAT = "gearshift-cost-1"

_KEYS = ("placement", "context_length", "batch_size", "seconds_per_step", "hardware")


class CostError(GearshiftError, ValueError):
    """Measurements that no cost model can be fitted to, or a file that is none."""


@dataclass(frozen=True)
class MeasuredStep:
    """A measured decode step.

    Attributes:
        placement: what ran.
        seconds: of one step, in which every sequence of the batch gets one token.
    """

    placement: Placement
    seconds: float

    @classmethod
    def from_json(cls, given: object) -> MeasuredStep:
        """Read the JSON form.

        Raises:
            CostError: a key is missing or unknown, or the seconds are no positive number.
        """
        values = check_keys(cls, given, "a measured step", CostError)
        if not is_number(values["seconds"]) or values["seconds"] <= 0:
            raise CostError(f"seconds = {values['seconds']!r}; expected a finite number above 0")
        return cls(Placement.parse(values["placement"]), values["seconds"])

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {"placement": str(self.placement), "seconds": self.seconds}


@dataclass(frozen=True)
class CostModel:
    """Seconds of a decode step at one context length and batch size: base_seconds + sum over layers.

    Placements of one model all have the same number of layers, so that measurements cannot tell seconds that
    every layer takes from seconds outside of the layers. Both are in ``base_seconds``: the cheapest mixer
    counts 0, every other one the seconds that it takes longer.

    Attributes:
        context_length: tokens that each sequence holds.
        batch_size: sequences decoded together.
        base_seconds: of a step with the cheapest mixer in every layer.
        mixer_seconds: seconds that a layer adds, by long mixer name; none negative.
        hardware: where it was measured.
        measured: the steps it was fitted to.
    """

    context_length: int
    batch_size: int
    base_seconds: float
    mixer_seconds: dict[str, float]
    hardware: str
    measured: tuple[MeasuredStep, ...]

    def __str__(self) -> str:
        mixers = ", ".join(
            f"{short_name(name)} {1e3 * extra:.4g}" for name, extra in self.mixer_seconds.items()
        )
        errors = np.abs(self.relative_errors(self.measured))
        return (
            f"cost at context {self.context_length}, batch {self.batch_size}: {1e3 * self.base_seconds:.4g} "
            f"ms a step, plus per layer (ms): {mixers}; relative error on {len(errors)} measurements: "
            f"median {np.median(errors):.1%}, worst {errors.max():.1%}"
        )

    def layer_costs(self, space: PlacementSpace) -> Array:
        """Seconds (num_layers, mixers) that each layer adds with each mixer, mixers in the space's order.

        Raises:
            CostError: a mixer was not measured.
        """
        missing = [mixer for mixer in space.mixers if mixer not in self.mixer_seconds]
        if missing:
            raise CostError(
                f"no cost of {', '.join(missing)} at context {self.context_length}, batch {self.batch_size}; "
                "measure placements that use every mixer"
            )
        return np.tile([self.mixer_seconds[mixer] for mixer in space.mixers], (space.num_layers, 1))

    def seconds(self, placement: Placement) -> float:
        """Predicted seconds of a decode step.

        Raises:
            CostError: a mixer of the placement was not measured.
        """
        space = PlacementSpace(len(placement), tuple(placement.counts()))
        chosen = mixer_indices(space, [placement])[0]
        return self.base_seconds + float(self.layer_costs(space)[np.arange(len(placement)), chosen].sum())

    def speed_up(self, placement: Placement) -> float:
        """Predicted seconds of all-FA over those of the placement."""
        return self.seconds(Placement.uniform(FULL_ATTENTION, len(placement))) / self.seconds(placement)

    def relative_errors(self, steps: Sequence[MeasuredStep]) -> Array:
        """(predicted - measured) / measured seconds (n,) of measured steps, be they fitted or held out."""
        return np.array([self.seconds(step.placement) / step.seconds - 1 for step in steps])

    @classmethod
    def from_json(cls, given: object) -> CostModel:
        """Read the JSON form.

        Raises:
            CostError: a key is missing or unknown, or a value is wrong.
        """
        values = check_keys(cls, given, "a cost model", CostError)
        seconds = [values["base_seconds"], *values["mixer_seconds"].values()]
        if not all(is_number(number) and number >= 0 for number in seconds):
            raise CostError(f"the seconds {seconds}; expected finite numbers, at least 0")
        steps = tuple(MeasuredStep.from_json(step) for step in values["measured"])
        if not steps:
            raise CostError("a cost model without measured steps; expected those it was fitted to")
        return cls(**{**values, "measured": steps})

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**vars(self), "measured": [step.to_json() for step in self.measured]}


def fit_costs(rows: Iterable[Mapping[str, Any]], space: PlacementSpace) -> dict[tuple[int, int], CostModel]:
    """Fit one cost model for each (context_length, batch_size) among the measurements.

    Args:
        rows: as `gearshift bench decode` writes them: ``placement``, ``context_length``, ``batch_size``,
            ``seconds_per_step``, ``hardware``.
        space: where the placements must lie.

    Raises:
        CostError: there are no rows, one is wrong, they are of different machines, or do not settle every
            mixer's cost. The message names the row.
    """
    groups: dict[tuple[int, int], list[MeasuredStep]] = {}
    hardware: str | None = None
    for number, row in enumerate(rows, start=1):
        workload, step, machine = _read_row(number, row, space)
        hardware = machine if hardware is None else hardware
        if machine != hardware:
            raise CostError(
                f"measurement {number} is of {machine!r}, those before of {hardware!r}; expected one machine"
            )
        groups.setdefault(workload, []).append(step)
    if hardware is None:
        raise CostError("there are no measurements; run the decode benchmark first")
    return {workload: _fit(workload, steps, space, hardware) for workload, steps in sorted(groups.items())}


def _read_row(
    number: int, row: Mapping[str, Any], space: PlacementSpace
) -> tuple[tuple[int, int], MeasuredStep, str]:
    """((context_length, batch_size), step, hardware) of a row; ``number`` is for messages."""
    missing = [key for key in _KEYS if key not in row]
    if missing:
        raise CostError(f"measurement {number} has no {missing[0]!r}; it has {sorted(row)}")
    what = f"measurement {number} ({row['placement']})"
    try:
        placement = space.check(Placement.of(row["placement"]))
    except PlacementError as error:
        raise CostError(f"{what}: {error}") from None
    workload, seconds = (row["context_length"], row["batch_size"]), row["seconds_per_step"]
    if not all(is_count(size, 1) for size in workload):
        raise CostError(
            f"{what}: context_length and batch_size are {workload}; expected whole numbers, at least 1"
        )
    if not is_number(seconds) or seconds <= 0:
        raise CostError(f"{what}: seconds_per_step = {seconds!r}; expected a finite number above 0")
    return workload, MeasuredStep(placement, float(seconds)), str(row["hardware"])


def _fit(
    workload: tuple[int, int], steps: Sequence[MeasuredStep], space: PlacementSpace, hardware: str
) -> CostModel:
    """Least squares of the relative errors, no cost negative."""
    chosen = mixer_indices(space, [step.placement for step in steps])
    counts = (chosen[:, :, None] == np.arange(len(space.mixers))).sum(axis=1).astype(np.float64)
    if np.linalg.matrix_rank(counts) < _effects(space):
        most = ", ".join(dict.fromkeys(str(space.mostly(mixer)) for mixer in space.mixers))
        raise CostError(
            f"{len(steps)} measurements at context {workload[0]}, batch {workload[1]} do not settle the "
            f"cost of every mixer; measure one placement for each that uses it most, such as {most}"
        )
    seconds = np.array([step.seconds for step in steps])
    per_layer, _ = nnls(counts / seconds[:, None], np.ones(len(steps)))
    cheapest = per_layer.min()
    extra = dict(zip(space.mixers, (per_layer - cheapest).tolist(), strict=True))
    return CostModel(*workload, float(cheapest) * space.num_layers, extra, hardware, tuple(steps))


def _effects(space: PlacementSpace) -> int:
    """How many costs the placements of a space can tell apart: those of its mixers, where layers choose.

    Two mixers that never compete for a layer, not even through a third one, have a difference of cost that
    no placement shows and no choice depends on.
    """
    unit = dict(zip(space.mixers, np.eye(len(space.mixers)), strict=True))
    swaps = [unit[other] - unit[mixers[0]] for mixers in set(space.layers) for other in mixers[1:]]
    return int(np.linalg.matrix_rank(np.stack([np.ones(len(space.mixers)), *swaps])))


def save_costs(models: Iterable[CostModel], path: Path) -> None:
    """Write cost models as JSON."""
    write_json(path, {"format": FORMAT, "models": [model.to_json() for model in models]})


def load_costs(path: Path) -> dict[tuple[int, int], CostModel]:
    """Read what `save_costs` wrote: cost models by (context_length, batch_size).

    Raises:
        CostError: the file holds no cost models.
        FileFormatError: it is not JSON.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CostError(f'{path} holds no cost models; expected a JSON object with "format": {FORMAT!r}')
    try:
        models = [CostModel.from_json(model) for model in content["models"]]
    except (KeyError, TypeError, AttributeError, CostError, PlacementError) as error:
        raise CostError(f"{path} is damaged ({error}); fit the cost models again") from None
    return {(model.context_length, model.batch_size): model for model in models}
