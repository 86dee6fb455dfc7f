"""Why a model predicts what it does.

explain.integrated_gradients(trainer, rows)   shares that add up to the output
explain.occlusion(artifact, rows)             by how much it falls without a part
explain.attention_rollout(trainer, rows)      which tokens reach the last layer
explain.permutation_importance(trainer)       how much worse without a column
explain.nearest_examples(trainer, rows)       training rows that look alike to it
explain.explain(artifact, rows, "occlusion")  one of these as plain data
explain.write_explanations(trainer, folder)   in the run's report
"""

from lepton_jax.ship.explain.answers import METHODS, OF_ARTIFACTS, explain
from lepton_jax.ship.explain.attribution import Attribution
from lepton_jax.ship.explain.gradients import integrated_gradients
from lepton_jax.ship.explain.neighbours import Neighbours, nearest_examples
from lepton_jax.ship.explain.occlusion import occlusion
from lepton_jax.ship.explain.permutation import Importance, permutation_importance
from lepton_jax.ship.explain.pictures import heat_map, write_explanations
from lepton_jax.ship.explain.rollout import Rollout, attention_rollout

__all__ = [
    "METHODS",
    "OF_ARTIFACTS",
    "Attribution",
    "Importance",
    "Neighbours",
    "Rollout",
    "attention_rollout",
    "explain",
    "heat_map",
    "integrated_gradients",
    "nearest_examples",
    "occlusion",
    "permutation_importance",
    "write_explanations",
]
