"""The surrogate: predicts a placement's quality from evaluated placements, with an error bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import KFold

from gearshift.errors import GearshiftError
from gearshift.files import read_json, write_json
from gearshift.placement import Placement, PlacementSpace
from gearshift.search.regression import Hyperparameters, Posterior, choose_hyperparameters, fit_posterior
from gearshift.search.report import FitReport, Scores
from gearshift.search.space import AdditiveScore, Array, FeatureSpace
from gearshift.search.table import EvaluationTable, TableError
from gearshift.search.target import Target

FORMAT = "gearshift-surrogate-1"

# Tried when the caller does not say how far layers interact.
_RANGES = (0, 1)


class SurrogateError(GearshiftError, ValueError):
    """A surrogate's file is not what it should be."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A fitted surrogate. It keeps its table, so that saving it takes little and refitting it nothing else.

    Attributes:
        table: the evaluated placements.
        hyperparameters: what the evidence chose.
        report: what the fit is worth.
    """

    table: EvaluationTable
    hyperparameters: Hyperparameters
    report: FitReport

    @cached_property
    def features(self) -> FeatureSpace:
        """The features it is linear in."""
        return FeatureSpace(self.table.space, self.hyperparameters.interaction_range)

    @cached_property
    def posterior(self) -> Posterior:
        """The weights and their uncertainty."""
        features = self.features.features(self.table.placements)
        return fit_posterior(features, self.table.values, self.features, self.hyperparameters)

    @cached_property
    def score(self) -> AdditiveScore:
        """The prediction as sums over layers and pairs of layers, for the dynamic program."""
        return self.features.score(self.posterior.intercept, self.posterior.weights)

    @cached_property
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
        return self.posterior.predict(self.features.features(placements))

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
    held_out: EvaluationTable | None = None,
    folds: int = 10,
    seed: int = 0,
) -> Surrogate:
    """Fit a surrogate and say in its report what it is worth.

    Args:
        table: evaluated placements.
        interaction_range: how far apart layers may interact; None lets the evidence choose 0 or 1.
        held_out: placements to judge the fit by that are not in the table.
        folds: parts of the cross-validation, which repeats every choice for each part.
        seed: of the cross-validation's split.

    Raises:
        TableError: too few rows, values that are all the same, or a held-out table that does not fit the
            other.
    """
    _check_enough(table)
    if held_out is not None:
        _check_comparable(table, held_out)
    ranges = _RANGES if interaction_range is None else (interaction_range,)
    candidates = [FeatureSpace(table.space, reach) for reach in ranges]
    chosen = choose_hyperparameters(table.placements, table.values, candidates)
    report = FitReport(len(table), chosen.interaction_range, _cross_validate(table, candidates, folds, seed))
    surrogate = Surrogate(table, chosen, report)
    if held_out is None:
        return surrogate
    scores = surrogate.assess(held_out)
    return Surrogate(table, chosen, FitReport(**{**vars(report), "held_out": scores}))


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
    table: EvaluationTable, candidates: Sequence[FeatureSpace], folds: int, seed: int
) -> Scores:
    means, stds = np.empty(len(table)), np.empty(len(table))
    for kept, left_out in KFold(folds, shuffle=True, random_state=seed).split(table.values):
        placements = [table.placements[row] for row in kept]
        chosen = choose_hyperparameters(placements, table.values[kept], candidates)
        space = FeatureSpace(table.space, chosen.interaction_range)
        posterior = fit_posterior(space.features(placements), table.values[kept], space, chosen)
        unseen = space.features([table.placements[row] for row in left_out])
        means[left_out], stds[left_out] = posterior.predict(unseen)
    return Scores.of(table.values, means, stds)


def save_surrogate(surrogate: Surrogate, path: Path) -> None:
    """Write a surrogate as JSON: its table and what was chosen; loading computes the rest again."""
    table = surrogate.table
    content = {
        "format": FORMAT,
        "num_layers": table.space.num_layers,
        "mixers": list(table.space.mixers),
        "layer_mixers": table.space.layer_mixers,
        "target": str(table.target),
        "checkpoint": table.checkpoint,
        "data": table.data,
        "teacher_quality": table.teacher_quality,
        "placements": [str(placement) for placement in table.placements],
        "values": table.values.tolist(),
        "hyperparameters": asdict(surrogate.hyperparameters),
        "report": surrogate.report.to_json(),
    }
    write_json(path, content)


def load_surrogate(path: Path) -> Surrogate:
    """Read what `save_surrogate` wrote; predictions are the same.

    Raises:
        SurrogateError: the file is not a surrogate.
        FileFormatError: it is not JSON.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SurrogateError(f'{path} is not a surrogate; expected a JSON object with "format": {FORMAT!r}')
    try:
        return _from_json(content)
    except (KeyError, TypeError, ValueError) as error:
        raise SurrogateError(f"{path} is damaged ({error!r}); fit the surrogate again") from None


def _from_json(content: dict[str, Any]) -> Surrogate:
    table = EvaluationTable(
        PlacementSpace(content["num_layers"], tuple(content["mixers"]), content.get("layer_mixers")),
        Target.parse(content["target"]),
        tuple(Placement.parse(text, content["num_layers"]) for text in content["placements"]),
        np.array(content["values"], dtype=np.float64),
        content["checkpoint"],
        content["data"],
        content["teacher_quality"],
    )
    if len(table.placements) != len(table.values):
        raise ValueError(f"{len(table.placements)} placements but {len(table.values)} values")
    report = FitReport.from_json(content["report"])
    return Surrogate(table, Hyperparameters(**content["hyperparameters"]), report)
