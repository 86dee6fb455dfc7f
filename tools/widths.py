"""Find the best learning rate of a language model in three widths.

    python tools/widths.py --out benchmarks/widths-cpu.json

Each width is trained at each rate on the text of `recipes/lm.py`: once with the rate as
it is, and once with `adapt.by_width`, of which the narrowest is the base. A rate
transfers if the best one of each width is the same.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax import adapt
from lepton_jax.step.module import functional
from recipes import lm

WIDTHS = (32, 64, 128)
HEAD = 16  # width of a head of attention, the same in each model
LAYERS = 2
LENGTH = 64
BATCH = 16
RATES = tuple(2.0**-n for n in range(11, 4, -1))
LAST = 0.2  # share of the steps whose losses are averaged


def recipe(width: int, vocab: int, optimizer: str) -> lepton.Recipe:
    """Return the recipe of one width."""
    own: Any = optax.adam
    if optimizer == "muon":
        own = partial(optax.contrib.muon, adam_b1=0.9)
    model = partial(
        lepton.models.TransformerLM,
        vocab=vocab,
        dim=width,
        layers=LAYERS,
        heads=width // HEAD,
        hidden=4 * width,
    )
    return lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=own,
        learning_rate=RATES[0],
    )


def losses(own: lepton.Recipe, batches: Any) -> list[float]:
    """Train at each rate, all at once, and return the mean losses of the last steps."""
    module = functional(own.model, jax.eval_shape(lambda: batches[0, :, :-1]))
    key = jax.random.key(0)
    params, variables = module.init(key)

    def loss(params: Any, batch: Any) -> Any:
        inputs = batch[:, :-1]
        logits, _, _ = module.apply(params, variables, inputs, key, True, None)
        return own.loss(logits, batch[:, 1:]).mean()

    def trained(rate: Any) -> Any:
        optimizer = own.optimizer(rate)

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        begin = params, optimizer.init(params)
        return jax.lax.scan(step, begin, batches)[1]

    values = jax.jit(lambda rates: jax.lax.map(trained, rates))(jnp.array(RATES))
    last = values[:, -round(LAST * len(batches)) :].mean(1)
    return [round(float(value), 4) for value in last]


def main() -> None:
    """Train each width at each rate, with and without transfer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--optimizer", choices=("adam", "muon"), default="adam")
    parser.add_argument("--out", type=Path, help="a JSON file for the losses")
    options = parser.parse_args()
    tokens, vocab = lm._characters(lm._embedded())
    places = np.random.default_rng(0).integers(
        0, len(tokens) - LENGTH - 1, (options.steps, BATCH, 1)
    )
    batches = jnp.asarray(tokens[places + np.arange(LENGTH + 1)])
    base = recipe(WIDTHS[0], vocab, options.optimizer).model
    rows = []
    for transferred in (False, True):
        for width in WIDTHS:
            own = recipe(width, vocab, options.optimizer)
            if transferred and width != WIDTHS[0]:
                own = adapt.by_width(own, base)
            found = losses(own, batches)
            best = RATES[int(np.nanargmin(found))]
            row = {"transferred": transferred, "width": width, "best_rate": best}
            rows.append(row | {"losses": found})
            print(rows[-1], flush=True)
    if options.out is not None:
        settings = {"optimizer": options.optimizer, "steps": options.steps}
        record = settings | {"rates": RATES, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
