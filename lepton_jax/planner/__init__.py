"""From a recipe to the plan that drives its program: trace, find its named axes,
search, explain, verify.
"""

from lepton_jax.planner import ahead
from lepton_jax.planner.apply import laid_out
from lepton_jax.planner.planning import candidates, plan
from lepton_jax.planner.plans import ArrayPlan, Plan, check_plan
from lepton_jax.planner.program.evaluation import (
    Evaluation,
    Prediction,
    evaluated,
    nan_rows,
)
from lepton_jax.planner.program.ranges import limits
from lepton_jax.planner.program.remat import rematerialized
from lepton_jax.planner.program.trace import Trace, trace

__all__ = [
    "ArrayPlan",
    "Evaluation",
    "Plan",
    "Prediction",
    "Trace",
    "ahead",
    "candidates",
    "check_plan",
    "evaluated",
    "laid_out",
    "limits",
    "nan_rows",
    "plan",
    "rematerialized",
    "trace",
]
