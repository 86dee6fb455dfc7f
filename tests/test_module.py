"""Modules as people write them: modes, random streams, sown values, bare arrays, axis
names, complex parameters; each against the loop written by hand."""

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

STEPS, BATCH = 4, 24
RATE = 0.1
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 6)).astype(np.float32)
    return x, (x @ rng.normal(size=(6, 3))).argmax(1).astype(np.int32)


def trainer(model, data, **fields):
    fields = {"loss": cross_entropy, "optimizer": optax.sgd(RATE), "devices": 1} | fields
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
    """Losses, parameters and other variables of a plain loop.

    Args:
      call: (apply, inputs, train, key) to what `apply` gives.
      auxiliary: of the mutated collections, what is added to the loss.
    """
    x = jax.tree.map(lambda x: x[:BATCH], data[0])
    if variables is None:
        init = partial(net.init, jax.random.key(0))
        variables = call(init, x, False, jax.random.key(0))
    variables = dict(variables)
    params = variables.pop("params")
    sown = {n: variables.pop(n) for n in ("losses", "intermediates", "extra") if n in variables}
    mutable = [*variables, *sown]

    @jax.jit
    def step(params, variables, key, x, y):
        def loss_of(params):
            apply = partial(net.apply, {"params": params, **variables})
            rngs = {"params": key, "dropout": jax.random.fold_in(key, 1)}
            outputs, after = call(partial(apply, mutable=mutable, rngs=rngs), x, True, key)
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
    """Losses and parameters of a plain loop; `call`: (module, inputs, key) to outputs."""
    module = build(nnx.Rngs(0))

    def loss_of(module, key, x, y):
        value = loss(call(module, x, key), y).mean()
        return value + (auxiliary(module) if auxiliary else 0)

    @nnx.jit
    def step(module, key, x, y):
        module.train()
        value, gradients = nnx.value_and_grad(loss_of)(module, key, x, y)
        params = nnx.state(module, nnx.Param)
        nnx.update(module, jax.tree.map(lambda p, g: p - RATE * jnp.conj(g), params, gradients))
        nnx.pop(module, nnx.Intermediate)
        return value

    losses = [step(module, step_key(i), x, y) for i, (x, y) in batches(data)]
    return np.array(losses), nnx.to_pure_dict(nnx.state(module, nnx.Param))


# ---- the mode -----------------------------------------------------------------------

NAMES = [
    ("train", True), ("is_training", True), ("training_mode", True), ("enable_dropout", True),
    ("deterministic", False), ("inference", False), ("eval", False), ("is_eval", False),
    ("testing", False), ("is_test", False),
    ("active", True), ("frozen", False), ("regularize", True), ("serving", False),
]  # fmt: skip
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
    """A Linen and an NNX module whose mode goes by a name."""
    text = {"off": f"={not sense}", "on": f"={sense}", "required": ""}[default]
    found = {"linen": linen, "nnx": nnx}
    exec(CLASSES.format(name=name, sense=sense, default=text), found)
    return found["Linen"], found["Nnx"]


@pytest.fixture(scope="module")
def linen_losses(data):
    net = classes("train", True)[0]()
    return linen_by_hand(net, data, lambda apply, x, train, key: apply(x, train=train))


@pytest.fixture(scope="module")
def nnx_losses(data):
    return nnx_by_hand(classes("train", True)[1], data, lambda m, x, key: m(x, train=True))


@pytest.mark.parametrize(("name", "sense"), NAMES)
def test_a_mode_by_any_name_is_set(name, sense, data):
    inputs = jax.ShapeDtypeStruct((BATCH, 6), jnp.float32)
    for model in (classes(name, sense)[0](), classes(name, sense)[1]):
        module = lepton.module.functional(model, inputs)
        first = jax.eval_shape(module.init, jax.random.key(0))
        programs = [
            jax.make_jaxpr(lambda p, v, x, k, t=t: module.apply(p, v, x, k, t)[:2])(
                *first, inputs, jax.random.key(0)
            )
            for t in (True, False)
        ]
        assert ["random_bits" in str(program) for program in programs] == [True, False]


@pytest.mark.parametrize("default", ["off", "on"])
@pytest.mark.parametrize(("name", "sense"), [("is_eval", False), ("frozen", False), ("active", True)])
def test_linen_with_a_mode_of_its_own_trains_as_by_hand(name, sense, default, data, linen_losses):
    losses, params, variables = linen_losses
    run = trainer(classes(name, sense, default)[0](), data)
    close(run.fit()["loss"], losses)
    close(run.state.params, params)
    close(run.state.variables, variables)


@pytest.mark.parametrize("default", ["off", "on"])
@pytest.mark.parametrize(("name", "sense"), [("testing", False), ("serving", False), ("regularize", True)])
def test_nnx_with_a_mode_of_its_own_trains_as_by_hand(name, sense, default, data, nnx_losses):
    losses, params = nnx_losses
    run = trainer(classes(name, sense, default)[1], data)
    close(run.fit()["loss"], losses)
    close(run.state.params, params)
    np.testing.assert_array_equal(run.evaluate(data), run.evaluate(data))


@pytest.mark.parametrize(("argument", "sense"), [("go", True), ("not go", False)])
def test_train_argument_names_a_required_boolean(argument, sense, data, linen_losses, nnx_losses):
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

    lepton.module.functional(Counting, jax.ShapeDtypeStruct((BATCH, 6), jnp.float32))
    assert sorted(calls) == [False, True]


# ---- random streams -----------------------------------------------------------------


class TakesRngs(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs):
        return self.last(self.drop(self.first(x), rngs=rngs))


class MayTakeRngs(TakesRngs):
    def __call__(self, x, rngs=None):
        x = self.first(x)
        return self.last(x if rngs is None else self.drop(x, rngs=rngs))


class TakesRngsWhereItDrops(TakesRngs):
    def __call__(self, x, rngs: nnx.Rngs | None = None, deterministic=None):
        return self.last(self.drop(self.first(x), rngs=rngs, deterministic=deterministic))


class TakesKey(TakesRngs):
    def __call__(self, x, key):
        noise = jax.random.normal(key, x.shape)
        return self.last(self.first(x + noise))


@pytest.mark.parametrize("model", [TakesRngs, MayTakeRngs, TakesRngsWhereItDrops, TakesKey])
def test_rngs_and_keys_are_filled_from_the_key_of_the_step(model, data):
    def call(module, x, key):
        return module(x, key=key) if model is TakesKey else module(x, rngs=nnx.Rngs(key))

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
            nnx.Linear(6, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
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


def test_linen_takes_a_key(data):
    net = LinenKey()
    losses, params, _ = linen_by_hand(
        net, data, lambda apply, x, train, key: apply(x, key, train)
    )
    run = trainer(net, data)
    close(run.fit()["loss"], losses)
    close(run.state.params, params)


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


@pytest.mark.parametrize("net", [Noisy("dropout"), Noisy("sampling"), Noisy("lstm", True)])
def test_linen_may_draw_outside_of_training(net, data):
    call = lambda apply, x, train, key: apply(x, train)  # noqa: E731
    losses, params, _ = linen_by_hand(net, data, call)
    run = trainer(net, data, test=data)
    close(run.fit()["loss"], losses)
    key = jax.random.key(0)
    outputs = net.apply(
        {"params": params}, data[0][:BATCH], False,
        rngs={"params": key, "dropout": jax.random.fold_in(key, 1)},
    )  # fmt: skip
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
    plain = cross_entropy(Asking().apply({"params": run.state.params}, data[0]), data[1])
    close(run.evaluate(data).loss, plain.mean(), rtol=1e-5)


# ---- bare arrays --------------------------------------------------------------------


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


class Nested(nnx.Module):
    def __init__(self, rngs):
        self.parts = nnx.List([Bare(rngs), Closing(rngs)])
        self.key = jax.random.key(7)

    def __call__(self, x):
        noise = jax.random.normal(self.key, x.shape[1:])
        return self.parts[0](x + noise) + self.parts[1](x)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("model", [Bare, Closing, Nested])
def test_a_bare_array_is_a_constant_that_a_checkpoint_holds(model, devices, data, tmp_path):
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


# ---- axis names ---------------------------------------------------------------------


class Normed(linen.Module):
    axis: str | None

    @linen.compact
    def __call__(self, x, train):
        norm = linen.BatchNorm(use_running_average=not train, axis_name=self.axis)
        return linen.Dense(3)(norm(linen.Dense(8)(x)))


class NormedNnx(nnx.Module):
    def __init__(self, rngs, axis=None):
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
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
    np.testing.assert_array_equal(named.predict(data[0]).argmax(-1), plain.predict(data[0]))
