"""The augmentation of a recipe: what `Recipe.preprocess` holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from lepton_jax.augment.draws import folded, row_keys
from lepton_jax.augment.mixing import stride_of
from lepton_jax.errors import RecipeError

# Its random stream is another one than that of dropout in the same step. Any constant
# that nothing else folds in would do.
STREAM = 0xA06


class StepKey(NamedTuple):
    """The random keys of a micro-batch whose recipe augments.

    Attributes:
      model: for the model's random streams.
      batch: for the augmentation, the same for all micro-batches of a step.
      part: number of the micro-batch, int32 ().
    """

    model: Any
    batch: Any
    part: Any


def step_key(
    preprocess: Any,
    model: Any,
    step: Any,
    part: Any,
) -> Any:
    """Return the key of a micro-batch; with what the augmentation needs, if any.

    Args:
      preprocess: the recipe's.
      model: key of the model's random streams.
      step: key of the step.
      part: number of the micro-batch.
    """
    if not isinstance(preprocess, Augmented):
        return model
    part = jax.numpy.asarray(part, jax.numpy.int32)
    return StepKey(model, jax.random.fold_in(step, STREAM), part)


@dataclass(frozen=True)
class Augmented:
    """A `Recipe.preprocess` that changes samples at random in training.

    The changes are made in the compiled train step, on the devices, after `preprocess`.
    Their random numbers depend on the recipe's seed, the step, and the row of the
    sample in the batch, and on nothing else: they are the same after a resume, in
    several micro-batches, and on any number of devices.

    Attributes:
      steps: changes in their order: of `lepton_jax.augment`, or functions of keys
        (batch,) and inputs that return inputs. A step with an attribute `mixes` that is
        True is called with keys, inputs, targets and the distance of partners (see
        `mixing`), and returns inputs and targets.
      preprocess: what is done to inputs in training and outside it; None: nothing.
      outside: what is done outside of training in place of the steps, a function of
        preprocessed inputs, e.g. `partial(augment.resized, size=(64, 64))`; None:
        nothing.
      only: name of the input that the steps change, where inputs are a dict.

    Example:
      >>> import lepton_jax as lepton
      >>> from functools import partial
      >>> preprocess = lepton.augment.Augmented(
      ...     (lepton.augment.Crop(4), lepton.augment.Flip()),
      ...     partial(lepton.data.divided, by=255),
      ... )
    """

    steps: Sequence[Callable] = ()
    preprocess: Callable[[Any], Any] | None = None
    outside: Callable[[Any], Any] | None = None
    only: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        for step in self.steps:
            if not callable(step) or isinstance(step, type):
                raise RecipeError(
                    f"steps hold {step!r}, which is no function",
                    where="augment.Augmented",
                    remedy="give e.g. augment.Flip(), with its parentheses",
                )

    def __call__(self, inputs: Any) -> Any:
        """Return inputs as the model takes them outside of training."""
        inputs = self._prepared(inputs)
        if self.outside is None:
            return inputs
        return self._whole(inputs, self.outside(self._part(inputs)))

    def train(
        self,
        key: Any,
        inputs: Any,
        targets: Any,
        part: Any = 0,
        parts: int = 1,
    ) -> tuple[Any, Any]:
        """Return inputs and targets as the model and the loss take them in training.

        Args:
          key: of the step.
          inputs: a micro-batch, before `preprocess`.
          targets: its targets.
          part: number of the micro-batch, which has the rows part, part + parts, ... of
            the batch.
          parts: how many micro-batches there are.

        Returns:
          Inputs and targets; the latter are `Mixed` if a step mixes samples.

        Raises:
          RecipeError: a step can't change these inputs.
        """
        inputs = self._prepared(inputs)
        changed = self._part(inputs)
        rows = jax.tree.leaves(targets)[0].shape[0]
        keys = row_keys(key, rows, part, parts)
        for number, step in enumerate(self.steps):
            own = folded(keys, number)
            if getattr(step, "mixes", False):
                stride = stride_of(rows, parts)
                changed, targets = step(own, changed, targets, stride)
            else:
                changed = step(own, changed)
        return self._whole(inputs, changed), targets

    def _prepared(self, inputs: Any) -> Any:
        return inputs if self.preprocess is None else self.preprocess(inputs)

    def _part(self, inputs: Any) -> Any:
        if self.only is None:
            return inputs
        if not isinstance(inputs, dict) or self.only not in inputs:
            raise RecipeError(
                f"there is no input {self.only!r}",
                where="augment.Augmented",
                remedy="let `only` name one of the inputs, or leave it out",
            )
        return inputs[self.only]

    def _whole(
        self,
        inputs: Any,
        part: Any,
    ) -> Any:
        return part if self.only is None else {**inputs, self.only: part}
