"""The cost model of an engine, fitted to its measured steps: speed and memory for any workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gearshift.placement import Placement, PlacementSpace
from gearshift.search.cost_engine import CostError, Engine
from gearshift.search.cost_features import DECODE_SHARED, PER_MIXER, CostFeatures
from gearshift.search.cost_regression import PositiveFit
from gearshift.search.cost_rows import CostRows, MeasuredStep
from gearshift.search.space import Array
from gearshift.workload import Workload

# How many knees are tried at most.
_KNEES = 12
# By how much a knee must lower the mean squared error to be worth a further part.
_WORTH_A_KNEE = 0.9


@dataclass(frozen=True)
class Interval:
    """A predicted number with its 90% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, samples: Array) -> Interval:
        """From samples of what a measurement might give."""
        low, high = np.quantile(samples, [0.05, 0.95])
        return cls(value, min(value, float(low)), max(value, float(high)))

    def map(self, scale: float, inverse: bool = False) -> Interval:
        """``scale`` times the number, or ``scale`` over it."""
        if inverse:
            return Interval(scale / self.value, scale / self.high, scale / self.low)
        return Interval(scale * self.value, scale * self.low, scale * self.high)


@dataclass(frozen=True)
class CostPrediction:
    """What an engine does with one placement and workload.

    Attributes:
        batch_size: sequences decoded together.
        step_seconds: of a decode step.
        first_token_seconds: from a prompt's arrival at an idle engine to its first token; None if no prompt
            was measured.
        cache_bytes: of all sequences together, as the engine pads; None if the engine is not described.
        weight_bytes: of the whole supernet; likewise.
    """

    batch_size: int
    step_seconds: Interval
    first_token_seconds: Interval | None
    cache_bytes: int | None
    weight_bytes: int | None

    @property
    def tokens_per_second(self) -> Interval:
        """Tokens a second, all sequences together."""
        return self.step_seconds.map(self.batch_size, inverse=True)

    @property
    def seconds_per_token(self) -> Interval:
        """The cost: seconds of the engine for each generated token."""
        return self.step_seconds.map(1 / self.batch_size)


@dataclass(frozen=True)
class EngineCost:
    """A fitted cost model. It keeps its steps, so that saving it takes little and loading computes the rest.

    Attributes:
        rows: the measured steps and the engine they are of.
        knee: see `CostFeatures`.
        seed: of the error bars.
    """

    rows: CostRows
    knee: int | None = None
    seed: int = 0

    @property
    def space(self) -> PlacementSpace:
        """The placements it was measured with."""
        return self.rows.space

    @property
    def features(self) -> CostFeatures:
        """What its seconds are made of."""
        return CostFeatures(self.rows.space, self.rows.engine, self.knee)

    @cached_property
    def decode_fit(self) -> PositiveFit:
        """Of decode steps."""
        steps = self.rows.steps
        return PositiveFit(
            self.decode_features(steps), np.array([step.seconds for step in steps]), seed=self.seed
        )

    @cached_property
    def prompt_fit(self) -> PositiveFit | None:
        """Of prompts, if some were measured."""
        steps = [step for step in self.rows.steps if step.prefill_seconds is not None]
        if not steps:
            return None
        seconds = np.array([step.prefill_seconds for step in steps], dtype=np.float64)
        return PositiveFit(_by_context(steps, self._prompt_features), seconds, seed=self.seed)

    def _prompt_features(self, steps: Sequence[MeasuredStep], tokens: int) -> Array:
        return self.features.prompt([step.placement for step in steps], tokens)

    def decode_features(self, steps: Sequence[MeasuredStep]) -> Array:
        """Features (n, P) of measured steps."""
        return _by_context(steps, self._step_features)

    def _step_features(self, steps: Sequence[MeasuredStep], context: int) -> Array:
        sizes = [step.batch_size for step in steps]
        return self.features.decode([step.placement for step in steps], context, sizes)

    @cached_property
    def layer_weights(self) -> Array:
        """(mixers, PER_MIXER) fitted seconds: weights, state, token read."""
        return self.decode_fit.weights[DECODE_SHARED:].reshape(-1, PER_MIXER)

    @cached_property
    def shared_weights(self) -> Array:
        """(DECODE_SHARED,) fitted seconds: fixed, of each sequence, of each beyond the knee."""
        return self.decode_fit.weights[:DECODE_SHARED]

    def relative_errors(self, steps: Sequence[MeasuredStep]) -> Array:
        """(predicted - measured) / measured seconds (n,) of measured steps, be they fitted or held out."""
        measured = np.array([step.seconds for step in steps])
        return self.decode_fit.predict(self.decode_features(steps)) / measured - 1

    def batch_size(self, placement: Placement, workload: Workload) -> int:
        """How many sequences run together: as asked for, but never more than fit into the memory.

        Raises:
            CostError: nothing limits them, not one fits, or the engine's memory is not known.
        """
        if workload.memory_bytes is None:
            if workload.concurrency is None:
                raise CostError("neither a concurrency nor a memory for caches is given; give at least one")
            return workload.concurrency
        engine = self.known_engine()
        fit = engine.largest_batch(placement, workload.context_length, workload.memory_bytes)
        return fit if workload.concurrency is None else min(fit, workload.concurrency)

    def known_engine(self) -> Engine:
        """The engine's description.

        Raises:
            CostError: the rows had none.
        """
        if self.rows.engine is None:
            raise CostError(
                "these measurements do not say how the engine keeps caches, so memory cannot be predicted; "
                "measure again with this version of gearshift bench"
            )
        return self.rows.engine

    def predict(self, placement: Placement, workload: Workload) -> CostPrediction:
        """Predict one placement's speed and memory; a prompt of 0 tokens stands for a full context.

        Raises:
            PlacementError: it does not lie in the measured space.
            CostError: the measurements do not allow it; the message says what to measure.
        """
        self.space.check(placement)
        context, batch = workload.context_length, self.batch_size(placement, workload)
        features = self.features.decode([placement], context, [batch])
        self._check_settled(features, context, batch)
        engine = self.rows.engine
        return CostPrediction(
            batch,
            _interval(self.decode_fit, features),
            self._first_token(placement, workload.prompt_tokens or context),
            None if engine is None else batch * engine.sequence_bytes(placement, context),
            None if engine is None else engine.weight_bytes(),
        )

    def _first_token(self, placement: Placement, tokens: int) -> Interval | None:
        fit, features = self.prompt_fit, self.features.prompt([placement], tokens)
        return _interval(fit, features) if fit is not None and fit.settles(features) else None

    def _check_settled(self, features: Array, context: int, batch: int) -> None:
        if not self.decode_fit.settles(features):
            contexts = sorted({step.context_length for step in self.rows.steps})
            batches = sorted({step.batch_size for step in self.rows.steps})
            raise CostError(
                f"context {context} with batch {batch} cannot be predicted from measurements at context "
                f"{contexts} and batch {batches}; measure every mixer at two contexts and two batches"
            )

    def to_json(self) -> dict[str, Any]:
        """The JSON form; what was fitted stands there for people, and is computed again by `from_json`."""
        rows = self.rows
        return {
            "hardware": rows.hardware,
            "engine": None if rows.engine is None else rows.engine.to_json(),
            "num_layers": rows.space.num_layers,
            "mixers": list(rows.space.mixers),
            "layer_mixers": rows.space.layer_mixers,
            "knee": self.knee,
            "seed": self.seed,
            "fitted_seconds": {
                "shared": self.shared_weights.tolist(),
                **dict(zip(rows.space.mixers, self.layer_weights.tolist(), strict=True)),
            },
            "steps": [step.to_json() for step in rows.steps],
        }

    @classmethod
    def from_json(cls, given: Any) -> EngineCost:  # noqa: ANN401 - JSON is whatever the file holds
        """Read the JSON form.

        Raises:
            CostError, PlacementError, KeyError, TypeError: it is none.
        """
        steps = tuple(MeasuredStep.from_json(step) for step in given["steps"])
        if not steps:
            raise CostError("a cost model without measured steps; expected those it was fitted to")
        engine = None if given["engine"] is None else Engine.from_json(given["engine"])
        space = PlacementSpace(given["num_layers"], tuple(given["mixers"]), given["layer_mixers"])
        for step in steps:
            space.check(step.placement)
        return cls(CostRows(steps, space, given["hardware"], engine), given["knee"], given["seed"])


def fit_engine_cost(rows: CostRows, seed: int = 0) -> EngineCost:
    """Fit a cost model to measured steps; the knee is where it lowers the error most, if it does much.

    Args:
        rows: of one machine and engine.
        seed: of the error bars.
    """
    best = EngineCost(rows, None, seed)
    least = _error(best) * _WORTH_A_KNEE
    for knee in _knees(rows):
        tried = EngineCost(rows, knee, seed)
        if _error(tried) < least:
            best, least = tried, _error(tried)
    return best


def _by_context(
    steps: Sequence[MeasuredStep], features: Callable[[Sequence[MeasuredStep], int], Array]
) -> Array:
    """Features (n, P) of steps in their order, computed together for those of one context."""
    contexts = np.array([step.context_length for step in steps])
    places = [np.flatnonzero(contexts == context) for context in dict.fromkeys(contexts.tolist())]
    parts = [features([steps[row] for row in rows.tolist()], int(contexts[rows[0]])) for rows in places]
    return np.concatenate(parts)[np.argsort(np.concatenate(places))]


def _knees(rows: CostRows) -> list[int]:
    """Measured batch sizes that have some below and some above, spread over their range."""
    sizes = sorted({step.batch_size for step in rows.steps})[1:-1]
    places = np.unique(np.linspace(0, len(sizes) - 1, min(_KNEES, len(sizes))).round().astype(int))
    return [sizes[place] for place in places.tolist()]


def _error(cost: EngineCost) -> float:
    """Mean squared relative error over what is left of the freedom."""
    return float((cost.relative_errors(cost.rows.steps) ** 2).sum()) / max(cost.decode_fit.freedom, 1)


def _interval(fit: PositiveFit, features: Array) -> Interval:
    return Interval.of(float(fit.predict(features)[0]), fit.samples(features)[:, 0])
