"""Search: predict quality and cost of any placement, and find every placement that none beats in both."""

from __future__ import annotations

from gearshift.search.constraints import NO_CONSTRAINTS, ConstraintError, Constraints, Limit, layer_limit
from gearshift.search.cost import CostError, CostModel, MeasuredStep, fit_costs, load_costs, save_costs
from gearshift.search.features import FeatureSpace
from gearshift.search.frontier import Frontier, FrontierError, FrontierPoint, build_frontier, choose_presets
from gearshift.search.optimize import (
    BudgetError,
    ParetoPoint,
    best_within,
    pareto_placements,
    ranked_within,
)
from gearshift.search.program import Certified, ProgramError, best_by_program, frontier_by_program
from gearshift.search.report import FitReport, Scores
from gearshift.search.space import AdditiveScore
from gearshift.search.surrogate import Surrogate, fit_surrogate, fit_surrogates, least_rows
from gearshift.search.surrogate_file import SurrogateError, load_surrogate, save_surrogate
from gearshift.search.table import EvaluationTable, TableError, build_table
from gearshift.search.target import Target, TargetError

__all__ = [
    "NO_CONSTRAINTS",
    "Certified",
    "ConstraintError",
    "Constraints",
    "Limit",
    "ProgramError",
    "best_by_program",
    "frontier_by_program",
    "layer_limit",
    "ranked_within",
    "AdditiveScore",
    "BudgetError",
    "CostError",
    "CostModel",
    "EvaluationTable",
    "FeatureSpace",
    "FitReport",
    "Frontier",
    "FrontierError",
    "FrontierPoint",
    "MeasuredStep",
    "ParetoPoint",
    "Scores",
    "Surrogate",
    "SurrogateError",
    "TableError",
    "Target",
    "TargetError",
    "best_within",
    "build_frontier",
    "build_table",
    "choose_presets",
    "fit_costs",
    "fit_surrogate",
    "fit_surrogates",
    "least_rows",
    "load_costs",
    "load_surrogate",
    "pareto_placements",
    "save_costs",
    "save_surrogate",
]
