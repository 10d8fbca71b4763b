"""A surrogate as a file: its table and what was chosen; loading computes the rest again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.errors import GearshiftError
from gearshift.files import read_json, write_json
from gearshift.placement import Placement, PlacementSpace
from gearshift.search.regression import Hyperparameters
from gearshift.search.report import FitReport
from gearshift.search.surrogate import Surrogate, refit
from gearshift.search.table import EvaluationTable
from gearshift.search.target import Target

FORMAT = "gearshift-surrogate-2"


class SurrogateError(GearshiftError, ValueError):
    """A surrogate's file is not what it should be."""


def save_surrogate(surrogate: Surrogate, path: Path) -> None:
    """Write a surrogate as JSON."""
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
        "hyperparameters": asdict(surrogate.posterior.hyperparameters),
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
    return refit(table, Hyperparameters(**content["hyperparameters"]), report)
