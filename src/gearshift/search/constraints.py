"""What a placement must keep to besides its budget: counts of mixers, fixed layers, further limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gearshift.errors import GearshiftError
from gearshift.placement import Placement, PlacementSpace, long_name, short_name
from gearshift.search.space import AdditiveScore, Array

# By how much of its size a limit may be exceeded: what the order of additions does to a sum.
_ROUNDING = 1e-9


class ConstraintError(GearshiftError, ValueError):
    """Constraints that no placement meets, or that make no sense for the model."""


@dataclass(frozen=True, eq=False)
class Limit:
    """A ceiling for a further score of placements, such as memory, or a floor, such as for recall.

    Attributes:
        name: for messages.
        score: what is limited.
        bound: the most, or the least, that it may be.
        floor: whether ``bound`` is the least.
    """

    name: str
    score: AdditiveScore
    bound: float
    floor: bool = False

    @property
    def sign(self) -> float:
        """-1 for a floor: the score times this must be at most ``most``."""
        return -1.0 if self.floor else 1.0

    @property
    def most(self) -> float:
        """The ceiling of sign * score, with room for rounding."""
        return self.sign * self.bound + _ROUNDING * max(1.0, abs(self.bound))

    def met(self, placement: Placement) -> bool:
        """Whether a placement keeps to it."""
        return bool(self.sign * self.score.values([placement])[0] <= self.most)

    def __str__(self) -> str:
        return f"{self.name} of at {'least' if self.floor else 'most'} {self.bound:g}"


@dataclass(frozen=True, eq=False)
class Constraints:
    """What every placement must keep to; the default allows all.

    Attributes:
        at_least: the fewest layers with a mixer, by its name in either form.
        at_most: the most layers with a mixer.
        fixed: a layer's mixer, by the layer's number from 0.
        limits: ceilings and floors of further scores.
    """

    at_least: Mapping[str, int] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[int, str] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        for name in ("at_least", "at_most"):
            by_mixer = {long_name(mixer): count for mixer, count in getattr(self, name).items()}
            object.__setattr__(self, name, by_mixer)
        object.__setattr__(self, "fixed", {layer: long_name(mixer) for layer, mixer in self.fixed.items()})

    def __str__(self) -> str:
        return ", ".join(self._parts()) or "no constraints"

    def _parts(self) -> Iterator[str]:
        for kind, counts in (("at least", self.at_least), ("at most", self.at_most)):
            yield from (f"{kind} {count} {short_name(mixer)}" for mixer, count in counts.items())
        yield from (f"{short_name(mixer)} in layer {layer}" for layer, mixer in self.fixed.items())
        yield from map(str, self.limits)

    def met(self, placement: Placement) -> bool:
        """Whether a placement keeps to all of them."""
        counts = placement.counts()
        return (
            all(counts.get(mixer, 0) >= count for mixer, count in self.at_least.items())
            and all(counts.get(mixer, 0) <= count for mixer, count in self.at_most.items())
            and all(placement[layer] == mixer for layer, mixer in self.fixed.items())
            and all(limit.met(placement) for limit in self.limits)
        )

    def allowed(self, space: PlacementSpace) -> NDArray[np.bool_]:
        """Which mixers each layer may have, (num_layers, mixers).

        Raises:
            ConstraintError: a layer or a mixer is none of the model's, or counts cannot be met.
        """
        held = np.array([[mixer in mixers for mixer in space.mixers] for mixers in space.layers])
        for layer, mixer in self.fixed.items():
            if not 0 <= layer < space.num_layers or mixer not in space.layers[layer]:
                raise ConstraintError(
                    f"layer {layer} is to have {short_name(mixer)}; "
                    f"expected a layer from 0 to {space.num_layers - 1} and a mixer that it holds"
                )
            held[layer] = [mixer == other for other in space.mixers]
        self._check_counts(space, held)
        return held

    def _check_counts(self, space: PlacementSpace, allowed: NDArray[np.bool_]) -> None:
        for mixer, count in (*self.at_least.items(), *self.at_most.items()):
            if mixer not in space.mixers or count < 0:
                known = ", ".join(short_name(name) for name in space.mixers)
                raise ConstraintError(
                    f"a count of {count} for {short_name(mixer)}; expected at least 0, and one of {known}"
                )
        for number, mixer in enumerate(space.mixers):
            able, bound = int(allowed[:, number].sum()), int((allowed.sum(axis=1) == 1) @ allowed[:, number])
            least, most = self.at_least.get(mixer, 0), self.at_most.get(mixer, able)
            if least > able or most < bound or least > most:
                raise ConstraintError(
                    f"{self}: {able} layers can have {short_name(mixer)}, {bound} can have nothing else; "
                    "ask for counts between these"
                )
        if sum(self.at_least.values()) > space.num_layers:
            raise ConstraintError(
                f"{self}: the counts add up to {sum(self.at_least.values())} layers; "
                f"the model has {space.num_layers}"
            )

    def without_one(self) -> Iterator[tuple[str, Constraints]]:
        """The constraints without each of them in turn, and what was left out."""
        for name in ("at_least", "at_most", "fixed"):
            given = getattr(self, name)
            for key, value in given.items():
                rest = {other: kept for other, kept in given.items() if other != key}
                yield str(replace(NO_CONSTRAINTS, **{name: {key: value}})), replace(self, **{name: rest})
        for left_out in self.limits:
            rest = tuple(limit for limit in self.limits if limit is not left_out)
            yield str(left_out), replace(self, limits=rest)


NO_CONSTRAINTS = Constraints()


def layer_limit(name: str, space: PlacementSpace, per_layer: Array, bound: float) -> Limit:
    """A ceiling for a sum over layers, such as bytes of caches, from an array (num_layers, mixers)."""
    return Limit(name, AdditiveScore.of_layers(space, per_layer), bound)
