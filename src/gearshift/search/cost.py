"""The cost of one workload as a sum over layers, which is what the optimiser needs of an engine's cost model.

At a fixed number of sequences a step's seconds are such a sum exactly. Where as many sequences run as fit
into the memory, the seconds of a token are close to one (see `CostModel`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.files import read_json, write_json
from gearshift.placement import FULL_ATTENTION, Placement, PlacementError, PlacementSpace, short_name
from gearshift.search.cost_engine import CostError
from gearshift.search.cost_fit import EngineCost, fit_engine_cost
from gearshift.search.cost_rows import MeasuredStep, read_cost_rows
from gearshift.search.space import Array, mixer_indices
from gearshift.workload import Workload

FORMAT = "gearshift-cost-2"


@dataclass(frozen=True)
class CostModel:
    """Seconds at one workload: base_seconds + sum over layers.

    With a batch size the seconds are those of a decode step. Without one, as many sequences run as fit, and
    they are those of a token. With T seconds a step that do not depend on the number of sequences, S bytes of
    cache of a sequence and M bytes of memory, a token takes T * S / M and what each sequence adds; T and S
    are sums over layers, and their product is taken to first order about the middle of the space.
    `additive_error` says what that, and rounding to whole sequences and blocks, amounts to.

    Placements of one model all have the same number of layers, so that measurements cannot tell seconds that
    every layer takes from seconds outside of the layers. Both are in ``base_seconds``: a layer's cheapest
    mixer counts 0, every other one the seconds that it takes longer.

    Attributes:
        fit: the engine's cost model.
        context_length: tokens that each sequence holds.
        batch_size: sequences decoded together; 0 for as many as fit.
        memory_bytes: memory for caches, where as many run as fit; else None.
    """

    fit: EngineCost
    context_length: int
    batch_size: int
    memory_bytes: int | None = None

    @classmethod
    def of(cls, fit: EngineCost, workload: Workload) -> CostModel:
        """The cost of a workload; a concurrency counts before a memory.

        Raises:
            CostError: neither is given, or the measurements do not settle it.
        """
        if workload.concurrency is None and workload.memory_bytes is None:
            raise CostError("neither a concurrency nor a memory for caches is given; give at least one")
        memory = workload.memory_bytes if workload.concurrency is None else None
        if memory is not None:
            fit.known_engine()
        model = cls(fit, workload.context_length, workload.concurrency or 0, memory)
        model._check_settled()
        return model

    @property
    def hardware(self) -> str:
        """Where it was measured."""
        return self.fit.rows.hardware

    @property
    def measured(self) -> tuple[MeasuredStep, ...]:
        """The measured steps of this workload."""
        key = (self.context_length, self.batch_size or None, self.memory_bytes)
        return tuple(step for step in self.fit.rows.steps if step.workload == key)

    @property
    def base_seconds(self) -> float:
        """With every layer's cheapest mixer."""
        return self._parts[0]

    @cached_property
    def mixer_seconds(self) -> dict[str, float]:
        """Seconds that a layer adds, by long mixer name; the mean over layers that hold it."""
        space, added = self.fit.space, self._parts[1]
        held = np.array([[mixer in mixers for mixer in space.mixers] for mixers in space.layers])
        return dict(zip(space.mixers, (added.sum(0) / held.sum(0)).tolist(), strict=True))

    def layer_costs(self, space: PlacementSpace) -> Array:
        """Seconds (num_layers, mixers) that each layer adds with each mixer, mixers in the space's order.

        Raises:
            CostError: a mixer was not measured.
        """
        known = self.fit.space.mixers
        missing = [mixer for mixer in space.mixers if mixer not in known]
        if missing:
            raise CostError(
                f"no cost of {', '.join(missing)} at {self.describe()}; "
                "measure placements that use every mixer"
            )
        return self._parts[1][:, [known.index(mixer) for mixer in space.mixers]]

    def seconds(self, placement: Placement) -> float:
        """Predicted seconds of a decode step, or of a token where as many sequences run as fit.

        Raises:
            CostError: a mixer of the placement was not measured.
        """
        space = PlacementSpace(len(placement), tuple(placement.counts()))
        chosen = mixer_indices(space, [placement])[0]
        return self.base_seconds + float(self.layer_costs(space)[np.arange(len(placement)), chosen].sum())

    def speed_up(self, placement: Placement) -> float:
        """Predicted seconds of all-FA over those of the placement."""
        return self.seconds(Placement.uniform(FULL_ATTENTION, len(placement))) / self.seconds(placement)

    def measured_seconds(self, step: MeasuredStep) -> float:
        """A measured step in this model's unit."""
        return step.seconds if self.batch_size else step.seconds / step.batch_size

    def relative_errors(self, steps: Sequence[MeasuredStep]) -> Array:
        """(predicted - measured) / measured seconds (n,) of this workload's steps, fitted or held out."""
        return np.array([self.seconds(step.placement) / self.measured_seconds(step) - 1 for step in steps])

    def additive_error(self, placements: Sequence[Placement]) -> float:
        """The largest relative difference between this sum and the engine's full prediction."""
        workload = Workload(
            self.context_length, concurrency=self.batch_size or None, memory_bytes=self.memory_bytes
        )
        full = [self.fit.predict(placement, workload) for placement in placements]
        seconds = [p.step_seconds.value if self.batch_size else p.seconds_per_token.value for p in full]
        pairs = zip(placements, seconds, strict=True)
        return max(abs(self.seconds(placement) / exact - 1) for placement, exact in pairs)

    @cached_property
    def _parts(self) -> tuple[float, Array]:
        """Base seconds, and seconds (num_layers, mixers) beyond each layer's cheapest mixer."""
        shared, layers = self._fixed_batch() if self.batch_size else self._as_many_as_fit()
        space = self.fit.space
        held = np.array([[mixer in mixers for mixer in space.mixers] for mixers in space.layers])
        cheapest = np.where(held, layers, np.inf).min(axis=1)
        return shared + float(cheapest.sum()), np.where(held, layers - cheapest[:, None], 0.0)

    def _fixed_batch(self) -> tuple[float, Array]:
        fit, batch = self.fit, float(self.batch_size)
        shared = fit.features.decode_shared(np.array([batch])) @ fit.shared_weights
        by_part = fit.features.decode_layers(self.context_length) * fit.layer_weights
        return float(shared[0]), by_part[..., 0] + batch * by_part[..., 1:].sum(axis=-1)

    def _as_many_as_fit(self) -> tuple[float, Array]:
        """T * S / M to first order about the means (T', S'): (T' S + S' T - T' S') / M.

        Beyond the knee, `crowd` adds 1 - knee * S / M, a sum over layers already.
        """
        assert self.memory_bytes is not None
        fit, memory = self.fit, self.memory_bytes
        by_part = fit.features.decode_layers(self.context_length) * fit.layer_weights
        fixed, sequence, crowd = fit.shared_weights.tolist()
        bytes_each = fit.known_engine().layer_bytes(fit.space, self.context_length)
        middle_bytes, middle_steps = (_middle(part, fit.space) for part in (bytes_each, by_part[..., 0]))
        slope = fixed + middle_steps
        shared = sequence - middle_bytes * middle_steps / memory
        if fit.knee is not None and memory / middle_bytes > fit.knee:
            slope, shared = slope - crowd * fit.knee, shared + crowd
        layers = (slope * bytes_each + middle_bytes * by_part[..., 0]) / memory
        return shared, layers + by_part[..., 1:].sum(axis=-1)

    def _check_settled(self) -> None:
        """Refuse a workload at which some choice of a layer has no settled cost.

        Raises:
            CostError: there is one; the message names placements to measure.
        """
        fit, context = self.fit, self.context_length
        batches = [self.batch_size] if self.batch_size else [1, 2]
        space = fit.space
        swaps = [
            Placement((*space.default.mixers[:layer], mixer, *space.default.mixers[layer + 1 :]))
            for layer, mixers in enumerate(space.layers)
            for mixer in mixers[1:]
        ]
        wanted = dict.fromkeys([space.default, *swaps])
        features = [fit.features.decode(list(wanted), context, [size] * len(wanted)) for size in batches]
        if not fit.decode_fit.settles(np.concatenate(features)):
            most = ", ".join(dict.fromkeys(str(space.mostly(mixer)) for mixer in space.mixers))
            raise CostError(
                f"{len(self.measured)} measurements at {self.describe()} do not settle the "
                f"cost of every mixer; measure one placement for each that uses it most, such as {most}"
            )

    def describe(self) -> str:
        """``context 2048, batch 8``, or the memory where as many run as fit."""
        running = f"batch {self.batch_size}" if self.batch_size else f"{self.memory_bytes:,} bytes of cache"
        return f"context {self.context_length}, {running}"

    def __str__(self) -> str:
        mixers = ", ".join(
            f"{short_name(name)} {1e3 * extra:.4g}" for name, extra in self.mixer_seconds.items()
        )
        unit = "step" if self.batch_size else "token"
        text = (
            f"cost at {self.describe()}: {1e3 * self.base_seconds:.4g} ms a {unit}, "
            f"plus per layer (ms): {mixers}"
        )
        if not self.measured:
            return f"{text}; no measurement of this workload"
        errors = np.abs(self.relative_errors(self.measured))
        return (
            f"{text}; relative error on {len(errors)} measurements: "
            f"median {np.median(errors):.1%}, worst {errors.max():.1%}"
        )


def _middle(parts: Array, space: PlacementSpace) -> float:
    """The sum over layers with every mixer of a layer as likely as the others."""
    held = np.array([[mixer in mixers for mixer in space.mixers] for mixers in space.layers])
    return float((np.where(held, parts, 0.0).sum(axis=1) / held.sum(axis=1)).sum())


def fit_costs(rows: Iterable[Mapping[str, Any]], space: PlacementSpace) -> dict[tuple[int, int], CostModel]:
    """Fit an engine's cost model, and give the costs of each (context_length, batch_size) measured.

    Args:
        rows: as `gearshift bench` writes them: ``placement``, ``context_length``, ``batch_size``,
            ``seconds_per_step``, ``hardware``, and more that may be absent.
        space: where the placements must lie.

    Raises:
        CostError: there are no rows, one is wrong, they are of different machines, or do not settle every
            mixer's cost. The message names the row.
    """
    return measured_workloads(fit_engine_cost(read_cost_rows(rows, space)))


def measured_workloads(fit: EngineCost) -> dict[tuple[int, int], CostModel]:
    """The costs of each fixed (context_length, batch_size) that was measured.

    Raises:
        CostError: the measurements do not settle every mixer's cost.
    """
    sizes = {step.workload[:2] for step in fit.rows.steps if step.memory_bytes is None}
    fixed = sorted((context, batch) for context, batch in sizes if batch is not None)
    return {
        (context, batch): CostModel.of(fit, Workload(context, concurrency=batch)) for context, batch in fixed
    }


def save_costs(models: Iterable[CostModel] | EngineCost, path: Path) -> None:
    """Write an engine's cost model as JSON, given itself or what was taken from it."""
    if not isinstance(models, EngineCost):
        fits = [model.fit for model in models]
        assert all(fit == fits[0] for fit in fits), "the costs are of one engine"
        models = fits[0]
    write_json(path, {"format": FORMAT, **models.to_json()})


def load_engine_cost(path: Path) -> EngineCost:
    """Read what `save_costs` wrote.

    Raises:
        CostError: the file holds no cost model.
        FileFormatError: it is not JSON.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CostError(f'{path} holds no cost model; expected a JSON object with "format": {FORMAT!r}')
    try:
        return EngineCost.from_json(content)
    except (KeyError, TypeError, AttributeError, CostError, PlacementError) as error:
        raise CostError(f"{path} is damaged ({error}); fit the cost model again") from None


def load_costs(path: Path) -> dict[tuple[int, int], CostModel]:
    """The costs of the measured workloads, as `fit_costs` gives them; errors as of `load_engine_cost`."""
    return measured_workloads(load_engine_cost(path))
