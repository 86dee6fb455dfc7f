"""Modules as people write them train as in a loop written by hand.

They have modes, random streams, sown values, bare arrays, axis names, and complex
parameters.
"""

from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lepton_jax as lepton
from lepton_jax.errors import ModelError
from lepton_jax.losses import cross_entropy
from lepton_jax.step.module import functional

STEPS = 4
BATCH = 24
RATE = 0.1
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 6)).astype(np.float32)
    return x, (x @ rng.normal(size=(6, 3))).argmax(1).astype(np.int32)


def trainer(model, data, **fields):
    fields = {
        "loss": cross_entropy,
        "optimizer": optax.sgd(RATE),
        "devices": 1,
    } | fields
    return lepton.Trainer(
        model=model, train=data, batch_size=BATCH, steps=STEPS, shuffle=False, **fields
    )


def batches(data):
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        yield step, jax.tree.map(lambda x: x[rows], data)  # noqa: B023


def step_key(step):
    return jax.random.fold_in(jax.random.key(0), step)


def close(left, right, rtol=2e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), left, right
    )


def linen_by_hand(net, data, call, loss=cross_entropy, auxiliary=None, variables=None):
    """Train a Linen module in a plain loop.

    Args:
      net: the module.
      data: inputs and targets.
      call: (apply, inputs, train, key) to the result of `apply`.
      loss: (outputs, targets) to losses.
      auxiliary: the mutated collections to a term of the loss, or None.
      variables: the variables to start from; None: those that `init` makes.

    Returns:
      Losses, parameters and other variables.
    """
    x = jax.tree.map(lambda x: x[:BATCH], data[0])
    if variables is None:
        init = partial(net.init, jax.random.key(0))
        variables = call(init, x, False, jax.random.key(0))
    variables = dict(variables)
    params = variables.pop("params")
    sown = {
        n: variables.pop(n)
        for n in ("losses", "intermediates", "extra")
        if n in variables
    }
    mutable = [*variables, *sown]

    @jax.jit
    def step(params, variables, key, x, y):
        def loss_of(params):
            apply = partial(net.apply, {"params": params, **variables})
            rngs = {"params": key, "dropout": jax.random.fold_in(key, 1)}
            outputs, after = call(
                partial(apply, mutable=mutable, rngs=rngs), x, True, key
            )
            value = loss(outputs, y).mean()
            value += auxiliary(after) if auxiliary else 0
            return value, {n: after[n] for n in variables}

        (value, after), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - RATE * jnp.conj(g), params, gradients)
        return params, after, value

    losses = []
    for index, (x, y) in batches(data):
        params, variables, value = step(params, variables, step_key(index), x, y)
        losses.append(value)
    return np.array(losses), params, variables


def nnx_by_hand(build, data, call, loss=cross_entropy, auxiliary=None):
    """Train an NNX module in a plain loop; return losses and parameters.

    `call` is a function of (module, inputs, key) to outputs.
    """
    module = build(nnx.Rngs(0))

    def loss_of(module, key, x, y):
        value = loss(call(module, x, key), y).mean()
        return value + (auxiliary(module) if auxiliary else 0)

    @nnx.jit
    def step(module, key, x, y):
        module.train()
        value, gradients = nnx.value_and_grad(loss_of)(module, key, x, y)
        params = nnx.state(module, nnx.Param)
        nnx.update(
            module, jax.tree.map(lambda p, g: p - RATE * jnp.conj(g), params, gradients)
        )
        nnx.pop(module, nnx.Intermediate)
        return value

    losses = [step(module, step_key(i), x, y) for i, (x, y) in batches(data)]
    return np.array(losses), nnx.to_pure_dict(nnx.state(module, nnx.Param))


# ---- the mode ----

# names of a mode, and its value in training; the last four are found out by their
# effect
NAMES = {
    "train": True,
    "is_training": True,
    "training_mode": True,
    "enable_dropout": True,
    "deterministic": False,
    "inference": False,
    "eval": False,
    "is_eval": False,
    "testing": False,
    "is_test": False,
    "active": True,
    "frozen": False,
    "regularize": True,
    "serving": False,
}
CLASSES = """
class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, {name}{default}):
        on = {name} if {sense} else not {name}
        x = linen.BatchNorm(use_running_average=not on)(linen.Dense(8)(x))
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not on)(x))

class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, *, {name}{default}):
        on = {name} if {sense} else not {name}
        return self.last(self.drop(self.first(x), deterministic=not on))
"""


def classes(name, sense, default="off"):
    """Return a Linen and an NNX module whose mode goes by a name."""
    defaults = {"off": f"={not sense}", "on": f"={sense}", "required": ""}
    text = CLASSES.format(name=name, sense=sense, default=defaults[default])
    names = {"linen": linen, "nnx": nnx}
    exec(text, names)
    return names["Linen"], names["Nnx"]


@pytest.fixture(scope="module")
def linen_losses(data):
    net = classes("train", True)[0]()
    return linen_by_hand(net, data, lambda apply, x, train, key: apply(x, train=train))


@pytest.fixture(scope="module")
def nnx_losses(data):
    return nnx_by_hand(
        classes("train", True)[1], data, lambda m, x, key: m(x, train=True)
    )


def applied(module, train, params, variables, inputs, key):
    return module.apply(params, variables, inputs, key, train, None)[:2]


@pytest.mark.parametrize(("name", "sense"), NAMES.items())
def test_a_mode_by_any_name_is_set(name, sense, data):
    inputs = jax.ShapeDtypeStruct((BATCH, 6), jnp.float32)
    for model in (classes(name, sense)[0](), classes(name, sense)[1]):
        module = functional(model, inputs)
        first = jax.eval_shape(module.init, jax.random.key(0))
        programs = [
            jax.make_jaxpr(partial(applied, module, t))(
                *first, inputs, jax.random.key(0)
            )
            for t in (True, False)
        ]
        assert ["random_bits" in str(program) for program in programs] == [True, False]


@pytest.mark.parametrize("default", ["off", "on"])
@pytest.mark.parametrize(
    ("name", "sense"), [("is_eval", False), ("frozen", False), ("active", True)]
)
def test_linen_with_a_mode_of_its_own_trains_as_by_hand(
    name, sense, default, data, linen_losses
):
    losses, params, variables = linen_losses
    run = trainer(classes(name, sense, default)[0](), data)

    close(run.fit()["loss"], losses)
    close(run.state.params, params)
    close(run.state.variables, variables)


@pytest.mark.parametrize("default", ["off", "on"])
@pytest.mark.parametrize(
    ("name", "sense"), [("testing", False), ("serving", False), ("regularize", True)]
)
def test_nnx_with_a_mode_of_its_own_trains_as_by_hand(
    name, sense, default, data, nnx_losses
):
    losses, params = nnx_losses
    run = trainer(classes(name, sense, default)[1], data)

    close(run.fit()["loss"], losses)
    close(run.state.params, params)
    np.testing.assert_array_equal(run.evaluate(data), run.evaluate(data))


@pytest.mark.parametrize(("argument", "sense"), [("go", True), ("not go", False)])
def test_train_argument_names_a_required_boolean(
    argument, sense, data, linen_losses, nnx_losses
):
    on_linen, on_nnx = classes("go", sense, "required")
    run = trainer(on_linen(), data, train_argument=argument)

    close(run.fit()["loss"], linen_losses[0])

    run.evaluate(data)

    close(trainer(on_nnx, data, train_argument=argument).fit()["loss"], nnx_losses[0])


class Plain(nnx.Module):
    """Booleans that have nothing to do with training."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x, return_hidden=False, causal=True, decode: bool = False):
        if decode:
            raise ValueError("there is no cache")
        x = self.layer(x)
        return (x, x) if return_hidden else x if causal else -x


class PlainLinen(linen.Module):
    @linen.compact
    def __call__(self, x, return_hidden=False, causal=True, decode: bool = False):
        if decode:
            cache = self.variable("cache", "x", jnp.zeros, x.shape)
            cache.value = x
        x = linen.Dense(3)(x)
        return (x, x) if return_hidden else x if causal else -x


@pytest.mark.parametrize("model", [Plain, PlainLinen()])
def test_a_boolean_that_changes_no_state_keeps_its_default(model, data):
    run = trainer(model, data)
    losses = run.fit()["loss"]
    if model is Plain:
        expected = nnx_by_hand(Plain, data, lambda m, x, key: m(x))[0]
    else:
        expected = linen_by_hand(model, data, lambda apply, x, train, key: apply(x))[0]

    close(losses, expected)
    assert run.trace.outputs.shape == (BATCH, 3)


def test_an_unknown_mode_costs_its_traces_once(data):
    calls = []

    class Counting(Plain):
        def __call__(self, x, causal=True):
            calls.append(causal)
            return super().__call__(x, causal=causal)

    functional(Counting, jax.ShapeDtypeStruct((BATCH, 6), jnp.float32))

    assert sorted(calls) == [False, True]


# ---- random streams ----


class TakesRngs(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs):
        return self.last(self.drop(self.first(x), rngs=rngs))


class MayTakeRngs(TakesRngs):
    def __call__(self, x, rngs=None):
        x = self.first(x)
        return self.last(x if rngs is None else self.drop(x, rngs=rngs))


class TakesRngsWhereItDrops(TakesRngs):
    def __call__(self, x, rngs: nnx.Rngs | None = None, deterministic=None):
        return self.last(
            self.drop(self.first(x), rngs=rngs, deterministic=deterministic)
        )


class TakesKey(TakesRngs):
    def __call__(self, x, key):
        noise = jax.random.normal(key, x.shape)
        return self.last(self.first(x + noise))


@pytest.mark.parametrize(
    "model", [TakesRngs, MayTakeRngs, TakesRngsWhereItDrops, TakesKey]
)
def test_rngs_and_keys_are_filled_from_the_key_of_the_step(model, data):
    def call(module, x, key):
        return (
            module(x, key=key) if model is TakesKey else module(x, rngs=nnx.Rngs(key))
        )

    losses, params = nnx_by_hand(model, data, call)
    run = trainer(model, data)

    close(run.fit()["loss"], losses)
    close(run.state.params, params)
    np.testing.assert_array_equal(run.evaluate(data), run.evaluate(data))
    assert run.predict(data[0]).shape == (96,)


class OwnStreams(nnx.Module):
    """It could take rngs, but has its own: what a plain call uses."""

    def __init__(self, rngs):
        self.layers = nnx.Sequential(
            nnx.Linear(6, 8, rngs=rngs),
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(8, 3, rngs=rngs),
        )

    def __call__(self, x, rngs=None):
        return self.layers(x, rngs=rngs)


def test_rngs_that_a_plain_call_leaves_out_stay_out(data):
    losses, _ = nnx_by_hand(OwnStreams, data, lambda m, x, key: m(x))
    close(trainer(OwnStreams, data).fit()["loss"], losses)


class LinenKey(linen.Module):
    @linen.compact
    def __call__(self, x, rng, train: bool):
        x = x + jax.random.normal(rng, x.shape) * train
        return linen.Dense(3)(x)


class LinenRngs(linen.Module):
    """Arguments with the names of those of `apply`."""

    @linen.compact
    def __call__(self, x, method, *, rngs, train=False):
        x = x + jax.random.normal(rngs["dropout"], x.shape) * train
        return linen.Dense(3)(x * method)


def test_linen_takes_arguments_that_are_named_as_those_of_apply(data):
    net = LinenRngs()
    data = {"x": data[0], "method": np.full_like(data[0], 2)}, data[1]

    def call(apply, inputs, train, key):
        streams = {"dropout": jax.random.fold_in(key, 1)}
        return apply(method=lambda m: m(**inputs, rngs=streams, train=train))

    run = trainer(net, data)

    close(run.fit()["loss"], linen_by_hand(net, data, call)[0])
    assert run.predict(data[0]).shape == (96,)


def test_linen_takes_a_key(data):
    net = LinenKey()
    losses, params, _ = linen_by_hand(
        net, data, lambda apply, x, train, key: apply(x, key, train)
    )
    run = trainer(net, data)

    close(run.fit()["loss"], losses)
    close(run.state.params, params)


class LinenNamedKeys(linen.Module):
    """Keys by names that say what they are for."""

    @linen.compact
    def __call__(self, x, z_rng, rng_1):
        first = jax.random.normal(z_rng, x.shape)
        second = jax.random.normal(rng_1, x.shape)
        return linen.Dense(3)(x + 0.1 * (first - second))


def test_keys_by_any_name_that_says_key_are_filled_and_differ(data):
    run = trainer(LinenNamedKeys(), data, loss=lambda o, t: cross_entropy(o, t))
    plain = trainer(linen.Dense(3), data)
    noisy = run.fit()["loss"]
    quiet = plain.fit()["loss"]

    assert np.isfinite(noisy).all()
    # the same key twice would leave no noise at all
    assert np.abs(noisy - quiet).min() > 1e-5
    np.testing.assert_array_equal(run.evaluate(data), run.evaluate(data))


class WholeBatch(linen.Module):
    @linen.compact
    def __call__(self, batch, train=False):
        x = linen.Dense(8)(batch["left"]) + linen.Dense(8)(batch["right"])
        return linen.Dense(3)(linen.Dropout(0.3, deterministic=not train)(x))


class WholeBatchNnx(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, inputs):
        return self.layer(inputs["left"] - 2 * inputs["right"])


@pytest.mark.parametrize("model", [WholeBatch(), WholeBatchNnx], ids=["linen", "nnx"])
def test_a_model_that_takes_the_whole_batch_gets_the_dict(model, data):
    inputs = {"left": data[0], "right": data[0][:, ::-1].copy()}
    run = trainer(model, (inputs, data[1]))
    history = run.fit()

    assert np.isfinite(history["loss"]).all()
    assert run.predict(inputs).shape == (96,)

    if model is WholeBatchNnx:
        plain = {"x": data[0] - 2 * data[0][:, ::-1]}
        by_name = trainer(lambda rngs: Plain(rngs), (plain, data[1]))
        assert by_name.fit()["loss"].shape == history["loss"].shape


class Noisy(linen.Module):
    """It draws from a stream of its own, outside of training too."""

    stream: str
    dropped: bool = False

    @linen.compact
    def __call__(self, x, train):
        noise = jax.random.normal(self.make_rng(self.stream), x.shape)
        x = linen.Dense(3)(x + 0.1 * noise)
        if self.dropped:
            x = linen.Dropout(0.5, deterministic=False, rng_collection="lstm")(x)
        return x


@pytest.mark.parametrize(
    "net", [Noisy("dropout"), Noisy("sampling"), Noisy("lstm", True)]
)
def test_linen_may_draw_outside_of_training(net, data):
    def call(apply, x, train, key):
        return apply(x, train)

    losses, params, _ = linen_by_hand(net, data, call)
    run = trainer(net, data, test=data)

    close(run.fit()["loss"], losses)

    key = jax.random.key(0)
    rngs = {"params": key, "dropout": jax.random.fold_in(key, 1)}
    outputs = net.apply({"params": params}, data[0][:BATCH], False, rngs=rngs)
    one = run.evaluate(jax.tree.map(lambda x: x[:BATCH], data))

    close(one.loss, cross_entropy(outputs, data[1][:BATCH]).mean(), rtol=1e-5)
    np.testing.assert_array_equal(run.predict(data[0]), run.predict(data[0]))


def test_who_asks_whether_there_is_a_stream_is_not_given_one_outside_of_training(data):
    class Asking(linen.Module):
        @linen.compact
        def __call__(self, x):
            drop = linen.Dropout(0.5, deterministic=not self.has_rng("dropout"))
            return linen.Dense(3)(drop(x))

    run = trainer(Asking(), data)
    run.fit()
    plain = cross_entropy(
        Asking().apply({"params": run.state.params}, data[0]), data[1]
    )

    close(run.evaluate(data).loss, plain.mean(), rtol=1e-5)


# ---- bare arrays ----


class Bare(nnx.Module):
    """Arrays that are no variables."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 3, rngs=rngs)
        self.scale = jnp.linspace(0.5, 1.5, 6)
        self.offset = jax.random.normal(rngs.params(), (6,))
        self.order = np.arange(6)[::-1].copy()

    def __call__(self, x):
        return self.layer((x * self.scale + self.offset)[:, self.order])


class Closing(nnx.Module):
    """An array that only a function knows."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 3, rngs=rngs)
        table = jax.random.normal(rngs.params(), (6,))
        self.scale = lambda x: x * table
        self.shift = partial(jnp.add, jnp.linspace(0, 1, 6))

    def __call__(self, x):
        return self.layer(self.shift(self.scale(x)))


class Settings(nnx.Pytree):
    def __init__(self):
        self.shift = jnp.arange(6.0) / 6


class Nested(nnx.Module):
    def __init__(self, rngs):
        self.parts = nnx.List([Bare(rngs), Closing(rngs)])
        self.key = jax.random.key(7)
        self.tables = nnx.data({"a": [jnp.linspace(0, 1, 6)]})
        self.settings = Settings()

    def __call__(self, x):
        noise = jax.random.normal(self.key, x.shape[1:])
        x = x * self.tables["a"][0] + self.settings.shift
        return self.parts[0](x + noise) + self.parts[1](x)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("model", [Bare, Closing, Nested])
def test_a_bare_array_is_a_constant_that_a_checkpoint_holds(
    model, devices, data, tmp_path
):
    losses, params = nnx_by_hand(model, data, lambda m, x, key: m(x))
    run = trainer(model, data, devices=devices)

    close(run.fit()["loss"], losses)
    close(run.state.params, params, rtol=1e-5)

    run.save(tmp_path / "saved")
    again = trainer(model, data, devices=devices).load(tmp_path / "saved")

    np.testing.assert_array_equal(again.evaluate(data), run.evaluate(data))

    instance = trainer(model(nnx.Rngs(0)), data, devices=devices)

    close(instance.fit()["loss"], losses)


def test_a_bare_array_comes_back_from_a_checkpoint(data, tmp_path):
    run = trainer(Bare, data)
    run.fit()
    run.save(tmp_path / "saved")
    other = trainer(Bare, data, seed=5).load(tmp_path / "saved")

    np.testing.assert_array_equal(
        other.state.variables["offset"], Bare(nnx.Rngs(0)).offset
    )


# ---- axis names ----


class Normed(linen.Module):
    axis: str | None

    @linen.compact
    def __call__(self, x, train):
        norm = linen.BatchNorm(use_running_average=not train, axis_name=self.axis)
        return linen.Dense(3)(norm(linen.Dense(8)(x)))


class NormedNnx(nnx.Module):
    def __init__(self, rngs, axis=None):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(8, axis_name=axis, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("named", "plain"),
    [(Normed("batch"), Normed(None)), (partial(NormedNnx, axis="data"), NormedNnx)],
)
def test_batch_norm_over_an_axis_name_is_batch_norm(named, plain, devices, data):
    run, expected = (trainer(m, data, devices=devices) for m in (named, plain))

    close(run.fit()["loss"], expected.fit()["loss"])
    close(run.state.variables, expected.state.variables)
    close(tuple(run.evaluate(data)), tuple(expected.evaluate(data)))


def test_collectives_in_model_loss_and_preprocess_are_over_the_whole_batch(data):
    class Summed(Plain):
        def __call__(self, x):
            x = jax.lax.scan(lambda c, y: (c, y + jax.lax.pmean(c, "rows")), 0.5, x)[1]
            return super().__call__(x) * jax.lax.axis_size("model")

    def loss(outputs, targets):
        values = cross_entropy(outputs, targets)
        return jax.lax.pmean(values.mean(), ("data", "model"))

    def preprocess(x):
        return jax.lax.psum(x, "data") + jax.lax.axis_index("rows")

    def accuracy(outputs, targets):
        return jax.lax.pmax(lepton.metrics.accuracy(outputs, targets), "data")

    class Unsummed(Plain):
        def __call__(self, x):
            return super().__call__(x + 0.5)

    named = trainer(
        Summed, data, loss=loss, preprocess=preprocess, metrics={"accuracy": accuracy}
    )
    plain = trainer(Unsummed, data, metrics={"accuracy": lepton.metrics.accuracy})
    histories = named.fit(), plain.fit()

    close(histories[0]["loss"], histories[1]["loss"])
    close(histories[0]["accuracy"], histories[1]["accuracy"])
    close(tuple(named.evaluate(data)), tuple(plain.evaluate(data)), rtol=1e-5)
    np.testing.assert_array_equal(
        named.predict(data[0]).argmax(-1), plain.predict(data[0])
    )


# ---- sown values ----


class Experts(linen.Module):
    """A layer that sows a loss of its own, in the shape of a mixture of experts."""

    collection: str = "losses"
    scanned: bool = False
    summed: bool = False

    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.BatchNorm(use_running_average=not train)(x)
        for _ in range(2):
            gates = linen.softmax(linen.Dense(6)(x))
            self.sow("intermediates", "gates", gates)
            shares = gates.mean(0)
            balance = 6 * (shares**2).sum()
            adding = {"init_fn": lambda: 0.0, "reduce_fn": lambda a, b: a + b}
            options = adding if self.summed else {}
            self.sow(self.collection, "balance", balance, **options)
            x = x * gates
        return linen.Dense(3)(x)


class AuxLoss(nnx.Intermediate):
    pass


class Term(nnx.Variable):
    pass


class SowingLayer(nnx.Module):
    def __init__(self, rngs, kind):
        self.gate = nnx.Linear(6, 6, rngs=rngs)
        self.kind = kind

    def __call__(self, x):
        gates = nnx.softmax(self.gate(x))
        self.sow(self.kind, "balance", 6 * (gates.mean(0) ** 2).sum())
        self.sow(nnx.Intermediate, "gates", gates)
        return x * gates


class Sowing(nnx.Module):
    def __init__(self, rngs, kind=AuxLoss):
        self.layers = nnx.List([SowingLayer(rngs, kind) for _ in range(2)])
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def total(tree):
    return sum(leaf.mean() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("net", [Experts(), Experts("extra", summed=True)])
def test_what_linen_sows_is_added_to_the_loss(net, devices, data):
    def by_hand(weight):
        return linen_by_hand(
            net,
            data,
            lambda apply, x, train, key: apply(x, train=train),
            auxiliary=lambda after: weight * total(after[net.collection]),
        )

    for weight in (0.3, 0.0):
        losses, params, variables = by_hand(weight)
        auxiliary = {net.collection: weight} if weight else {}
        run = trainer(net, data, devices=devices, auxiliary=auxiliary)
        close(run.fit()["loss"], losses, rtol=5e-6)
        close(run.state.params, params, rtol=1e-5)
        assert set(run.state.variables) == {"batch_stats"}
        close(run.state.variables, variables, rtol=1e-5)
    variables = {"params": run.state.params, **run.state.variables}
    plain = cross_entropy(net.apply(variables, data[0]), data[1]).mean()

    close(run.evaluate(data).loss, plain, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("kind", [AuxLoss, Term, nnx.Intermediate, "side_losses"])
def test_what_nnx_sows_is_added_to_the_loss(kind, devices, data):
    name = kind if isinstance(kind, str) else kind.__name__
    build = partial(Sowing, kind=kind)

    def auxiliary(module):
        found = nnx.state(
            module, nnx.variable_type_from_name(kind) if isinstance(kind, str) else kind
        )
        return 0.3 * total(nnx.to_pure_dict(found))

    def call(module, x, key):
        for layer in module.layers:
            nnx.pop(
                layer,
                (Term, nnx.variable_type_from_name("side_losses", allow_register=True)),
            )
        return module(x)

    losses, params = nnx_by_hand(build, data, call, auxiliary=auxiliary)
    run = trainer(build, data, devices=devices, auxiliary={name: 0.3})

    close(run.fit()["loss"], losses, rtol=5e-6)
    close(run.state.params, params, rtol=1e-5)
    assert run.state.variables == {}

    quiet = trainer(build, data, devices=devices)

    assert quiet.fit()["loss"][0] < losses[0]
    assert quiet.state.variables == {}


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_auxiliary_terms_are_averaged_over_micro_batches(micro_batches, data):
    """A term that is linear in the samples is the same in parts as in one piece."""

    class Linear(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(3)(x)
            self.sow("losses", "size", jnp.square(x))
            self.sow("losses", "mean", jnp.abs(x).mean())
            return x

    whole, parts = (
        trainer(Linear(), data, auxiliary={"losses": 0.5}, micro_batches=count)
        for count in (1, micro_batches)
    )

    close(parts.fit()["loss"], whole.fit()["loss"], rtol=1e-5)
    close(parts.state.params, whole.state.params, rtol=1e-5)


def test_a_term_that_is_sown_only_in_training_or_in_a_loop_counts(data):
    class Layer(linen.Module):
        train: bool

        @linen.compact
        def __call__(self, x, _):
            x = linen.Dense(6)(x)
            if self.train:
                self.sow("losses", "square", jnp.square(x).mean())
            return x, None

    class Scanned(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            layers = linen.scan(
                Layer,
                variable_axes={"params": 0, "losses": 0},
                split_rngs={"params": True},
                length=3,
            )
            return linen.Dense(3)(layers(train)(x, None)[0])

    def call(apply, x, train, key):
        if not train:
            return apply(x, train)
        options = {**apply.keywords, "mutable": ["losses"]}
        return apply.func(*apply.args, x, train, **options)

    losses, _, _ = linen_by_hand(
        Scanned(), data, call, auxiliary=lambda after: 0.2 * total(after["losses"])
    )

    close(trainer(Scanned(), data, auxiliary={"losses": 0.2}).fit()["loss"], losses)


def test_an_instance_that_has_sown_before_does_not_grow(data):
    model = Sowing(nnx.Rngs(0))
    model(data[0][:4])
    run = trainer(model, data)

    close(run.fit()["loss"], trainer(Sowing, data).fit()["loss"])
    assert run.state.variables == {}


@pytest.mark.parametrize("model", [Experts(), Sowing])
def test_a_name_that_nothing_is_sown_under_is_an_error(model, data):
    near = "losses" if model is not Sowing else "AuxLoss"
    with pytest.raises(ModelError, match=f"did you mean '{near}'"):
        trainer(model, data, auxiliary={near[:-1]: 1.0}).fit()


# ---- where training starts from ----


def test_a_bound_linen_module_and_an_nnx_instance_start_from_their_own_weights(data):
    net = Experts()
    variables = net.init(jax.random.key(9), data[0][:2])
    variables = {n: variables[n] for n in ("params", "batch_stats")}
    variables["batch_stats"] = jax.tree.map(lambda x: x + 1, variables["batch_stats"])
    losses, params, _ = linen_by_hand(
        net,
        data,
        lambda apply, x, train, key: apply(x, train=train),
        variables=variables,
    )
    for bound in (net.bind(variables), lambda: net.bind(flax.core.freeze(variables))):
        run = trainer(bound, data)
        before = run.evaluate(data).loss
        plain = cross_entropy(net.apply(variables, data[0]), data[1]).mean()
        close(before, plain, rtol=1e-5)
        close(run.fit()["loss"], losses)
        close(run.state.params, params)

    instance = trainer(Plain(nnx.Rngs(9)), data)

    close(
        instance.fit()["loss"],
        nnx_by_hand(lambda _: Plain(nnx.Rngs(9)), data, lambda m, x, key: m(x))[0],
    )


def test_a_part_of_a_bound_module_starts_from_its_part(data):
    class Whole(linen.Module):
        def setup(self):
            self.body = linen.Dense(3)

        def __call__(self, x):
            return self.body(x) * 2

    variables = Whole().init(jax.random.key(9), data[0][:2])
    run = trainer(Whole().bind(variables).body, data)

    close(
        run.program.init(0).params if run.program else run._ready(None).init(0).params,
        variables["params"]["body"],
    )


def test_a_module_bound_to_other_shapes_is_an_error(data):
    variables = linen.Dense(3).init(jax.random.key(0), np.zeros((2, 5), np.float32))
    with pytest.raises(ModelError, match=r"bound to 'params/kernel' of shape \(5, 3\)"):
        trainer(linen.Dense(3).bind(variables), data).fit()


# ---- complex parameters ----


class Spectral(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 3, rngs=rngs)
        values = jax.random.normal(rngs.params(), (2, 4))
        self.filter = nnx.Param(1 + 0.3 * (values[0] + 1j * values[1]))

    def __call__(self, x):
        return self.layer(jnp.fft.irfft(jnp.fft.rfft(x) * self.filter, n=6))


class SpectralLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        kernel = self.param(
            "kernel",
            linen.initializers.lecun_normal(dtype=jnp.complex64),
            (6, 3),
            jnp.complex64,
        )
        return jnp.abs(x.astype(jnp.complex64) @ kernel)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("model", [Spectral, SpectralLinen()])
def test_complex_parameters_descend(model, devices, data, tmp_path):
    if model is Spectral:
        losses, params = nnx_by_hand(model, data, lambda m, x, key: m(x))
    else:
        losses, params, _ = linen_by_hand(
            model, data, lambda apply, x, train, key: apply(x)
        )
    run = trainer(model, data, devices=devices)

    close(run.fit()["loss"], losses, rtol=5e-6)
    close(run.state.params, params, rtol=1e-5)
    assert losses[-1] != losses[0]

    run.save(tmp_path / "saved")
    again = trainer(model, data, devices=devices).load(tmp_path / "saved")

    jax.tree.map(np.testing.assert_array_equal, again.state.params, run.state.params)

    parts = trainer(model, data, devices=devices, micro_batches=2)

    close(parts.fit()["loss"], losses, rtol=1e-5)


def test_complex_parameters_with_adam_clipping_and_signals(data):
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
    module = Spectral(nnx.Rngs(0))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    state = optimizer.init(params)
    losses = []
    norms = []
    sizes = []
    for _, (x, y) in batches(data):

        def loss_of(params, x=x, y=y):
            return cross_entropy(nnx.merge(graph, params, rest)(x), y).mean()

        value, gradients = jax.value_and_grad(loss_of)(params)
        gradients = jax.tree.map(jnp.conj, gradients)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(value)
        norms.append(optax.tree.norm(gradients))
        sizes.append(optax.tree.norm(updates))
    watching = lepton.controllers.Policy(
        "watching",
        lambda: (),
        lambda signals, state: ({}, state),
        watches=("gradient_norm", "update_norm", "cosine"),
        moves=(),
    )
    run = trainer(
        Spectral,
        data,
        optimizer=optax.adam,
        learning_rate=0.05,
        clip_norm=0.5,
        controller=(watching,),
    )
    history = run.fit()

    close(history["loss"], np.array(losses), rtol=1e-5)
    close(history["gradient_norm"], np.array(norms), rtol=1e-5)
    close(history["update_norm"][1:], np.array(sizes[:-1]), rtol=1e-4)
    assert (abs(history["cosine"]) <= 1.0001).all()
    close(run.state.params, nnx.to_pure_dict(params), rtol=1e-4)


# ---- outputs in a tree ----


class Several(Plain):
    """Logits, next to a loss of its own and a place that is empty."""

    def __call__(self, x):
        logits = super().__call__(x)
        return {
            "logits": logits,
            "size": jnp.square(logits).mean(),
            "state": None,
            "one": 1.0,
        }


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("scalar", [False, True])
def test_outputs_may_hold_scalars_and_nothing(scalar, devices, data):
    def loss(outputs, targets):
        assert outputs["state"] is None
        values = cross_entropy(outputs["logits"], targets) * outputs["one"]
        values = values + 0.1 * outputs["size"]
        return values.mean() if scalar else values

    losses, params = nnx_by_hand(Several, data, lambda m, x, key: m(x), loss)
    run = trainer(Several, data, loss=loss, devices=devices)

    close(run.fit()["loss"], losses, rtol=5e-6)
    close(run.state.params, params, rtol=1e-5)


@pytest.mark.parametrize(
    ("outputs", "structure", "choice"),
    [
        (
            lambda x: (x, x[:, 0]),
            "(float32[24, 3], float32[24])",
            " cross_entropy(outputs[0], targets)",
        ),
        (
            lambda x: {"aux": x.mean(), "logits": x},
            '"logits": float32[24, 3]',
            '(outputs["logits"], targets)',
        ),
        (
            lambda x: [None, {"a": x}],
            '(None, {"a": float32[24, 3]})',
            '(outputs[1]["a"], targets)',
        ),
        (
            lambda x: optax.TraceState(trace=x),
            "(trace=float32[24, 3])",
            "(outputs.trace, targets)",
        ),
    ],
)
def test_a_tree_of_outputs_with_a_stock_loss_says_what_to_choose(
    outputs, structure, choice, data
):
    class Tree(Plain):
        def __call__(self, x):
            return outputs(super().__call__(x))

    with pytest.raises(ModelError) as caught:
        trainer(Tree, data).fit()

    assert structure in caught.value.remedy
    assert choice in caught.value.remedy


def test_the_remedy_for_a_tree_of_outputs_works(data):
    run = trainer(
        Several,
        data,
        loss=lambda outputs, targets: cross_entropy(outputs["logits"], targets),
    )
    close(run.fit()["loss"], trainer(Plain, data).fit()["loss"])
