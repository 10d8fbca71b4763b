"""A plan in the form in which a person reads it: layers that are alike once, with their count."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gearshift.convert.plan import Plan, PlannedTensor
from gearshift.tensor_headers import TensorInfo

# The layer's number is the first number among a name's parts, in every family.
_LAYER = re.compile(r"^(.*?\.)(\d+)\.(.*)$")
_MIXER = re.compile(r"^mixers\.(\w+)\.(.*)$")


@dataclass(frozen=True)
class PlanRow:
    """One tensor of a group.

    Attributes:
        mixer: the mixer that it belongs to, if any.
        name: within the mixer, or within the layer.
        sources: names within the source's layer.
        how: ``copied``, or the recipe.
        info: shape and dtype.
    """

    mixer: str | None
    name: str
    sources: tuple[str, ...]
    how: str
    info: TensorInfo


@dataclass(frozen=True)
class PlanGroup:
    """Layers that are alike, or what stands outside the layers.

    Attributes:
        layers: their numbers; empty for what stands outside.
        rows: the tensors of each of them.
    """

    layers: tuple[int, ...]
    rows: tuple[PlanRow, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one layer."""
        return sum(row.info.nbytes for row in self.rows)

    @property
    def title(self) -> str:
        """Such as ``layers 0-2, 5 (4 alike)``."""
        if not self.layers:
            return "outside the layers"
        if len(self.layers) == 1:
            return f"layer {self.layers[0]}"
        return f"layers {_runs(self.layers)} ({len(self.layers)} alike)"


def plan_groups(plan: Plan) -> list[PlanGroup]:
    """The groups of a plan's tensors, but for the extra ones; what stands outside the layers first."""
    by_layer: dict[int, list[PlanRow]] = {}
    for step in plan.steps:
        for tensor in step.tensors:
            by_layer.setdefault(_layer(tensor.name), []).append(_row(tensor))
    alike: dict[tuple[PlanRow, ...], list[int]] = {}
    for layer in sorted(by_layer):
        alike.setdefault(tuple(by_layer[layer]), []).append(layer)
    return [PlanGroup(tuple(n for n in layers if n >= 0), rows) for rows, layers in alike.items()]


def _layer(name: str) -> int:
    """Number of the layer; -1 outside of all."""
    match = _LAYER.match(name)
    return int(match[2]) if match else -1


def _row(tensor: PlannedTensor) -> PlanRow:
    name = _within_layer(tensor.name)
    match = _MIXER.match(name)
    mixer, name = (match[1], match[2]) if match else (None, name)
    return PlanRow(mixer, name, tuple(map(_within_layer, tensor.sources)), tensor.how, tensor.info)


def _within_layer(name: str) -> str:
    match = _LAYER.match(name)
    return match[3] if match else name


def _runs(numbers: Iterable[int]) -> str:
    """Ascending numbers as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
