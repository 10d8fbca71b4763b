"""The surrogate: predicts a placement's quality from evaluated placements, with an error bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.model_selection import KFold

from gearshift.placement import Placement, PlacementSpace
from gearshift.search.features import FeatureGroup, FeatureSpace, Indices
from gearshift.search.regression import (
    COMPARED_ROWS,
    Hyperparameters,
    Kernels,
    Posterior,
    choose,
    fit_posterior,
    tune,
)
from gearshift.search.report import FitReport, Scores
from gearshift.search.space import AdditiveScore, Array, mixer_indices
from gearshift.search.table import EvaluationTable, TableError

# Order and range of the interactions that are tried when the caller does not say them.
_ORDERS = (1, 2, 3)
_RANGES = (1, 3)
# Steps of the tuning of a cross-validation's part, which starts where the whole table's ended.
_FOLD_STEPS = 15


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A fitted surrogate. It keeps its table, so that saving it takes little and refitting it nothing else.

    Attributes:
        table: the evaluated placements.
        posterior: the weights and their uncertainty.
        report: what the fit is worth.
    """

    table: EvaluationTable
    posterior: Posterior
    report: FitReport

    @property
    def score(self) -> AdditiveScore:
        """The prediction as sums over clusters of layers, for the optimisers."""
        return self.posterior.score

    @property
    def teacher_value(self) -> float:
        """Value of all-FA: as evaluated if it was, else as predicted.

        Raises:
            PlacementError: a layer holds no full attention.
        """
        if self.table.teacher_value is not None:
            return self.table.teacher_value
        return float(self.predict([self.table.space.teacher()])[0][0])

    def predict(self, placements: Sequence[Placement]) -> tuple[Array, Array]:
        """Mean and standard deviation (n,) of the target's value for the placements.

        Raises:
            PlacementError: a placement does not lie in the surrogate's space.
        """
        return self.posterior.predict(mixer_indices(self.table.space, placements))

    def retention(self, value: float) -> float:
        """Retention that belongs to a value of the target."""
        return self.table.target.retention(value, self.teacher_value)

    def assess(self, held_out: EvaluationTable) -> Scores:
        """Compare predictions with a table that the surrogate did not see.

        Raises:
            TableError: the tables share a placement, or differ in checkpoint, data, target or space.
        """
        _check_comparable(self.table, held_out)
        return Scores.of(held_out.values, *self.predict(held_out.placements))


def fit_surrogate(
    table: EvaluationTable,
    interaction_range: int | None = None,
    *,
    order: int | None = None,
    held_out: EvaluationTable | None = None,
    folds: int = 10,
    seed: int = 0,
) -> Surrogate:
    """Fit a surrogate and say in its report what it is worth.

    Args:
        table: evaluated placements.
        interaction_range: how far apart layers may interact; None lets the evidence choose none, 1 or 3.
        order: the most layers that interact with one another; None lets the evidence choose, up to 3.
        held_out: placements to judge the fit by that are not in the table.
        folds: parts of the cross-validation.
        seed: of the cross-validation's split.

    Raises:
        TableError: too few rows, values that are all the same, or a held-out table that does not fit the
            other.
    """
    _check_enough(table)
    if held_out is not None:
        _check_comparable(table, held_out)
    candidates = candidate_features(table.space, order, interaction_range)
    chosen = mixer_indices(table.space, table.placements)
    kernels = _kernels(candidates, chosen)
    tuned = choose(candidates, kernels, table.values)
    posterior = _posterior(table, chosen, kernels, tuned)
    report = FitReport(
        len(table),
        tuned.order,
        tuned.interaction_range,
        _cross_validate(table, chosen, kernels, tuned, folds, seed),
    )
    surrogate = Surrogate(table, posterior, report)
    if held_out is None:
        return surrogate
    return replace(surrogate, report=replace(report, held_out=surrogate.assess(held_out)))


def fit_surrogates(
    tables: Mapping[str, EvaluationTable], interaction_range: int | None = None, *, order: int | None = None
) -> dict[str, Surrogate]:
    """Fit a surrogate for each of several objectives, such as likelihood and recall, by name.

    Raises:
        TableError: as for `fit_surrogate`; the message names the objective.
    """
    found = {}
    for name, table in tables.items():
        try:
            found[name] = fit_surrogate(table, interaction_range, order=order)
        except TableError as error:
            raise TableError(f"{name}: {error}") from None
    return found


def refit(table: EvaluationTable, tuned: Hyperparameters, report: FitReport) -> Surrogate:
    """The surrogate with these hyper-parameters, such as a file holds them.

    Raises:
        KeyError: the hyper-parameters lack a group of features.
    """
    features = FeatureSpace(table.space, tuned.order, tuned.interaction_range)
    chosen = mixer_indices(table.space, table.placements)
    return Surrogate(table, _posterior(table, chosen, features.kernels(chosen, chosen), tuned), report)


def candidate_features(
    space: PlacementSpace, order: int | None = None, interaction_range: int | None = None
) -> list[FeatureSpace]:
    """The feature spaces to choose from, the simplest first; each once, however small the space."""
    orders = _ORDERS if order is None else (order,)
    ranges = _RANGES if interaction_range is None else (interaction_range,)
    found: dict[tuple[FeatureGroup, ...], FeatureSpace] = {}
    for order in orders:
        for reach in ranges:
            features = FeatureSpace(space, order, reach)
            found.setdefault(features.groups, features)
    return list(found.values())


def _kernels(candidates: Sequence[FeatureSpace], chosen: Indices) -> Kernels:
    """The kernels of every group of any candidate, each made once."""
    found: dict[FeatureGroup, Array] = {}
    for features in sorted(candidates, key=lambda features: -len(features.groups)):
        if not found.keys() >= set(features.groups):
            found |= features.kernels(chosen, chosen)
    return found


def _posterior(
    table: EvaluationTable, chosen: Indices, kernels: Kernels, tuned: Hyperparameters
) -> Posterior:
    features = FeatureSpace(table.space, tuned.order, tuned.interaction_range)
    return fit_posterior(features, kernels, chosen, table.values, tuned)


def least_rows(space: PlacementSpace) -> int:
    """Fewest evaluated placements that a fit accepts: half of the effects of single layers, at least 10."""
    return max(10, sum(len(mixers) - 1 for mixers in space.layers) // 2)


def _check_enough(table: EvaluationTable) -> None:
    least = least_rows(table.space)
    if len(table) < least:
        raise TableError(
            f"{len(table)} distinct placements were evaluated; expected at least {least} for "
            f"{table.space.num_layers} layers with {len(table.space.mixers)} mixers, and four times that "
            "many are better; evaluate more placements"
        )
    if np.ptp(table.values) == 0:
        raise TableError(
            f"every placement has the value {table.values[0]:g} of {table.target}; there is nothing to "
            "learn, so choose another target"
        )


def _check_comparable(table: EvaluationTable, held_out: EvaluationTable) -> None:
    for name in ("space", "target", "checkpoint", "data"):
        mine, other = getattr(table, name), getattr(held_out, name)
        if mine != other:
            raise TableError(
                f"the held-out table has the {name} {other}, the fitted one {mine}; expected the same"
            )
    shared = set(table.placements) & set(held_out.placements)
    if shared:
        raise TableError(
            f"{len(shared)} held-out placements were fitted too, such as {min(map(str, shared))}; "
            "expected placements that the fit has not seen"
        )


def _cross_validate(
    table: EvaluationTable, chosen: Indices, kernels: Kernels, tuned: Hyperparameters, folds: int, seed: int
) -> Scores:
    """Predict each part of the table by a fit to the others.

    Scales and noise are tuned anew where the table is small enough for a part to move them; the order and the
    range of the interactions are kept.
    """
    features = FeatureSpace(table.space, tuned.order, tuned.interaction_range)
    means, stds = np.empty(len(table)), np.empty(len(table))
    for kept, left_out in KFold(folds, shuffle=True, random_state=seed).split(table.values):
        values = table.values[kept]
        own = {group: kernels[group][np.ix_(kept, kept)] for group in features.groups}
        fold = tuned
        if len(table) <= COMPARED_ROWS:
            fold = tune(features, own, values, tuned, _FOLD_STEPS)
        posterior = fit_posterior(features, own, chosen[kept], values, fold)
        means[left_out], stds[left_out] = posterior.predict(chosen[left_out])
    return Scores.of(table.values, means, stds)
