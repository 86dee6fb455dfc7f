"""The composition for somebody who does not want to think."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lepton_jax.controller.policies.averaging import averaging
from lepton_jax.controller.policies.best_average import best_average
from lepton_jax.controller.policies.decay import decay
from lepton_jax.controller.policies.first_steps import first_steps
from lepton_jax.controller.policies.guard import guard
from lepton_jax.controller.policies.label_noise import label_noise
from lepton_jax.controller.policies.learning_free import learning_free
from lepton_jax.controller.policies.schedule_free import if_like_adam, schedule_free
from lepton_jax.controller.policy import Notice, Policy, chain

# The constants below were chosen on the tuning half of the tasks of
# `python -m tools.bench controller`, and judged on the other; see docs/controller.md.

# coefficient of `learning_free` for other optimizers than Adam and those like it. With
# 2 LAMB diverges and Lion ends at 1.7 times the reference's loss, with 0.5 LAMB hardly
# moves (lamb_mnist and lion_digits of `tools.bench controller`)
CAUTIOUS = 1.0
UNPROVEN = Notice(
    "adaptive() is for Adam and AdamW; this optimizer's rate may be several times off",
    "give optax.adamw, or compare with a learning rate and a schedule of your own",
)


def adaptive(*, rollbacks: int = 2) -> tuple[Policy, ...]:
    """Train without a learning rate and without a schedule.

    It is for Adam and AdamW; with other optimizers it works less well, and says so. The
    learning rate comes from these policies, whatever `Recipe.learning_rate` is:

      `learning_free`: an estimate of the distance to the solution, from the gradients
        and from the way that the parameters have gone so far (Prodigy's; Mishchenko &
        Defazio 2023), times 2. It begins at a thousandth of the step that would bring
        the loss to 0 if it were linear, and grows as fast as it can over the first 5 %
        of the run. After that it follows the product of gradient and way, both up and
        down.
      `schedule_free`: gradients are taken near an average of the parameters, which
        takes the place of the first moment (Defazio et al. 2024); the average is
        evaluated and served, so the rate need not fall. For other optimizers than Adam
        and those like it: `decay`, linear over the second half of the budget, and
        `averaging`. They ended at 1.02 (Muon), 1.5 (Lion) and 2.8 times (LAMB) the
        loss of a tuned cosine, and a notice says so.
      `best_average`: serves the average at which an evaluation was best.
      `guard`: keeps out spikes and values that are not finite, and asks for at most
        `rollbacks` rollbacks where that does not help.
      `label_noise`: when labels become wrong, weighs samples by how likely theirs is
        right (Patrini et al. 2017).

    Memory: four copies of the parameters, which are those at the start, a weighted sum
    of the gradients, the average, and the best average.

    Its results, and where it falls short: docs/controller.md, `python -m tools.bench
    controller --half judging`. The cost of faults under it: `python -m tools.bench
    faults --half judging`. Without evaluations it can't tell that a model overfits.

    Args:
      rollbacks: see `guard`.

    Raises:
      RecipeError: an argument is out of range. When the recipe is traced, also for an
        optimizer that has its own learning rate or whose updates grow with the gradient
        (SGD, Adagrad).

    Example:
      >>> from lepton_jax import controllers
      >>> for policy in controllers.adaptive():
      ...     print(policy.name)
      first_steps
      guard
      label_noise
      learning_free
      schedule_free
      best_average
    """
    return chain(
        first_steps(),
        guard(deviations=6.0, rollbacks=rollbacks),
        label_noise(),
        learning_free()._replace(
            fitted=if_like_adam(learning_free(coefficient=CAUTIOUS, follow=0))
        ),
        schedule_free(
            interpolation=0.8,
            share=0.2,
            otherwise=(
                decay(0.5, "linear", 0.1),
                averaging(decay=None, share=0.15),
                _unproven(),
            ),
        ),
        best_average(),
    )


def _unproven() -> Policy:
    """Tell a person that the optimizer is none for which the rate was measured."""

    def update(
        signals: Mapping[str, Any],
        state: Any,
    ) -> tuple[dict[str, Any], Any]:
        return {"notice": jnp.where(signals["step"] == 0, 1.0, 0.0)}, state

    return Policy(
        "unproven",
        lambda: (),
        update,
        watches=("step",),
        moves=("notice",),
        notices=(UNPROVEN,),
    )
