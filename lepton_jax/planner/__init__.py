"""From a recipe to the plan that drives its program.

The arrows are `trace` (the recipe's program and its named axes), `plan` (the search)
and `laid_out` (the plan's constraints in the traced program).
"""

from lepton_jax.planner import ahead, rewrite
from lepton_jax.planner.apply import laid_out
from lepton_jax.planner.planning import candidates, plan
from lepton_jax.planner.plans import ArrayPlan, Plan
from lepton_jax.planner.program.evaluation import (
    Evaluation,
    Prediction,
    evaluated,
    nan_rows,
)
from lepton_jax.planner.program.ranges import limits
from lepton_jax.planner.program.remat import rematerialized
from lepton_jax.planner.program.trace import Trace, trace
from lepton_jax.planner.resized_plans import resized
from lepton_jax.planner.rewrite.rule import rule
from lepton_jax.planner.show.html import html
from lepton_jax.planner.show.text import text

__all__ = [
    "ArrayPlan",
    "Evaluation",
    "Plan",
    "Prediction",
    "Trace",
    "ahead",
    "candidates",
    "evaluated",
    "laid_out",
    "limits",
    "nan_rows",
    "plan",
    "rematerialized",
    "resized",
    "rewrite",
    "rule",
    "trace",
]

Plan.renderers |= {"text": text, "html": html}
