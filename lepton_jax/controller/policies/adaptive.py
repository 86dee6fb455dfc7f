"""The composition for somebody who does not want to think."""

from __future__ import annotations

from lepton_jax.controller.policies.averaging import averaging
from lepton_jax.controller.policies.decay import decay
from lepton_jax.controller.policies.guard import guard
from lepton_jax.controller.policies.label_noise import label_noise
from lepton_jax.controller.policies.learning_free import learning_free
from lepton_jax.controller.policy import Policy, chain


def adaptive(*, rollbacks: int = 2) -> tuple[Policy, ...]:
    """Training that needs no learning rate and no schedule: for Adam, AdamW, Lion and
    optimizers like them.

    The learning rate, whatever `Recipe.learning_rate` is, comes from these policies:

      learning_free  an estimate of the distance to the solution, from gradients and the way gone so far (Prodigy's; Mishchenko
                     & Defazio 2023), times 2. It begins at 1 % of the root mean square of the parameters,
                     may grow tenfold over the first 10 % of the run (the warm-up), and stays as it is then.
      decay          linear over the second half of the budget (Haegele et al. 2024), and to 10 % instead of 0, since
      averaging      what is evaluated and served is an average of the parameters, whose mean age is 15 % of the run so
                     far (Karras et al. 2024, section 3.1); it takes away the noise that a rate of 0 would.
      guard          keeps spikes and what is not finite out, and goes back at most `rollbacks` times where that does not help.
      label_noise    when labels become wrong, weighs samples by how likely theirs is right (Patrini et al. 2017).

    Memory: three copies of the parameters: those at the start, a weighted sum of the
    gradients, and the average.

    What it reaches, and where it falls short: `python tools/bench.py controller`,
    benchmarks/controller.json; what faults cost it: `python tools/bench.py faults`,
    benchmarks/faults.json. It looks at the training loss alone: where a model overfits,
    it stops no sooner than its budget says.

    Raises:
      RecipeError: an argument is out of range; and, when the recipe is traced, an
        optimizer that has its own learning rate or whose updates grow with the gradient
        (SGD, Adagrad).
    """
    return chain(
        guard(deviations=6.0, rollbacks=rollbacks),
        label_noise(),
        learning_free(1e-2, 2.0, growth=10.0, until=0.1),
        decay(0.5, "linear", 0.1),
        averaging(decay=None, share=0.15),
    )
