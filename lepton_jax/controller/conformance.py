"""The laws that a policy keeps, and a suite that checks any policy: `conformance`.

Example:
  >>> from lepton_jax import controllers
  >>> print(controllers.conformance(controllers.warmup(), steps=20, runs=False))
  warmup keeps the laws
    declared  1 policies, 40 steps each
    pure      1 policies, 40 steps each
    stable    1 policies, 40 steps each
    in range  1 policies, 40 steps each
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import lepton_jax.controller.knobs as knobs_
from lepton_jax import losses
from lepton_jax.checkpoint import Checkpoints
from lepton_jax.compat import jit_on, make_mesh
from lepton_jax.controller.core import Controller
from lepton_jax.controller.policy import Policy, chain
from lepton_jax.controller.signals import SIGNALS, norm
from lepton_jax.controller.state import Pieces, with_measurements
from lepton_jax.errors import LeptonError, RecipeError
from lepton_jax.recipe import Recipe
from lepton_jax.step.optimizers import switchable
from lepton_jax.step.precision import cast
from lepton_jax.step.state import State
from lepton_jax.step.training_loss import differentiated_sum
from lepton_jax.trees import by_path

LAWS = {
    "declared": (
        "it reads the signals that it watches, moves the knobs in `moves`, and returns"
        " (moves, state)"
    ),
    "pure": (
        "same signals and state, same moves and state; neither is written to; under jit"
        " as without"
    ),
    "stable": (
        "its state keeps structure, shapes and dtypes, and its leaves are scalars"
    ),
    "in range": (
        "its contributions are finite and within the knob's range, whatever the signals"
        " are, NaN and infinity included"
    ),
    "trains": (
        "small runs in float32, in float16, and in bfloat16 with accumulation work, and"
        " its state stays replicated"
    ),
    "resumes": "a run that goes on from a checkpoint is the undisturbed one to the bit",
    "off": (
        "a run in which all its contributions are neutral is the run without it to"
        " the bit"
    ),
}
# values that a signal of a run that went wrong may have
WILD = (
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -0.0,
    1e38,
    -1e38,
    1e-38,
    -1.0,
)
# signals that the step counts itself, and which are never wild
COUNTED = ("step", "updates", "batch_size")
# the small runs: samples of a batch on each device, their width and classes
ROWS = 16
WIDTH = 4
CLASSES = 3
# their steps before and after a checkpoint, and in lower precisions
STEPS = 7
STEPS_LOW = 6
STEPS_OFF = 10
# steps without jit, which take as long as hundreds with it
EAGER = 12


@dataclass(frozen=True)
class Conformance:
    """The laws that policies keep.

    Attributes:
      names: the policies' names.
      kept: (law, extent of its check) of each law.
    """

    names: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        title = f"{', '.join(self.names)} keeps the laws"
        return "\n".join(
            [title, *(f"  {law:<10}{extent}" for law, extent in self.kept)]
        )


def conformance(
    *policies: Any,
    steps: int = 200,
    seed: int = 0,
    runs: bool = True,
) -> Conformance:
    """Check that policies keep the laws on which step, checkpoints and replay rely.

    It is one line in anybody's tests.

    Args:
      *policies: policies, or chains of them. Each is checked alone; small runs are made
        with all of them.
      steps: the length of each sequence of made-up signals.
      seed: the seed of these sequences.
      runs: whether to train small models too, on all the devices that there are.

    Raises:
      RecipeError: a law is broken; its name comes first in the message.
    """
    chained = chain(*policies)
    for policy in chained:
        with _breaking("declared", policy):
            _check_declaration(policy)
        for wild in (False, True):
            rows = list(_signals(policy, steps, seed, wild))
            _check_sequence(policy, rows, wild)
    extent = f"{len(chained)} policies, {2 * steps} steps each"
    kept = [(law, extent) for law in ("declared", "pure", "stable", "in range")]
    if runs:
        kept += _check_runs(chained)
    return Conformance(tuple(p.name for p in chained), tuple(kept))


# ---- one policy alone ----


def _check_declaration(policy: Policy) -> None:
    for name in policy.moves:
        knobs_.known(name, policy.name)
    named = isinstance(policy.name, str) and policy.name != ""
    _require(
        named and ":" not in policy.name,
        "declared",
        policy,
        f"its name is {policy.name!r}",
        "give it a name without a colon",
    )
    for kind, names in (("moves", policy.moves), ("watches", policy.watches)):
        _require(
            len(set(names)) == len(names),
            "declared",
            policy,
            f"a name stands twice in {kind}",
            "name each once",
        )


def _signals(
    policy: Policy,
    steps: int,
    seed: int,
    wild: bool,
) -> Iterator[dict[str, Any]]:
    """Make up the signals of a run that learns, with spikes.

    If `wild`, a third of the values are not numbers, or huge, and each signal has each
    value in `WILD` at least once.
    """
    rng = np.random.default_rng(seed)
    for step in range(steps):
        values = _ordinary(step, steps, rng)
        row = {name: values.get(name, rng.lognormal()) for name in policy.watches}
        if wild:
            row = _made_wild(row, step, rng)
        yield {name: jnp.float32(x) for name, x in row.items()}


def _ordinary(
    step: int,
    steps: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Return the signals of a step whose usual size is not about 1."""
    spike = 50
    loss = 3 * math.exp(-step / 60) + 0.1 * rng.random()
    loss += (rng.random() < 0.02) * spike
    return {
        "step": step,
        "updates": step,
        "progress": (step + 1) / steps,
        "batch_size": 32,
        "loss": loss,
        "loss_kept": loss,
        "loss_blank": 1.1,
        "loss_values": 1.0,
        "mark_weight": 1 / (1 + loss / 50),
        "mark_weight_square": 1 / (1 + loss / 25),
        "loss_mean": loss,
        "loss_variance": 0.01,
        "loss_trend": -loss / 60,
        "finite": 1.0,
        "evaluations": step // 20,
        "seconds": step / 10,
        "price": step / 1e3,
        "data_wait": 0.1,
        "cosine": rng.uniform(-1, 1),
    }


def _made_wild(
    row: dict[str, float],
    step: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    # at first, each wild value in turn in every second step; then any of them
    in_turn = step % 2 == 0 and step < 4 * len(WILD)
    wild = {}
    for index, name in enumerate(row):
        turn = WILD[(step // 2 + index) % len(WILD)]
        wild[name] = turn if in_turn else rng.choice(WILD)

    def is_kept(name: str) -> bool:
        return name in COUNTED or (step % 2 == 1 and rng.random() > 1 / 3)

    return {name: x if is_kept(name) else wild[name] for name, x in row.items()}


class _Watched(Mapping):
    """The signals of a step; only watched ones can be read, and none written."""

    def __init__(
        self,
        values: Mapping[str, Any],
        policy: Policy,
    ):
        self.values_ = values
        self.policy = policy

    def __getitem__(self, name: str) -> Any:
        _require(
            name in self.values_,
            "declared",
            self.policy,
            f"it reads the signal {name!r}, which it does not watch",
            "name it in Policy.watches",
        )
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def _check_sequence(
    policy: Policy,
    rows: list[dict[str, Any]],
    wild: bool,
) -> None:
    """Follow a policy through signals: under jit, eagerly, and once more."""
    start = _first_state(policy)
    update = _checked_update(policy, start)
    with _breaking("pure", policy):
        jitted = _followed(jax.jit(update), rows, start)
    for step, (moves, _) in enumerate(jitted):
        for knob, value in moves.items():
            _check_range(policy, knob, float(value), step, wild)
    # where values lie on a threshold, eager rounding may decide otherwise: only
    # ordinary ones are compared
    if not wild:
        _check_purity(policy, update, rows[:EAGER], start, jitted)


def _first_state(policy: Policy) -> Any:
    with _breaking("stable", policy):
        start = jax.tree.map(jnp.asarray, policy.init())
        again = jax.tree.map(jnp.asarray, policy.init())
    _require(
        _same(start, again),
        "pure",
        policy,
        "init made another state the second time",
        "let init depend on nothing",
    )
    for path, leaf in by_path(start).items():
        _require(
            leaf.shape == (),
            "stable",
            policy,
            f"its state's {path or 'leaf'} has shape {leaf.shape}",
            "keep scalars",
        )
    return start


def _checked_update(
    policy: Policy,
    start: Any,
) -> Callable[[Any, Any], Any]:
    """Return the policy's update, which checks its result and completes its moves."""

    def update(
        values: Mapping[str, Any],
        state: Any,
    ) -> Any:
        result = policy.update(_Watched(values, policy), state)
        pair = isinstance(result, tuple) and len(result) == 2
        _require(
            pair and isinstance(result[0], Mapping),
            "declared",
            policy,
            f"update returned {type(result).__name__}",
            "return (a dict of moves, state)",
        )
        moves, after = result
        surplus = sorted(set(moves) - set(policy.moves))
        _require(
            not surplus,
            "declared",
            policy,
            f"it moves {', '.join(surplus)}",
            "name every knob in Policy.moves",
        )
        _check_stability(policy, start, after)
        contributions = {
            knob: jnp.asarray(moves.get(knob, knobs_.neutral(knob)), jnp.float32)
            for knob in policy.moves
        }
        return contributions, jax.tree.map(jnp.asarray, after)

    return update


def _check_purity(
    policy: Policy,
    update: Callable,
    rows: list[dict[str, Any]],
    start: Any,
    jitted: list[Any],
) -> None:
    """Check that each step comes out the same again, eagerly and traced."""
    with _breaking("pure", policy):
        eager = _followed(update, rows, start)
        repeated = _followed(update, rows, start)
        # another function object, so that JAX traces it again
        traced = _followed(
            jax.jit(lambda *a: update(*a)),
            rows,
            start,
        )
    for step in range(len(rows)):
        comparisons = (
            ("the second time", eager, repeated, True),
            ("when it was traced again", traced, jitted, True),
            ("under jit", eager, jitted, False),
        )
        for how, left, right, exact in comparisons:
            _require(
                _same(left[step], right[step], exact),
                "pure",
                policy,
                f"step {step} came out otherwise {how}",
                "let update depend on its arguments alone, and write to nothing outside"
                " of it",
            )


def _followed(
    update: Callable,
    rows: list[dict[str, Any]],
    state: Any,
) -> list[Any]:
    """Return the (moves, state) of each step."""
    results = []
    for row in rows:
        moves, state = update(dict(row), state)
        results.append((moves, state))
    return jax.device_get(results)


def _check_stability(
    policy: Policy,
    before: Any,
    after: Any,
) -> None:
    old: Any = jax.tree.structure(before)
    new = jax.tree.structure(after)
    _require(
        old == new,
        "stable",
        policy,
        f"its state changed from {old} to {new}",
        "return a state of init's form",
    )
    pairs = zip(
        by_path(before).items(),
        jax.tree.leaves(after),
        strict=True,
    )
    for (path, b), leaf in pairs:
        a = jnp.asarray(leaf)
        _require(
            (a.shape, a.dtype) == (b.shape, b.dtype),
            "stable",
            policy,
            f"its state's {path or 'leaf'} changed from {b.dtype}{list(b.shape)} to"
            f" {a.dtype}{list(a.shape)}",
            "return a state of the shapes and dtypes that init made",
        )


def _check_range(
    policy: Policy,
    knob: str,
    value: float,
    step: int,
    wild: bool,
) -> None:
    kind = "signals that are partly not finite" if wild else "ordinary signals"
    _require(
        _is_in_range(policy, knob, value),
        "in range",
        policy,
        f"it contributes {value} to {knob} in step {step} of {kind}",
        "guard against signals that are not finite, e.g. with"
        " jnp.where(jnp.isfinite(x), ...), and clip to the range",
    )


def _is_in_range(
    policy: Policy,
    knob: str,
    value: float,
) -> bool:
    kind = knobs_.KNOBS[knob]
    within = math.isnan(value) or kind.lowest <= value <= kind.highest
    if policy.absolute:
        return within or kind.combine in ("any", "least")
    if kind.combine == "multiply":
        return math.isfinite(value) and value >= 0
    if kind.combine == "least":  # infinity is neutral
        return value >= kind.lowest
    if kind.combine == "set":
        return within
    return math.isfinite(value)


# ---- small runs with all of them ----


def _check_runs(policies: tuple[Policy, ...]) -> list[tuple[str, str]]:
    names = ", ".join(p.name for p in policies)
    with _breaking("trains", names):
        run = _SmallRun(policies)
        state = run.train(STEPS)
        _SmallRun(policies, precision="float16").train(STEPS_LOW)
        accumulating = (_accumulating(), *policies)
        low = _SmallRun(accumulating, precision="bfloat16", micro_batches=2)
        low.train(STEPS_LOW)
    devices = f"{jax.device_count()} devices"
    extent = f"float32, float16, bfloat16 with accumulation; {devices}"
    kept = [("trains", extent)]

    with _breaking("resumes", names):
        _check_resumption(run, state, names)
    kept.append(("resumes", f"{STEPS} + {STEPS} steps"))

    # absolute ones have no neutral contribution that the core would know
    if not any(p.absolute for p in policies):
        with _breaking("off", names):
            _check_silence(policies, names)
        kept.append(("off", f"{STEPS_OFF} steps"))
    return kept


def _accumulating() -> Policy:
    return Policy(
        "accumulating",
        lambda: (),
        lambda signals, state: ({"accumulate": jnp.float32(2)}, state),
        moves=("accumulate",),
    )


def _check_resumption(
    run: _SmallRun,
    state: State,
    names: str,
) -> None:
    undisturbed = run.train(STEPS, state)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(STEPS, state, {})
        checkpoints.wait()
        restored, _ = checkpoints.restore(STEPS, jax.tree.map(_shape, state))
        checkpoints.close()
    _require(
        _same(run.train(STEPS, restored), undisturbed),
        "resumes",
        names,
        "after a checkpoint the run went on otherwise",
        "keep all that a decision depends on in the policy's state",
    )


def _check_silence(
    policies: tuple[Policy, ...],
    names: str,
) -> None:
    """Check that neutral contributions change nothing."""
    silent = tuple(_silent(policy) for policy in policies)
    off = _SmallRun(silent, like=policies).train(STEPS_OFF)
    plain = _SmallRun((), like=policies).train(STEPS_OFF)
    _require(
        _same((off.params, off.optimizer), (plain.params, plain.optimizer)),
        "off",
        names,
        "with neutral contributions the run is another than without it",
        "report this: it is a fault of the core",
    )


def _silent(policy: Policy) -> Policy:
    """Return a policy that does its work, but contributes nothing."""

    def update(
        signals: Mapping[str, Any],
        state: Any,
    ) -> tuple[dict[str, Any], Any]:
        moves, after = policy.update(signals, state)
        # a condition that never holds, and that XLA does not know
        neutral = {
            knob: jnp.where(
                jnp.float32(x) > jnp.inf,
                x,
                knobs_.neutral(knob),
            )
            for knob, x in moves.items()
        }
        return neutral, after

    return policy._replace(update=update)


class _SmallRun:
    """Runs of a linear classifier on made-up data; batches lie over all devices.

    Args:
      policies: the policies.
      precision: as in `Recipe`.
      micro_batches: as in `Recipe`.
      like: policies whose knobs the run has; None: those of `policies`.
    """

    def __init__(
        self,
        policies: tuple[Policy, ...],
        precision: str = "float32",
        micro_batches: int = 1,
        like: Any = None,
    ):
        moved = {knob for policy in like or policies for knob in policy.moves}
        self.dropout = "dropout" in moved
        self.names = ", ".join(p.name for p in policies)
        self.parts = micro_batches
        self.recipe = Recipe(
            model=dict,
            loss=optax.softmax_cross_entropy,
            optimizer=_optimizer(moved),
            learning_rate=0.01,
            metrics=dict.fromkeys(_metrics(policies), np.mean),
            controller=policies,
            batch_size=ROWS * jax.device_count(),
            precision=precision,
            micro_batches=micro_batches,
        )
        self.controller = Controller(self.recipe)
        mesh = make_mesh({"data": jax.device_count()}, jax.devices())
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.rows = NamedSharding(mesh, PartitionSpec(None, "data"))
        self.step = jit_on(
            jax.devices(),
            self._step,
            donate_argnums=(),
            out_shardings=self.replicated,
        )

    def train(
        self,
        steps: int,
        state: Any = None,
    ) -> Any:
        """Return the state after some steps, replicated as before."""
        if state is None:
            state = with_measurements(
                self._begin(),
                steps=2.0 * STEPS,
                evaluations=1.0,
                evaluation_loss=1.0,
            )
        places = jax.tree.map(lambda x: x.sharding, state)
        for _ in range(steps):
            batch = jax.device_put(self._batch(int(state.step)), self.rows)
            state = self.step(state, *batch)
            jax.block_until_ready(state)
        self._check_places(state, places)
        finite = [
            np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params))
        ]
        _require(
            all(finite),
            "trains",
            self.names,
            f"the parameters are not finite after {steps} steps of"
            f" {self.recipe.precision}",
            "look at its contributions",
        )
        return state

    def _check_places(
        self,
        state: State,
        places: Any,
    ) -> None:
        same = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim),
            state.controller,
            places.controller,
        )
        _require(
            all(jax.tree.leaves(same)),
            "trains",
            self.names,
            "the controller's state lies otherwise on the devices",
            "keep scalars",
        )

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and one-hot targets, (micro-batches, samples, ...)."""
        rng = np.random.default_rng(step)
        shape = (
            self.parts,
            self.recipe.batch_size // self.parts,
            WIDTH,
        )
        x = rng.normal(size=shape).astype(np.float32)
        labels = x[..., :CLASSES].argmax(-1)
        return x, np.eye(CLASSES, dtype=np.float32)[labels]

    def _begin(self) -> State:
        params = {
            "kernel": jnp.full(
                (WIDTH, CLASSES),
                0.1,
                jnp.float32,
            ),
            "bias": jnp.zeros(CLASSES, jnp.float32),
        }
        optimizer, controller = self.controller.init(params, {})
        state = State(
            step=jnp.int32(0),
            params=params,
            variables={},
            optimizer=optimizer,
            controller=controller,
            key=jax.random.key(0),
        )
        return jax.device_put(state, self.replicated)

    def _step(
        self,
        state: State,
        inputs: Any,
        targets: Any,
    ) -> State:
        knobs = {}
        if state.controller != ():
            knobs = self.controller.forward_knobs(state.controller)
        gradients, values = self._gradients(state, knobs, inputs, targets)
        means = _mean_of_trees(values)
        parts = None
        if self.controller.signals.by_micro_batch:
            parts = sum(norm(g) ** 2 for g in gradients) / len(gradients)

        after, controller, _ = self.controller.update(
            state.step,
            state.controller,
            Pieces(state.params, {}, state.optimizer),
            {},
            _mean_of_trees(gradients),
            means | dict.fromkeys(self.recipe.metrics, means["loss"]),
            parts,
        )
        return State(
            step=state.step + 1,
            params=after.params,
            variables={},
            optimizer=after.optimizer,
            controller=controller,
            key=state.key,
        )

    def _gradients(
        self,
        state: State,
        knobs: Mapping[str, Any],
        inputs: Any,
        targets: Any,
    ) -> tuple[list[Any], list[Any]]:
        """Return the gradient of each micro-batch, and the means behind its loss."""
        loss = functools.partial(
            self._loss,
            knobs=knobs,
            mask=self._mask(
                state,
                knobs,
                inputs.shape[1:],
            ),
        )
        scale = knobs.get("loss_scale", 1.0)
        gradients = []
        values = []
        for x, y in zip(inputs, targets, strict=True):
            scaled, means = jax.grad(loss, has_aux=True)(state.params, x, y)
            gradients.append(jax.tree.map(lambda g: g / scale, scaled))
            values.append(means)
        return gradients, values

    def _mask(
        self,
        state: State,
        knobs: Mapping[str, Any],
        shape: tuple[int, ...],
    ) -> Any:
        """Return the inputs' dropout, 1 where they stay."""
        keep = 1 - jnp.clip(
            0.1 * knobs.get("dropout", 1.0),
            0,
            0.9,
        )
        key = jax.random.fold_in(state.key, state.step)
        return jax.random.bernoulli(key, keep, shape) if self.dropout else 1.0

    def _loss(
        self,
        params: Any,
        x: Any,
        y: Any,
        knobs: Mapping[str, Any],
        mask: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Return the training loss of a micro-batch, and the means behind it."""
        params, x = cast((params, x * mask), self.recipe.precision)
        logits = (x @ params["kernel"] + params["bias"]).astype(jnp.float32)
        values = optax.softmax_cross_entropy(logits, y)
        sums = {"loss": (values.sum(), float(values.size))}
        sums |= losses.discounted(optax.softmax_cross_entropy, logits, y, knobs)

        total, weight = differentiated_sum(sums)
        scale = knobs.get("loss_scale", 1.0)
        means = {name: total / weight for name, (total, weight) in sums.items()}
        return total / weight * scale, means


def _optimizer(moved: set[str]) -> Any:
    """Return an optimizer that has the knobs."""
    if moved.isdisjoint(("optimizer", "momentum")):
        return optax.adamw
    return switchable(optax.adamw, functools.partial(optax.sgd, momentum=0.9))


def _metrics(policies: tuple[Policy, ...]) -> list[str]:
    """Return the metrics that the policies watch."""
    watched = {name for policy in policies for name in policy.watches}
    names = {
        name.removeprefix("evaluation_")
        for name in watched
        if name.partition("/")[0] not in SIGNALS
    }
    return sorted(names - {"loss"})


def _mean_of_trees(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


# ---- comparison, and errors ----


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        sharding=x.sharding,
    )


def _same(
    left: Any,
    right: Any,
    exact: bool = True,
) -> bool:
    """Whether two trees hold the same bits, NaN for NaN.

    If not `exact`, they need only be the same up to XLA's rounding.
    """
    one = [_as_numbers(x) for x in jax.tree.leaves(left)]
    two = [_as_numbers(x) for x in jax.tree.leaves(right)]
    if exact and len(one) != len(two):
        return False
    pairs = zip(one, two, strict=True)
    if exact:
        return all(a.tobytes() == b.tobytes() for a, b in pairs)
    return all(
        np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs
    )


def _as_numbers(x: Any) -> np.ndarray:
    dtype = getattr(x, "dtype", None)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def _require(
    condition: bool,
    law: str,
    policy: Any,
    what: str,
    remedy: str,
) -> None:
    if not condition:
        raise _broken(law, policy, what, remedy)


def _broken(
    law: str,
    policy: Any,
    what: str,
    remedy: str,
) -> RecipeError:
    name = getattr(policy, "name", policy)
    return RecipeError(
        f"{law}: {what}. The law: {LAWS[law]}",
        where=f"policy {name!r}",
        remedy=remedy,
    )


@contextlib.contextmanager
def _breaking(
    law: str,
    policy: Any,
) -> Iterator[None]:
    """Let an error inside, of any kind, break a law, unless it names one already."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, LeptonError):
            text = str(error.what)
            if text.partition(":")[0] in LAWS:
                raise
        kind = type(error).__name__
        lines = text.strip().splitlines() or [kind]
        raise _broken(
            law, policy, f"{kind}: {lines[0][:300]}", "fix what is named"
        ) from error
