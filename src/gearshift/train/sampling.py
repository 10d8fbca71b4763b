"""Which placement a student takes: a pure function of the seed and of where the run stands. No torch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gearshift.errors import GearshiftError
from gearshift.placement import FULL_ATTENTION, Placement, PlacementSpace
from gearshift.train.recipe import SamplingPhase


class SamplingError(GearshiftError, ValueError):
    """A recipe's placements do not fit the supernet, or are none that can be trained."""


@dataclass(frozen=True)
class Sampler:
    """Draws the placements of a stage.

    Attributes:
        space: what to draw from; it must hold a mixer besides full attention.
        phases: the recipe's, with weights for each way of drawing.
        presets: for each phase the placements that its ``presets`` name.
        seed: the run's seed.
        trains_attention: all-FA may be drawn; otherwise it is the teacher and has nothing to train.
    """

    space: PlacementSpace
    phases: tuple[SamplingPhase, ...]
    presets: tuple[Mapping[str, Placement], ...]
    seed: int
    trains_attention: bool = False

    @classmethod
    def of(
        cls,
        space: PlacementSpace,
        phases: Sequence[SamplingPhase],
        names: Mapping[str, str],
        seed: int,
        trains_attention: bool = False,
    ) -> Sampler:
        """A sampler of a recipe's phases; ``names`` are the recipe's names for placements.

        Raises:
            PlacementError: a placement does not fit the space.
            SamplingError: one is the teacher itself.
        """
        presets = tuple(
            {text: named_placement(space, text, names) for text in phase.presets} for phase in phases
        )
        for text, placement in ((t, p) for phase in presets for t, p in phase.items()):
            if not trains_attention and set(placement) == {FULL_ATTENTION}:
                raise SamplingError(
                    f"sampling.presets has {text!r}, which is the teacher: there is nothing to train in it; "
                    "leave it out, or give trained: mixers_and_attention"
                )
        return cls(space, tuple(phases), presets, seed, trains_attention)

    def draw(self, step: int, micro_batch: int, draw: int = 0, run_step: int | None = None) -> Placement:
        """Draw the placement of one student pass.

        The generator starts anew for every draw, so a resumed run, or another number of processes, sees the
        same placements without any saved state.

        Args:
            step: of the stage, from 1: it chooses the phase.
            micro_batch: within the step, over all processes, from 0.
            draw: the placement within the micro-batch, from 0.
            run_step: of the run, from 1: it seeds; ``step`` if None.
        """
        # Seeding by text hashes it with SHA-512: the same on every platform, and close seeds share nothing.
        rng = random.Random(f"{self.seed}/{run_step or step}/{micro_batch}/{draw}")
        index = next(i for i, phase in enumerate(self.phases) if phase.until is None or step <= phase.until)
        phase, presets = self.phases[index], self.presets[index]
        assert phase.presets or self.trains_attention or set(self.space.mixers) != {FULL_ATTENTION}
        ways = ["uniform", "composition", *phase.presets]
        weights = [phase.uniform, phase.composition, *phase.presets.values()]
        way = rng.choices(ways, weights)[0] if sum(map(bool, weights)) > 1 else _only(ways, weights)
        if way in presets:
            return presets[way]
        sample = self.space.sample_uniform if way == "uniform" else self.space.sample_composition
        while True:
            placement = sample(rng)
            if self.trains_attention or set(placement) != {FULL_ATTENTION}:
                return placement


def named_placement(space: PlacementSpace, text: str, names: Mapping[str, str]) -> Placement:
    """The placement that a recipe means by a name or a text.

    Raises:
        PlacementError: it is neither, or does not fit the space.
    """
    return space.check(Placement.parse(names.get(text, text), space.num_layers))


def _only(ways: Sequence[str], weights: Sequence[float]) -> str:
    return next(way for way, weight in zip(ways, weights, strict=True) if weight)
