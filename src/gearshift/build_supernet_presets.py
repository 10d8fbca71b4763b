"""Presets of a supernet directory: chosen, evaluated, chosen again where needed, measured, written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.build_presets import (
    Built,
    PresetBuildError,
    Wish,
    choose_each,
    choose_together,
    choose_until_kept,
    make_wishes,
    teacher_preset,
)
from gearshift.files import read_json_lines
from gearshift.find_presets import Wishes, choose_cost, with_floors, with_measurements
from gearshift.inspect_directory import supernet_space, weight_bytes
from gearshift.placement import Placement, PlacementSpace
from gearshift.presets import Preset, write_presets
from gearshift.search import (
    CostModel,
    Surrogate,
    build_table,
    fit_costs,
    fit_surrogate,
    fit_surrogates,
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """What presets are for, and what they are chosen by.

    Attributes:
        table: evaluation rows.
        cost: rows of ``gearshift bench``.
        retentions: shares of the teacher's quality.
        contexts: context lengths among the measured ones; none means all.
        target: what the surrogate predicts.
        order: the most layers that interact; None lets the evidence choose.
        interaction_range: how far apart they may be; None lets the evidence choose.
        wishes: what every placement must keep to.
        ceiling: bytes of weights for all presets together, or None.
        cautious: whether predictions count with what they keep with a probability of 90%.
    """

    table: Path
    cost: Path
    retentions: tuple[float, ...]
    contexts: tuple[int, ...] = ()
    target: str = "-sqrt(kl)"
    order: int | None = None
    interaction_range: int | None = None
    wishes: Wishes = Wishes()
    ceiling: int | None = None
    cautious: bool = False


@dataclass(frozen=True)
class Measuring:
    """What presets are evaluated on; see `gearshift.evaluate.quality.evaluate_placements`."""

    data: Path
    tokens: int
    sequence_length: int
    device: str


def build_supernet_presets(
    supernet: Path, asked: Asked, measuring: Measuring | None
) -> tuple[Surrogate, list[Built], list[Preset]]:
    """Choose presets and write them, all-FA first, into the supernet directory.

    Returns:
        The surrogate that the last choice was made by, the choice, and the presets as written.

    Raises:
        PresetBuildError: no placement keeps a retention, or the ceiling is too low.
        GearshiftError: rows, supernet or text cannot be used; the message says which.
    """
    builder = _Builder(supernet, asked, measuring)
    if measuring is None or asked.ceiling is not None:
        built = builder.choose({})
    else:
        built = choose_until_kept(builder.choose, builder.evaluate)
    presets = [teacher_preset(builder.surrogate)]
    presets += [each.preset(builder.surrogate.table.teacher_quality) for each in built]
    steps = builder.read(asked.cost)
    if measuring is not None:
        builder.evaluate([preset.placement for preset in presets])
        steps = builder.measure(presets)
    finished = with_measurements(presets, builder.rows, steps)
    write_presets(supernet, finished)
    return builder.surrogate, built, finished


class _Builder:
    def __init__(self, supernet: Path, asked: Asked, measuring: Measuring | None) -> None:
        self.supernet, self.asked, self.measuring = supernet, asked, measuring
        self.space: PlacementSpace = supernet_space(supernet)
        self.space.teacher()
        self.rows = self.read(asked.table)
        self.costs = self._costs()
        self.wishes: list[Wish] = make_wishes(self.costs, asked.retentions)
        self.surrogate, self.floors = self._fit()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The rows of a file.

        Raises:
            PresetBuildError: it is missing or empty.
        """
        rows = read_json_lines(path) if path.exists() else []
        if not rows:
            raise PresetBuildError(
                f"{path} is missing or holds no rows; write some with gearshift evaluate or gearshift bench"
            )
        return rows

    def _costs(self) -> list[CostModel]:
        measured = list(fit_costs(self.read(self.asked.cost), self.space).values())
        contexts = self.asked.contexts or sorted({cost.context_length for cost in measured})
        return [choose_cost(measured, context) for context in contexts]

    def _fit(self) -> tuple[Surrogate, dict[str, Surrogate]]:
        asked = self.asked
        table = build_table(self.rows, self.space, asked.target)
        floors = {name: build_table(self.rows, self.space, name) for name in asked.wishes.floors}
        surrogate = fit_surrogate(table, asked.interaction_range, order=asked.order)
        return surrogate, fit_surrogates(floors)

    def choose(self, measured: Mapping[Placement, float]) -> list[Built]:
        """The placements for all wishes; with measurements, after fitting to the rows that they added."""
        if measured:
            self.surrogate, self.floors = self._fit()
        constraints = with_floors(self.asked.wishes, self.floors)
        if self.asked.ceiling is None:
            return choose_each(
                self.surrogate,
                self.wishes,
                constraints=constraints,
                measured=measured,
                cautious=self.asked.cautious,
            )
        by_mixer, shared = weight_bytes(self.supernet)
        bytes_of = np.array(
            [
                [by_mixer.get((layer, mixer), 0) for mixer in self.space.mixers]
                for layer in range(self.space.num_layers)
            ]
        )
        return choose_together(
            self.surrogate, self.wishes, bytes_of, shared, self.asked.ceiling, constraints=constraints
        )

    def evaluate(self, placements: Sequence[Placement]) -> Sequence[Row]:
        """Evaluation rows of the placements, added to the table where it lacks them."""
        from gearshift.evaluate.quality import evaluate_placements

        assert self.measuring is not None
        found = evaluate_placements(
            self.supernet,
            placements,
            self.measuring.data,
            None,
            self.asked.table,
            tokens=self.measuring.tokens,
            sequence_length=self.measuring.sequence_length,
            device=self.measuring.device,
        )
        self.rows = self.read(self.asked.table)
        return found

    def measure(self, presets: Sequence[Preset]) -> list[dict[str, Any]]:
        """Decode steps of the presets on this machine, for each workload."""
        from gearshift.bench.decode import DecodeSettings, measure_decode
        from gearshift.supernet import load_supernet
        from gearshift.train.device import choose_device

        assert self.measuring is not None
        model = load_supernet(self.supernet, device=choose_device(self.measuring.device))
        placements = [preset.placement for preset in presets]
        return [
            row
            for cost in self.costs
            for row in measure_decode(
                model, placements, [cost.context_length], DecodeSettings(batch_size=cost.batch_size)
            )
        ]
