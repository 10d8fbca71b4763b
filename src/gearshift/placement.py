"""Placements: which mixer each layer of a supernet uses. Plain data, no torch.

A placement is written run-length in layer order, ``fa*2 swa*10 fa kda*3``, or as a JSON list of long names.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gearshift.errors import GearshiftError

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
GATED_DELTA_NET = "gated_delta_net"
KIMI_DELTA_ATTENTION = "kimi_delta_attention"
MIXERS: tuple[str, ...] = (FULL_ATTENTION, SLIDING_ATTENTION, GATED_DELTA_NET, KIMI_DELTA_ATTENTION)

# More layers than any model has: a mistyped count must not fill the memory.
MAX_LAYERS = 4096

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RUN = re.compile(r"(?P<mixer>[^*]+)(?:\*(?P<count>.*))?")
_COUNT = re.compile(r"[0-9]{1,9}")
_short_names: dict[str, str] = dict(zip(MIXERS, ("fa", "swa", "gdn", "kda"), strict=True))


class PlacementError(GearshiftError, ValueError):
    """A placement, a mixer's name or a space of placements is not what it should be."""


def known_mixers() -> tuple[str, ...]:
    """Long names of every registered mixer, the four of `MIXERS` first."""
    return tuple(_short_names)


def register_mixer_name(name: str, short: str) -> None:
    """Let a further mixer appear in placements; giving the same pair again changes nothing.

    Raises:
        PlacementError: a name is malformed, or already means another mixer.
    """
    if _short_names.get(name) == short:
        return
    for text in (name, short):
        if not _NAME.fullmatch(text):
            raise PlacementError(
                f"mixer name {text!r}: expected lower-case letters, digits and _, a letter first"
            )
        if text in _short_names or text in _short_names.values():
            raise PlacementError(
                f"mixer {name!r} with short name {short!r}: {text!r} already names the mixer "
                f"{long_name(text)!r}; choose another name (taken: {_describe_known()})"
            )
    if name == short:
        raise PlacementError(f"mixer {name!r}: the short name must differ from the long one")
    _short_names[name] = short


def short_name(name: str) -> str:
    """Short form of a mixer's name: ``full_attention`` -> ``fa``; a short name stays as it is."""
    return _short_names[long_name(name)]


def long_name(text: str) -> str:
    """Long form of a mixer's name, from either form.

    Raises:
        PlacementError: no mixer has this name.
    """
    if text in _short_names:
        return text
    for name, short in _short_names.items():
        if text == short:
            return name
    raise PlacementError(f"unknown mixer {text!r}; expected one of {_describe_known()}")


def _describe_known() -> str:
    return ", ".join(f"{short} ({name})" for name, short in _short_names.items())


@dataclass(frozen=True)
class Placement:
    """One mixer per layer, in layer order; immutable and hashable.

    Attributes:
        mixers: long names, one per layer, at least one.

    Raises:
        PlacementError: there is no layer, more than `MAX_LAYERS`, or a name that is no known long name.
    """

    mixers: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixers", tuple(self.mixers))
        if not 1 <= len(self.mixers) <= MAX_LAYERS:
            raise PlacementError(f"a placement of {len(self.mixers)} layers; expected 1 to {MAX_LAYERS}")
        for layer, mixer in enumerate(self.mixers):
            if mixer not in _short_names:
                raise PlacementError(
                    f"layer {layer}: unknown mixer {mixer!r}; expected one of {_describe_known()}"
                )

    @classmethod
    def parse(cls, text: str, num_layers: int | None = None) -> Placement:
        """Read the text form; runs are separated by blanks or commas, names may be long or short.

        Raises:
            PlacementError: a name, a count or the number of layers is wrong.
        """
        runs = re.sub(r"\s*\*\s*", "*", text.lower()).replace(",", " ").split()
        if not runs:
            raise PlacementError(f"the placement {text!r} is empty; expected runs such as 'fa*2 swa*10 kda'")
        counted = [_parse_run(run, text) for run in runs]
        total = sum(count for _, count in counted)
        _check_length(total, num_layers, text)
        return cls(tuple(mixer for mixer, count in counted for _ in range(count)))

    @classmethod
    def from_json(cls, names: object) -> Placement:
        """Read the JSON form, a list with one mixer name per layer.

        Raises:
            PlacementError: it is no such list.
        """
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise PlacementError(f"the placement {names!r}; expected a list of mixer names, one per layer")
        return cls(tuple(long_name(name) for name in names))

    @classmethod
    def uniform(cls, mixer: str, num_layers: int) -> Placement:
        """The placement with one mixer, named in either form, in every layer."""
        return cls((long_name(mixer),) * num_layers)

    @classmethod
    def of(cls, value: Placement | str | Sequence[str], num_layers: int | None = None) -> Placement:
        """Make a placement from whatever form it has.

        Raises:
            PlacementError: it cannot be read, or has another number of layers than ``num_layers``.
        """
        if isinstance(value, str):
            return cls.parse(value, num_layers)
        names = list(value) if isinstance(value, Sequence) else value
        placement = value if isinstance(value, Placement) else cls.from_json(names)
        _check_length(len(placement), num_layers, str(placement))
        return placement

    def to_json(self) -> list[str]:
        """The JSON form: long names in layer order."""
        return list(self.mixers)

    def counts(self) -> dict[str, int]:
        """How many layers each mixer has; mixers that are not used are left out."""
        return {mixer: self.mixers.count(mixer) for mixer in _short_names if mixer in self.mixers}

    def __str__(self) -> str:
        runs = ((_short_names[mixer], len(list(run))) for mixer, run in itertools.groupby(self.mixers))
        return " ".join(short if count == 1 else f"{short}*{count}" for short, count in runs)

    def __len__(self) -> int:
        return len(self.mixers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.mixers)

    def __getitem__(self, layer: int) -> str:
        return self.mixers[layer]


def _parse_run(run: str, text: str) -> tuple[str, int]:
    """``swa*10`` -> (long name, 10)."""
    match = _RUN.fullmatch(run)
    if match is None:
        raise PlacementError(
            f"{run!r} in the placement {text!r}; expected a mixer, or mixer*count such as 'swa*10'"
        )
    try:
        mixer = long_name(match["mixer"])
    except PlacementError as error:
        raise PlacementError(f"in the placement {text!r}: {error}") from None
    count = match["count"]
    if count is None:
        return mixer, 1
    if not _COUNT.fullmatch(count) or int(count) == 0:
        raise PlacementError(
            f"the count {count!r} of {run!r} in the placement {text!r}; "
            "expected a whole number of layers, at least 1"
        )
    return mixer, int(count)


def _check_length(given: int, expected: int | None, text: str) -> None:
    if expected is not None and given != expected:
        raise PlacementError(
            f"the placement {text!r} has {given} layers; expected {expected}, one mixer per layer"
        )
    if given > MAX_LAYERS:
        raise PlacementError(f"the placement {text!r} has {given} layers; expected at most {MAX_LAYERS}")


@dataclass(frozen=True)
class PlacementSpace:
    """Every placement of a number of layers over the mixers that each of them holds.

    Attributes:
        num_layers: layers of the model.
        mixers: long names of the mixers that layers hold, in the order of `known_mixers`.
        layer_mixers: for each layer the mixers that it holds, in the same order; None when each holds all.

    Raises:
        PlacementError: no layer, no mixer, a mixer named twice, an unknown one, or one that no layer holds.
    """

    num_layers: int
    mixers: tuple[str, ...] = MIXERS
    layer_mixers: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        # One order whatever the source's, since a saved config sorts its keys; equal spaces compare equal.
        object.__setattr__(self, "mixers", _in_known_order(self.mixers))
        if not 1 <= self.num_layers <= MAX_LAYERS:
            raise PlacementError(f"a space of {self.num_layers} layers; expected 1 to {MAX_LAYERS}")
        _check_held(self.mixers, "a space over")
        if self.layer_mixers is not None:
            object.__setattr__(self, "layer_mixers", self._checked_layers(self.layer_mixers))

    def _checked_layers(self, given: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...] | None:
        layers = tuple(_in_known_order(mixers) for mixers in given)
        if len(layers) != self.num_layers:
            raise PlacementError(f"the mixers of {len(layers)} layers; expected those of {self.num_layers}")
        for layer, mixers in enumerate(layers):
            _check_held(mixers, f"layer {layer} with")
        if set().union(*layers) != set(self.mixers):
            held = ", ".join(_in_known_order(set().union(*layers)))
            raise PlacementError(f"the layers hold {held}; expected exactly {', '.join(self.mixers)}")
        return layers if any(mixers != self.mixers for mixers in layers) else None

    def allowed(self, layer: int) -> tuple[str, ...]:
        """Long names of the mixers that a layer holds, in the order of `known_mixers`."""
        return self.mixers if self.layer_mixers is None else self.layer_mixers[layer]

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """The mixers that each layer holds, in layer order."""
        return self.layer_mixers or (self.mixers,) * self.num_layers

    @property
    def size(self) -> int:
        """Number of placements."""
        return math.prod(len(mixers) for mixers in self.layers)

    @property
    def default(self) -> Placement:
        """Full attention in every layer that holds it, in each other one its first mixer."""
        return Placement(tuple(mixers[0] for mixers in self.layers))

    def mostly(self, mixer: str) -> Placement:
        """``mixer`` in every layer that holds it, the default in each other one."""
        return Placement(tuple(mixer if mixer in mixers else mixers[0] for mixers in self.layers))

    def teacher(self) -> Placement:
        """Full attention in every layer.

        Raises:
            PlacementError: a layer does not hold it.
        """
        lacking = [str(layer) for layer, mixers in enumerate(self.layers) if FULL_ATTENTION not in mixers]
        if lacking:
            raise PlacementError(
                f"no {FULL_ATTENTION} in layers {', '.join(lacking)}: the teacher is none of this model's "
                "placements, and nothing can be compared with it; use the supernet that this one was made of"
            )
        return Placement.uniform(FULL_ATTENTION, self.num_layers)

    def holds(self, placement: Placement) -> bool:
        """Whether ``placement`` lies in this space."""
        return len(placement) == self.num_layers and all(
            mixer in held for mixer, held in zip(placement, self.layers, strict=True)
        )

    def check(self, placement: Placement) -> Placement:
        """Return ``placement`` if it lies in this space.

        Raises:
            PlacementError: its length or one of its mixers does not fit.
        """
        _check_length(len(placement), self.num_layers, str(placement))
        for layer, (mixer, held) in enumerate(zip(placement, self.layers, strict=True)):
            if mixer not in held:
                holder = "model" if mixer not in self.mixers else "layer"
                known = ", ".join(short_name(name) for name in (held if holder == "layer" else self.mixers))
                raise PlacementError(
                    f"the placement {str(placement)!r} has {short_name(mixer)} in layer {layer}; "
                    f"this {holder} holds only {known}"
                )
        return placement

    def all_placements(self) -> Iterator[Placement]:
        """Every placement, in the order of `itertools.product`."""
        return map(Placement, itertools.product(*self.layers))

    def sample_uniform(self, rng: random.Random) -> Placement:
        """Draw each layer's mixer uniformly and independently."""
        if self.layer_mixers is None:
            return Placement(tuple(rng.choices(self.mixers, k=self.num_layers)))
        return Placement(tuple(rng.choice(mixers) for mixers in self.layer_mixers))

    def sample_composition(self, rng: random.Random) -> Placement:
        """Draw uniformly how many layers each mixer gets, then shuffle the layers.

        Drawing per layer almost never gives an extreme placement; this gives all counts the same chance. The
        counts come from "stars and bars": mixers - 1 bars among layers + mixers - 1 slots. Where not every
        layer holds every mixer, the mixers' shares are drawn instead, uniformly among all shares (a flat
        Dirichlet distribution), and each layer draws among the mixers it holds with these weights.
        """
        if self.layer_mixers is not None:
            shares = {mixer: rng.expovariate(1.0) for mixer in self.mixers}
            return Placement(
                tuple(
                    rng.choices(mixers, weights=[shares[mixer] for mixer in mixers])[0]
                    for mixers in self.layer_mixers
                )
            )
        slots = self.num_layers + len(self.mixers) - 1
        bars = sorted(rng.sample(range(slots), len(self.mixers) - 1))
        edges = [-1, *bars, slots]
        counts = [right - left - 1 for left, right in itertools.pairwise(edges)]
        layers = [mixer for mixer, count in zip(self.mixers, counts, strict=True) for _ in range(count)]
        rng.shuffle(layers)
        return Placement(tuple(layers))


def _in_known_order(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(map(long_name, names), key=known_mixers().index))


def _check_held(mixers: tuple[str, ...], what: str) -> None:
    if not mixers or len(set(mixers)) != len(mixers):
        raise PlacementError(f"{what} the mixers {list(mixers)}; expected at least one, each once")
