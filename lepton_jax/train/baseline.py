"""Baselines of a recipe: fitted within a time, compared, and told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from lepton_jax.baselines import (
    BaselineFunction,
    Comparison,
    Network,
    NotHere,
    Samples,
    majority,
)
from lepton_jax.errors import DataError, LeptonError
from lepton_jax.recipe import Recipe
from lepton_jax.train.judged import Judged

# Seconds that one baseline may take where nobody says; assumption: a person waits so
# long at the end of a run.
SECONDS = 120.0


def functions_of(recipe: Recipe, judged: Judged) -> tuple[BaselineFunction, ...]:
    """Return a recipe's baselines; the least one where it has none and it applies."""
    given = recipe.baseline
    if given is not None:
        return (given,) if callable(given) else tuple(given)
    applies = judged.samples.task != "other" and bool(recipe.metrics)
    return (majority,) if applies else ()


def compare(
    recipe: Recipe,
    judged: Judged,
    read_training: Callable[[], Samples],
    seconds: float = SECONDS,
) -> list[Comparison]:
    """Fit each baseline, and compare the network with it.

    One that fails, or takes too long, is a comparison that says why.

    Args:
      recipe: of the network.
      judged: test rows with the network's outputs.
      read_training: returns rows to fit on.
      seconds: that each may take.
    """
    functions = functions_of(recipe, judged)
    if not functions:
        return []
    # without a metric it is the loss by which they are compared
    metrics = recipe.metrics or {"loss": recipe.loss}
    network = Network(
        metrics,
        judged.outputs,
        judged.samples,
    )
    return [
        one(
            function,
            network,
            read_training,
            seconds,
        )
        for function in functions
    ]


def one(
    function: BaselineFunction,
    network: Network,
    read_training: Callable[[], Samples],
    seconds: float,
) -> Comparison:
    """Fit one baseline within a time, and compare the network with it."""
    samples = network.samples
    results: list[Comparison] = []
    began = time.monotonic()

    def made(name: str, fitted: str = "", **fields: Any) -> Comparison:
        spent = time.monotonic() - began
        return Comparison(
            name,
            fitted,
            len(samples),
            samples.total,
            spent,
            **fields,
        )

    def work() -> None:
        # whatever it raises is a person's to read; the run's result stands without it
        try:
            baseline = function(read_training(), samples)
            compared = network.against(baseline)
            results.append(
                made(
                    baseline.name,
                    baseline.fitted,
                    compared=compared,
                )
            )
        except Exception as error:
            results.append(
                made(
                    name_of(function),
                    failed=reason_of(error),
                )
            )

    # A thread can't be ended from outside. As a daemon it does not hold up the process.
    thread = threading.Thread(
        target=work,
        name="baseline",
        daemon=True,
    )
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    return made(name_of(function), failed=f"it took longer than {seconds:g} s")


def name_of(function: Any) -> str:
    """Return the name of a baseline's function, as a person reads it."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(
        function,
        "__name__",
        type(function).__name__,
    )
    return name.strip("_").replace("_", " ")


def reason_of(error: Exception) -> str:
    """Return why a baseline failed, in one line."""
    if isinstance(error, NotHere):
        return str(error)
    if isinstance(error, ImportError):
        package = "scikit-learn" if error.name == "sklearn" else error.name
        return f"{package} is not installed: pip install 'lepton-jax[recipes]'"
    text = (
        error.what
        if isinstance(
            error,
            LeptonError,
        )
        else str(error)
    )
    first = text.strip().partition("\n")[0]
    kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
    return f"{kind}{first}"
