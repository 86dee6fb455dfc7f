"""From a recipe to the plan that drives its program: trace, then decide."""

from lepton_jax.planner.plan import ArrayPlan, Plan, plan
from lepton_jax.planner.trace import Trace, trace

__all__ = ["ArrayPlan", "Plan", "Trace", "plan", "trace"]
