"""The laws that a policy keeps, and a suite that puts any policy through them:
`conformance(policy)`.
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
from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.compat import jit_on, make_mesh
from lepton_jax.controller.core import Controller, Pieces, fed
from lepton_jax.controller.policy import Policy, chain
from lepton_jax.controller.signals import SIGNALS, norm
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
ROWS = 16
WIDTH = 4
CLASSES = 3
EAGER = 12  # steps without jit, which take as long as hundreds with it


@dataclass(frozen=True)
class Conformance:
    """What was found of policies that keep the laws: (law, what was looked at)."""

    names: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{', '.join(self.names)} keeps the laws",
                *(f"  {law:<10}{what}" for law, what in self.kept),
            ]
        )


def conformance(
    *policies: Any,
    steps: int = 200,
    seed: int = 0,
    runs: bool = True,
) -> Conformance:
    """Puts policies through the laws that the train step, checkpoints and replay rely
    on; one line in anybody's tests.

    Args:
      policies: policies, or chains of them. Each is looked at alone; runs are made with
        all of them.
      steps: of each sequence of made-up signals.
      seed: of these sequences.
      runs: whether to train small models too, on all the devices that there are.

    Raises:
      RecipeError: a law is broken; its name stands first.
    """
    chained = chain(*policies)
    for policy in chained:
        with _law("declared", policy):
            _declared(policy)
        for wild in (False, True):
            rows = list(_signals(policy, steps, seed, wild))
            _followed(policy, rows, wild)
    kept = [
        (law, f"{len(chained)} policies, {2 * steps} steps each")
        for law in ("declared", "pure", "stable", "in range")
    ]
    if runs:
        kept += _runs(chained)
    return Conformance(tuple(p.name for p in chained), tuple(kept))


# ---- one policy alone ----


def _declared(policy: Policy) -> None:
    for name in policy.moves:
        knobs_.known(name, policy.name)
    _require(
        isinstance(policy.name, str) and policy.name != "" and ":" not in policy.name,
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
    policy: Policy, steps: int, seed: int, wild: bool
) -> Iterator[dict[str, Any]]:
    """Made-up signals: a run that learns, with spikes; if `wild`, a third of the values
    are not numbers, or huge, and each signal is each of `WILD` at least once.
    """
    rng = np.random.default_rng(seed)
    for step in range(steps):
        loss = (
            3 * math.exp(-step / 60) + 0.1 * rng.random() + (rng.random() < 0.02) * 50
        )
        values = {
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
        row = {name: values.get(name, rng.lognormal()) for name in policy.watches}
        if wild:
            each = {
                n: (
                    WILD[(step // 2 + i) % len(WILD)]
                    if step % 2 == 0 and step < 4 * len(WILD)
                    else rng.choice(WILD)
                )
                for i, n in enumerate(policy.watches)
            }
            row = {
                n: (
                    x
                    if n in ("step", "updates", "batch_size")
                    or (step % 2 and rng.random() > 1 / 3)
                    else each[n]
                )
                for n, x in row.items()
            }
        yield {name: jnp.float32(x) for name, x in row.items()}


class _Watched(Mapping):
    """The signals of a step, of which only those that are watched can be read, and none
    written.
    """

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


def _followed(
    policy: Policy,
    rows: list[dict[str, Any]],
    wild: bool,
) -> None:
    """One sequence: eagerly, once more, and under jit; what must be the same is
    compared.
    """
    with _law("stable", policy):
        begin = jax.tree.map(jnp.asarray, policy.init())
        again = jax.tree.map(jnp.asarray, policy.init())
    _require(
        _same(begin, again),
        "pure",
        policy,
        "init made another state the second time",
        "let init depend on nothing",
    )
    for path, leaf in by_path(begin).items():
        _require(
            leaf.shape == (),
            "stable",
            policy,
            f"its state's {path or 'leaf'} has shape {leaf.shape}",
            "keep scalars",
        )

    def update(values: Mapping[str, Any], state: Any) -> Any:
        out = policy.update(_Watched(values, policy), state)
        _require(
            isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], Mapping),
            "declared",
            policy,
            f"update returned {type(out).__name__}",
            "return (a dict of moves, state)",
        )
        surplus = sorted(set(out[0]) - set(policy.moves))
        _require(
            not surplus,
            "declared",
            policy,
            f"it moves {', '.join(surplus)}",
            "name every knob in Policy.moves",
        )
        _stable(policy, begin, out[1])
        return (
            {
                k: jnp.asarray(out[0].get(k, knobs_.neutral(k)), jnp.float32)
                for k in policy.moves
            },
            jax.tree.map(jnp.asarray, out[1]),
        )

    with _law("pure", policy):
        first = _sequence(jax.jit(update), rows, begin)
    for step, (moves, _) in enumerate(first):
        for knob, value in moves.items():
            _in_range(policy, knob, float(value), step, wild)
    # where values lie on a threshold, eager rounding may decide otherwise: only
    # ordinary ones are compared
    if wild:
        return
    few = rows[:EAGER]
    with _law("pure", policy):
        eager = _sequence(update, few, begin)
        repeated = _sequence(update, few, begin)
        traced_again = _sequence(
            jax.jit(lambda *a: update(*a)),
            few,
            begin,
        )
    remedy = (
        "let update depend on its arguments alone, and write to nothing outside of it"
    )
    for step, (one, two, three) in enumerate(
        zip(eager, repeated, traced_again, strict=True)
    ):
        _require(
            _same(one, two),
            "pure",
            policy,
            f"step {step} came out otherwise the second time",
            remedy,
        )
        _require(
            _same(three, first[step]),
            "pure",
            policy,
            f"step {step} came out otherwise when it was traced again",
            remedy,
        )
        _require(
            _same(one, first[step], exact=False),
            "pure",
            policy,
            f"step {step} came out otherwise under jit",
            remedy,
        )


def _sequence(
    update: Callable,
    rows: list[dict[str, Any]],
    state: Any,
) -> list[Any]:
    out = []
    for row in rows:
        moves, state = update(dict(row), state)
        out.append((moves, state))
    return jax.device_get(out)


def _stable(
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
    for (path, b), a in zip(
        by_path(before).items(),
        jax.tree.leaves(after),
        strict=True,
    ):
        a = jnp.asarray(a)
        _require(
            (a.shape, a.dtype) == (b.shape, b.dtype),
            "stable",
            policy,
            f"its state's {path or 'leaf'} changed from {b.dtype}{list(b.shape)} to"
            f" {a.dtype}{list(a.shape)}",
            "return a state of the shapes and dtypes that init made",
        )


def _in_range(
    policy: Policy,
    knob: str,
    value: float,
    step: int,
    wild: bool,
) -> None:
    kind = knobs_.KNOBS[knob]
    # infinity is neutral
    fine = {
        "multiply": math.isfinite(value) and value >= 0,
        "least": value >= kind.lowest,
        "set": math.isnan(value) or kind.lowest <= value <= kind.highest,
        "any": math.isfinite(value),
    }[kind.combine]
    if policy.absolute:
        fine = (
            math.isnan(value)
            or kind.combine in ("any", "least")
            or kind.lowest <= value <= kind.highest
        )
    _require(
        fine,
        "in range",
        policy,
        f"it contributes {value} to {knob} in step {step} of "
        f"{'signals that are partly not finite' if wild else 'ordinary signals'}",
        "guard against signals that are not finite, e.g. with"
        " jnp.where(jnp.isfinite(x), ...), and clip to the range",
    )


# ---- small runs with all of them ----


def _runs(policies: tuple[Policy, ...]) -> list[tuple[str, str]]:
    where = ", ".join(p.name for p in policies)
    accumulating = Policy(
        "accumulating",
        lambda: (),
        lambda signals, state: ({"accumulate": jnp.float32(2)}, state),
        moves=("accumulate",),
    )
    with _law("trains", where):
        run = _Tiny(policies)
        state = run.train(7)
        _Tiny(policies, precision="float16").train(6)
        _Tiny((accumulating, *policies), precision="bfloat16", micro_batches=2).train(6)
    with _law("resumes", where):
        whole = run.train(7, state)
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(folder))
            checkpoints.save(7, state, {})
            checkpoints.wait()
            back, _ = checkpoints.restore(7, jax.tree.map(_shape, state))
            checkpoints.close()
        _require(
            _same(run.train(7, back), whole),
            "resumes",
            where,
            "after a checkpoint the run went on otherwise",
            "keep all that a decision depends on in the policy's state",
        )
    kept = [
        (
            "trains",
            (
                f"float32, float16, bfloat16 with accumulation; {jax.device_count()}"
                " devices"
            ),
        ),
        ("resumes", "7 + 7 steps"),
    ]
    # these have no neutral contribution that the core would know
    if not any(p.absolute for p in policies):
        with _law("off", where):
            off, plain = (
                _Tiny(p, like=policies).train(10)
                for p in (tuple(map(_silent, policies)), ())
            )
            _require(
                _same((off.params, off.optimizer), (plain.params, plain.optimizer)),
                "off",
                where,
                "with neutral contributions the run is another than without it",
                "report this: it is a fault of the core",
            )
        kept.append(("off", "10 steps"))
    return kept


def _silent(policy: Policy) -> Policy:
    def update(signals: Mapping[str, Any], state: Any) -> tuple[dict[str, Any], Any]:
        moves, after = policy.update(signals, state)
        return {
            k: jnp.where(
                jnp.float32(x) > jnp.inf,
                x,
                knobs_.neutral(k),
            )
            for k, x in moves.items()
        }, after

    return policy._replace(update=update)


class _Tiny:
    """A linear classifier on made-up data, with every knob that `like` (or `policies`)
    move; batches over all devices.
    """

    def __init__(
        self,
        policies: tuple[Policy, ...],
        precision: str = "float32",
        micro_batches: int = 1,
        like: Any = None,
    ):
        moved = {k for p in like or policies for k in p.moves}
        self.dropout = "dropout" in moved
        self.names = ", ".join(p.name for p in policies)
        momentum = functools.partial(optax.sgd, momentum=0.9)
        optimizer = (
            switchable(optax.adamw, momentum)
            if "optimizer" in moved or "momentum" in moved
            else optax.adamw
        )
        watched = {
            n.removeprefix("evaluation_")
            for p in policies
            for n in p.watches
            if n.partition("/")[0] not in SIGNALS
        }
        self.recipe = Recipe(
            model=dict,
            loss=optax.softmax_cross_entropy,
            optimizer=optimizer,
            learning_rate=0.01,
            metrics=dict.fromkeys(sorted(watched - {"loss"}), np.mean),
            controller=policies,
            batch_size=ROWS * jax.device_count(),
            precision=precision,
            micro_batches=micro_batches,
        )
        self.controller = Controller(self.recipe)
        mesh = make_mesh({"data": jax.device_count()}, jax.devices())
        self.replicated, self.rows = (
            NamedSharding(mesh, PartitionSpec(*a)) for a in ((), (None, "data"))
        )
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
        """The state after some steps, replicated as before."""
        state = (
            fed(
                self._begin(),
                steps=14.0,
                evaluations=1.0,
                evaluation_loss=1.0,
            )
            if state is None
            else state
        )
        places = jax.tree.map(lambda x: x.sharding, state)
        for _ in range(steps):
            rng = np.random.default_rng(int(state.step))
            parts = self.recipe.micro_batches or 1
            x = rng.normal(size=(parts, self.recipe.batch_size // parts, WIDTH)).astype(
                np.float32
            )
            y = np.eye(CLASSES, dtype=np.float32)[x[..., :CLASSES].argmax(-1)]
            state = self.step(state, *jax.device_put((x, y), self.rows))
            jax.block_until_ready(state)
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
        _require(
            all(
                np.isfinite(x).all()
                for x in jax.tree.leaves(jax.device_get(state.params))
            ),
            "trains",
            self.names,
            f"the parameters are not finite after {steps} steps of"
            f" {self.recipe.precision}",
            "look at its contributions",
        )
        return state

    def _begin(self) -> State:
        params = {
            "kernel": jnp.full(
                (WIDTH, CLASSES),
                0.1,
                jnp.float32,
            ),
            "bias": jnp.zeros(CLASSES, jnp.float32),
        }
        state = State(
            jnp.int32(0),
            params,
            {},
            *self.controller.init(params, {}),
            jax.random.key(0),
        )
        return jax.device_put(state, self.replicated)

    def _step(
        self,
        state: State,
        inputs: Any,
        targets: Any,
    ) -> State:
        held = (
            self.controller.forward_knobs(state.controller)
            if state.controller != ()
            else {}
        )
        scale = held.get("loss_scale", 1.0)
        keep = 1 - jnp.clip(
            0.1 * held.get("dropout", 1.0),
            0,
            0.9,
        )
        key = jax.random.fold_in(state.key, state.step)
        mask = (
            jax.random.bernoulli(key, keep, inputs.shape[1:]) if self.dropout else 1.0
        )

        def loss(
            params: Any,
            x: Any,
            y: Any,
        ) -> Any:
            params, x = cast((params, x * mask), self.recipe.precision)
            logits = (x @ params["kernel"] + params["bias"]).astype(jnp.float32)
            values = optax.softmax_cross_entropy(logits, y)
            sums = {"loss": (values.sum(), float(values.size))}
            sums |= losses.discounted(
                optax.softmax_cross_entropy,
                logits,
                y,
                held,
            )
            total, weight = differentiated_sum(sums)
            return total / weight * scale, {
                name: total / weight for name, (total, weight) in sums.items()
            }

        each = [
            jax.grad(loss, has_aux=True)(state.params, x, y)
            for x, y in zip(inputs, targets, strict=True)
        ]
        each = [(jax.tree.map(lambda g: g / scale, g), values) for g, values in each]
        gradients = jax.tree.map(lambda *g: sum(g) / len(g), *(g for g, _ in each))
        means = jax.tree.map(
            lambda *x: sum(x) / len(x), *(values for _, values in each)
        )
        parts = (
            sum(norm(g) ** 2 for g, _ in each) / len(each)
            if self.controller.signals.by_micro_batch
            else None
        )
        values = means | dict.fromkeys(self.recipe.metrics, means["loss"])
        after, controller, _ = self.controller.update(
            state.step,
            state.controller,
            Pieces(state.params, {}, state.optimizer),
            {},
            gradients,
            values,
            parts,
        )
        return State(
            state.step + 1,
            after.params,
            {},
            after.optimizer,
            controller,
            state.key,
        )


# ---- findings ----


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
    """Whether two trees hold the same bits, NaN for NaN; or, if not exact, the same up
    to what XLA rounds otherwise.
    """
    is_key = lambda x: jax.dtypes.issubdtype(
        getattr(x, "dtype", None), jax.dtypes.prng_key
    )
    one, two = (
        [
            np.asarray(jax.random.key_data(x) if is_key(x) else x)
            for x in jax.tree.leaves(t)
        ]
        for t in (left, right)
    )
    if exact:
        return len(one) == len(two) and all(
            a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True)
        )
    return all(
        np.allclose(
            a,
            b,
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
        )
        for a, b in zip(one, two, strict=True)
    )


def _require(
    condition: bool,
    law: str,
    policy: Any,
    what: str,
    remedy: str,
) -> None:
    if not condition:
        name = getattr(policy, "name", policy)
        raise RecipeError(
            f"{law}: {what}. The law: {LAWS[law]}",
            where=f"policy {name!r}",
            remedy=remedy,
        )


@contextlib.contextmanager
def _law(law: str, policy: Any) -> Iterator[None]:
    """An error inside, of any kind, breaks this law, unless it says already which
    one.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, LeptonError) and str(error.what).partition(":")[0] in LAWS:
            raise
        what = str(
            error.what if isinstance(error, LeptonError) else error
        ).strip().splitlines() or [type(error).__name__]
        name = getattr(policy, "name", policy)
        raise RecipeError(
            f"{law}: {type(error).__name__}: {what[0][:300]}. The law: {LAWS[law]}",
            where=f"policy {name!r}",
            remedy="mend what is named",
        ) from error
