"""Samples count by how likely their label is right.

This is tested in the step, in the policy, and on a real task.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import lepton_jax as lepton
from lepton_jax import controllers, losses

LIMIT = 1.1
MARK = 0.7
ROWS = 32
BLANK = np.log(10)  # the loss of a model of ten classes that knows nothing


def fixed(limit, mark=MARK):
    """A policy that sets both knobs and shows all that is measured with them."""
    watches = (
        "loss_kept",
        "loss_blank",
        "loss_values",
        "mark_weight",
        "mark_weight_square",
        "gradient_norm",
    )
    return controllers.Policy(
        "fixed",
        lambda: (),
        lambda signals, state: ({"loss_limit": limit, "loss_mark": mark}, state),
        watches,
        ("loss_limit", "loss_mark"),
    )


def mean_loss(outputs, targets):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def weighted(outputs, targets):
    return losses.cross_entropy(outputs, targets), 1.0 + targets


def by_token(outputs, targets):
    return jnp.stack(
        [
            losses.cross_entropy(outputs, targets),
            losses.cross_entropy(-outputs, targets),
        ],
        axis=1,
    )


def trained(blobs, loss, policy, steps=3, **fields):
    fields = {
        "optimizer": optax.sgd,
        "learning_rate": 0.05,
        "batch_size": ROWS,
        "shuffle": False,
        "devices": 1,
    } | fields
    trainer = lepton.Trainer(
        model=lambda rngs: lepton.models.MLP((12, 16, 3), rngs=rngs),
        loss=loss,
        train=blobs,
        controller=policy,
        **fields,
    )
    return trainer, trainer.fit(steps=steps)


@pytest.mark.parametrize("loss", [losses.cross_entropy, mean_loss, weighted, by_token])
def test_the_gradient_is_of_the_weighted_loss_and_the_signals_say_so(loss, blobs):
    trainer, history = trained(blobs, loss, fixed(LIMIT), steps=2)
    plain, _ = trained(blobs, loss, (), steps=1)  # the knobs act in the second step
    graph = plain.trace.functional
    inputs, targets = (a[ROWS : 2 * ROWS] for a in blobs)
    given = losses.cross_entropy if loss is mean_loss else loss

    def by_hand(params):
        result = given(
            graph.apply(params, plain.state.variables, inputs, None, True)[0], targets
        )
        values, weights = (
            result if isinstance(result, tuple) else (result, jnp.ones_like(result))
        )
        kept = jax.lax.stop_gradient(jax.nn.sigmoid(LIMIT - values))
        share = jax.nn.sigmoid(MARK - values)
        measured = [
            (x * weights).sum() / weights.sum() for x in (values, share, share**2)
        ]
        return (values * weights * kept).sum() / weights.sum(), measured

    (kept, (mean, weight, square)), gradient = jax.value_and_grad(
        by_hand, has_aux=True
    )(plain.state.params)
    expected = {
        "loss": mean,
        "loss_kept": kept,
        "mark_weight": weight,
        "mark_weight_square": square,
        "gradient_norm": optax.tree.norm(gradient),
        "loss_blank": np.log(3),
        "loss_values": 2 if loss is by_token else 1,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(history[name][1], value, rtol=1e-5, err_msg=name)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(
            new, old - 0.05 * g, rtol=1e-4, atol=1e-6
        ),
        trainer.state.params,
        plain.state.params,
        gradient,
    )

    assert history["loss_kept"][0] == history["loss"][0], (
        "neutral before the first move"
    )
    assert history["mark_weight"][0] == 1, "neutral before the first move"


@pytest.mark.usefixtures("quick_compilation_here")
@pytest.mark.parametrize(
    "fields",
    [
        {"micro_batches": 4},
        {"devices": 8},
        {"devices": 8, "micro_batches": 2},
        {"steps_per_call": 4},
    ],
)
def test_micro_batches_and_devices_make_no_difference(fields, blobs):
    _, whole = trained(blobs, losses.cross_entropy, fixed(LIMIT), steps=8)
    _, parts = trained(blobs, losses.cross_entropy, fixed(LIMIT), steps=8, **fields)
    for name in (
        "loss",
        "loss_kept",
        "mark_weight",
        "mark_weight_square",
        "loss_blank",
        "gradient_norm",
    ):
        np.testing.assert_allclose(parts[name], whole[name], rtol=2e-5, err_msg=name)

    assert parts.compilations <= 1 + (fields.get("steps_per_call") is None)


def test_a_scalar_loss_that_is_not_limited_keeps_its_bits(blobs):
    silent = controllers.Policy(
        "silent",
        lambda: (),
        lambda signals, state: ({}, state),
        (),
        ("loss_limit", "loss_mark"),
    )
    (left, one), (right, two) = (
        trained(blobs, mean_loss, policy, steps=20) for policy in ((), silent)
    )

    np.testing.assert_array_equal(one["loss"], two["loss"])
    jax.tree.map(np.testing.assert_array_equal, left.state.params, right.state.params)


# ---- the policy alone ----


class Labels:
    """The policy, and the losses of a model that is right about most samples.

    Each batch has a share of wrong labels.
    """

    def __init__(self, **options):
        self.policy = controllers.label_noise(**options)
        self.random = np.random.default_rng(0)
        self.update = jax.jit(self.policy.update)
        self.state = self.policy.init()
        self.moves = {"loss_limit": np.inf, "loss_mark": np.inf}
        self.step(0.0, loss=np.log(10))  # a model that knows nothing yet

    def step(self, share, update_norm=0.01, loss=None, rows=128, blank=BLANK):
        wrong = self.random.random(rows) < share
        each = np.where(
            wrong, self.random.uniform(3, 9, rows), self.random.exponential(0.1, rows)
        )
        above = each - float(self.moves["loss_mark"])
        weight = 1 / (1 + np.exp(np.minimum(above, 500)))
        signals = {
            "mark_weight": weight.mean(),
            "mark_weight_square": (weight**2).mean(),
            "update_norm": update_norm,
            "loss": each.mean() if loss is None else loss,
            "loss_blank": blank,
            "loss_values": 1,
            "batch_size": rows,
        }
        moves, self.state = self.update(
            {n: jnp.float32(x) for n, x in signals.items()}, self.state
        )
        self.moves = {n: float(x) for n, x in moves.items()}
        return self.moves

    def burst(self, blank):
        """A batch whose samples all look as wrong as can be."""
        none = {"mark_weight": 0.0, "mark_weight_square": 0.0, "loss": 1e4}
        usual = {"update_norm": 0.01, "loss_values": 1, "batch_size": 128}
        signals = none | usual | {"loss_blank": blank}
        moves, self.state = self.update(
            {n: jnp.float32(x) for n, x in signals.items()}, self.state
        )
        self.moves = {n: float(x) for n, x in moves.items()}

    def steps(self, count, *args, **fields):
        return [self.step(*args, **fields) for _ in range(count)]


def limited(moves):
    return [np.isfinite(m["loss_limit"]) for m in moves]


def test_noise_is_found_at_once_estimated_and_let_go():
    labels = Labels()
    calm = labels.steps(300, 0.01)

    assert not any(limited(calm))
    assert not any(m["skip"] for m in calm)
    assert labels.step(0.3)["skip"], "the first batch is not applied"

    noisy = labels.steps(60, 0.3)

    assert all(limited(noisy))
    assert not any(m["skip"] for m in noisy)
    assert float(labels.state.share) == pytest.approx(0.3, abs=0.06)
    assert not any(m["notice"] for m in [*calm, *noisy])

    after = limited(labels.steps(120, 0.01))

    assert not any(after[60:]), "and it is over soon after the noise is"
    assert np.isfinite(labels.step(0.3)["loss_limit"]), "and found again"


def test_a_loss_that_is_no_likelihood_of_classes_is_left_alone():
    labels = Labels()
    labels.step(0.01, blank=0.7)  # as of a squared error: another batch, another one

    assert not any(limited(labels.steps(60, 0.01)))
    assert not any(m["skip"] for m in labels.steps(60, 0.9))
    assert not any(limited(labels.steps(60, 0.3)))


@pytest.mark.parametrize("classes", [2, 10])
def test_after_a_burst_of_any_size_the_right_labels_are_learned_from_again(classes):
    blank = np.log(classes)
    labels = Labels()
    labels.state = labels.policy.init()
    labels.step(0.0, loss=blank, blank=blank)
    labels.steps(100, 0.01, blank=blank)
    for _ in range(20):
        labels.burst(blank)
    after = labels.steps(40, 0.01, blank=blank)

    assert not any(m["skip"] for m in after[2:])
    assert not any(limited(after[30:]))


def test_noise_that_lasts_is_said_once():
    labels = Labels()
    labels.steps(100, 0.01)

    assert [m["notice"] for m in labels.steps(150, 0.3)].count(1.0) == 1


def test_a_small_share_is_found_by_its_sum():
    labels = Labels()
    labels.steps(200, 0.01)

    assert any(limited(labels.steps(60, 0.06)))


def test_noise_from_the_beginning_is_usual():
    assert not any(limited(Labels().steps(300, 0.3)))


def test_too_much_noise_is_skipped_for_as_long_as_the_budget_lasts():
    labels = Labels(budget=15, window=10**6)
    labels.steps(100, 0.01)
    moves = labels.steps(200, 0.95)
    skips = [m["skip"] for m in moves]

    assert sum(skips) == 15
    assert not any(skips[40:])
    assert 2.0 in [m["notice"] for m in moves], "a person is told"
    assert not any(limited(labels.steps(50, 0.95))), "then it is the new usual"


def test_what_an_update_broke_is_not_blamed_on_the_labels():
    labels = Labels()
    labels.steps(100, 0.01)

    assert not any(limited(labels.steps(50, 0.9, update_norm=3.0)))

    labels = Labels()
    labels.steps(100, 0.01)

    assert limited(labels.steps(10, 0.3))[-1]
    assert not any(limited(labels.steps(10, 0.9, update_norm=3.0)))


def test_a_loss_that_is_no_number_changes_nothing():
    labels = Labels()
    labels.steps(50, 0.01)
    before = jax.device_get(labels.state)
    moves = labels.step(0.01, loss=np.nan)

    assert not moves["skip"]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(labels.state))


@pytest.mark.parametrize(
    "options", [{"most": 0}, {"most": 1.0}, {"budget": 0}, {"window": 1.5}]
)
def test_arguments_out_of_range_are_errors(options):
    with pytest.raises(lepton.RecipeError, match=next(iter(options))):
        controllers.label_noise(**options)


# ---- on a real task ----

# a window is longer than the 30 steps that the guard alone would skip
BATCH = 50
STEPS = 500
AT = 200
BLOCK = 20
SPANS = {
    "clean": (0, 0.0),
    "window": (100, 0.5),
    "lasting": (STEPS, 0.2),
    "most": (60, 0.8),
}


@cache
def digits():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    y = y.astype(np.int32)
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


@cache
def program(controller):
    recipe = lepton.Recipe(
        model=partial(lepton.models.MLP, (64, 64, 10)),
        loss=losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=1e-2,
        batch_size=BATCH,
        steps_per_call=BLOCK,
        controller=controller(),
    )
    topology, devices = lepton.hardware.here(1)
    trace = lepton.trace(recipe, *digits()[0])
    return lepton.Program(trace, lepton.plan(trace, topology), devices)


@cache
def final(fault, seed, controller):
    """Train a run, the labels of some of whose steps are wrong.

    Returns:
      The evaluation loss at the end, and the records by name.
    """
    random = np.random.default_rng(seed)
    train, test = digits()
    inputs, labels = faulty(train, fault, random)
    made = program(controller)

    state = controllers.with_measurements(made.init(seed), steps=float(STEPS))
    records = []
    for block in zip(in_blocks(inputs), in_blocks(labels), strict=True):
        placed = jax.device_put(block, made.block_sharding)
        state, record = made.train(state, placed, 0, BLOCK)
        records.append(np.asarray(record))

    placed = jax.device_put(test, made.batch_sharding)
    sums = made.evaluate(None, state, placed, len(test[1]))
    columns = np.concatenate(records).T
    return made.metrics(sums)["loss"], dict(zip(made.records, columns, strict=True))


def faulty(data, fault, random):
    """Return shuffled samples for all steps, with a fault in their labels."""
    x, y = data
    epochs = [random.permutation(len(x)) for _ in range(18)]
    rows = np.concatenate(epochs)[: BATCH * STEPS]
    steps, share = SPANS[fault]
    hit = random.random(len(rows)) < share
    wrong = np.where(hit, random.integers(1, 10, len(rows)), 0)
    wrong[: BATCH * AT] = 0
    wrong[BATCH * (AT + steps) :] = 0
    return x[rows], ((y[rows] + wrong) % 10).astype(np.int32)


def in_blocks(samples):
    return samples.reshape(-1, BLOCK, BATCH, *samples.shape[1:])


def careful():
    """Return the policies of a run at a rate that is given, this one among them."""
    return controllers.chain(
        controllers.guard(deviations=6.0),
        controllers.label_noise(),
        controllers.decay(0.5, "linear", 0.1),
        controllers.averaging(decay=None, share=0.15),
    )


def without():
    """Return the same without this policy."""
    return tuple(policy for policy in careful() if policy.name != "label_noise")


@pytest.mark.usefixtures("quick_compilation_here")
@pytest.mark.parametrize(
    "fault", [pytest.param("window", marks=pytest.mark.slow), "lasting", "most"]
)
def test_wrong_labels_cost_less_than_one_per_cent(fault):
    ratios = []
    bare = []
    gave_up = False
    for seed in range(4):
        clean, undisturbed = final("clean", seed, careful)
        assert not np.isfinite(undisturbed["label_noise:loss_limit"]).any()
        assert not undisturbed["label_noise:skip"].any()
        loss, records = final(fault, seed, careful)
        assert np.isfinite(records["label_noise:loss_limit"][AT : AT + 3]).any()
        assert not records["rollback"].any()
        ratios.append(loss / clean)
        loss, records = final(fault, seed, without)
        bare.append(loss / final("clean", seed, without)[0])
        gave_up |= records["rollback"].any()

    assert np.mean(ratios) < 1.01
    assert gave_up or np.mean(bare) > 1.01, (
        "the same controller without this policy goes back, or misses the bar"
    )
