"""Models as public repositories write them against loops written by hand."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest
from flax import nnx

import lepton_jax as lepton

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 4  # optimizer updates of a whole run
BATCH = 8  # samples an update; a row for each of eight devices
TRAIN = STEPS * BATCH
TEST = 20  # samples; the last batch of an evaluation has four of them
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, what its recipe says, and the same written by hand.

    Attributes:
      model: as a recipe takes it.
      data: a generator to (inputs, targets) of TRAIN + TEST samples.
      loss: as a recipe takes it.
      forward: (params, variables, inputs, key, train) to (outputs, variables after).
      served: the model for evaluation, where the repository has another one for it.
      fields: further fields of the recipe.
      decode: outputs to what `predict` gives of them, where `fields` does not say it.
    """

    model: Any
    data: Callable[[np.random.Generator], tuple[Any, Any]]
    loss: Callable[[Any, Any], Any]
    forward: Callable[..., tuple[Any, Any]]
    served: Any = None
    optimizer: Any = dataclasses.field(
        default_factory=lambda: optax.sgd(0.05, momentum=0.9)
    )
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    decode: Callable[[Any], Any] = lambda outputs: outputs

    def parts(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Training and test samples."""
        data = self.data(np.random.default_rng(0))
        train = jax.tree.map(lambda x: x[:TRAIN], data)
        test = jax.tree.map(lambda x: x[TRAIN:], data)
        return train, test

    def trainer(
        self,
        devices: int,
        served: bool = False,
        **options: Any,
    ) -> Any:
        train, test = self.parts()
        return lepton.Trainer(
            model=self.served if served and self.served is not None else self.model,
            loss=self.loss,
            optimizer=self.optimizer,
            train=train,
            test=test,
            save_every=STEPS // 2,
            batch_size=BATCH,
            steps=STEPS,
            shuffle=False,
            devices=devices,
            **self.fields,
            **options,
        )


# ---- how each kind of module is called by hand ----


def linen_by_hand(
    net: Any,
    call: Callable,
    served: Any = None,
) -> Callable:
    """The forward pass of a Linen module.

    Args:
      net: the module.
      call: (module's apply with its variables and options, inputs, train) to outputs.
      served: the module for evaluation, if it is another.
    """

    def forward(params, variables, inputs, key, train):
        module = net if train or served is None else served
        rngs = {"params": key, "dropout": jax.random.fold_in(key, 1)}
        outputs, after = call(
            partial(
                module.apply,
                {"params": params, **variables},
                rngs=rngs,
                mutable=list(variables) if train else [],
            ),
            inputs,
            train,
        )
        return outputs, {**variables, **after}

    return forward


def nnx_by_hand(build: Callable, call: Callable) -> Callable:
    """The forward pass of an NNX module; `call` is (module, inputs, key, train)."""

    def forward(params, variables, inputs, key, train):
        graph, own, rest = nnx.split(
            build(nnx.Rngs(0)),
            nnx.Param,
            ...,
        )
        nnx.replace_by_pure_dict(own, params)
        nnx.replace_by_pure_dict(rest, variables)
        module = nnx.merge(
            graph,
            own,
            rest,
            copy=True,
        )
        module.train() if train else module.eval()
        outputs = call(module, inputs, key, train)
        return outputs, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))

    return forward


def vae_by_hand(params, variables, inputs, key, train):
    """The forward pass of the VAE, which takes the key itself."""
    return VAE.apply({"params": params}, inputs, key), variables


# ---- data ----


def pictures(rng, shape, classes):
    x = rng.normal(size=(TRAIN + TEST, *shape)).astype(np.float32)
    return x, rng.integers(0, classes, len(x)).astype(np.int32)


def packed_text(rng):
    """Two documents a row, then padding; with positions and documents' numbers."""
    tokens = rng.integers(1, 16, (TRAIN + TEST, 12)).astype(np.int32)
    first = rng.integers(3, 6, (len(tokens), 1))
    second = rng.integers(4, 6, (len(tokens), 1))
    place = np.arange(12)[None]
    segments = np.where(
        place < first,
        1,
        np.where(place < first + second, 2, 0),
    )
    positions = np.where(segments == 2, place - first, place) * (segments > 0)
    tokens = tokens * (segments > 0)
    inputs = {
        "inputs": tokens,
        "inputs_positions": positions.astype(np.int32),
        "inputs_segmentation": segments.astype(np.int32),
    }
    return inputs, tokens


def additions(rng):
    """One-hot questions and answers of several lengths, each ended by token 1."""

    def strings(length):
        ids = rng.integers(
            2,
            7,
            (TRAIN + TEST, length),
        )
        ends = rng.integers(
            1,
            length,
            (len(ids), 1),
        )
        ids = np.where(
            np.arange(length) == ends,
            1,
            ids,
        )
        ids = np.where(
            np.arange(length) > ends,
            0,
            ids,
        )
        return np.eye(7, dtype=np.float32)[ids], ends[:, 0]

    questions, _ = strings(5)
    answers, ends = strings(4)
    inputs = {"encoder_inputs": questions, "decoder_inputs": answers}
    return inputs, {"labels": answers[:, 1:], "lengths": ends.astype(np.int32)}


def binary_pictures(rng):
    x = (rng.random((TRAIN + TEST, 12)) < 0.3).astype(np.float32)
    return x, x


def labelled_pictures(rng):
    """Several labels a picture, as 0 or 1 for each class."""
    image, label = pictures(rng, (8, 8, 3), 5)
    return {"image": image}, np.eye(5, dtype=np.float32)[label]


def next_tokens(rng, width=9):
    tokens = rng.integers(0, 16, (TRAIN + TEST, width)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def segmented_tokens(rng):
    tokens, targets = next_tokens(rng)
    segments = np.cumsum(rng.random(tokens.shape) < 0.15, axis=1) + 1
    return {"tokens": tokens, "segment_ids": segments.astype(np.int32)}, targets


def tokens_with_positions(rng):
    tokens, targets = next_tokens(rng)
    split = rng.integers(2, 7, (len(tokens), 1))
    place = np.arange(tokens.shape[1])[None]
    positions = np.where(
        place >= split,
        place - split,
        place,
    )
    return {"tokens": tokens, "segment_pos": positions.astype(np.int32)}, targets


# of a graph, with what fills it up
NODES = 5
EDGES = 7


def molecules(rng):
    """Graphs filled up to one size, and labels of which some are missing (NaN)."""
    count = TRAIN + TEST
    n_node = rng.integers(2, NODES, count)
    n_edge = rng.integers(1, EDGES, count)
    ends = rng.integers(0, 1_000, (2, count, EDGES)) % n_node[None, :, None]
    # an edge that only fills up begins and ends at a node that only fills up
    real = np.arange(EDGES)[None] < n_edge[:, None]
    senders, receivers = np.where(real, ends, NODES - 1).astype(np.int32)
    labels = (rng.random((count, 3)) < 0.5).astype(np.float32)
    inputs = {
        "nodes": rng.normal(size=(count, NODES, 4)).astype(np.float32),
        "edges": rng.normal(size=(count, EDGES, 2)).astype(np.float32),
        "senders": senders,
        "receivers": receivers,
        "n_node": n_node.astype(np.int32),
        "n_edge": n_edge.astype(np.int32),
    }
    return inputs, np.where(
        rng.random(labels.shape) < 0.2,
        np.nan,
        labels,
    )


def one_graph(inputs: dict[str, jax.Array]) -> public.GraphsTuple:
    """A batch of graphs as one: two for each sample, the graph and what fills it up."""
    batch = inputs["nodes"].shape[0]
    first = (jnp.arange(batch) * NODES)[:, None]

    def halves(count, size):
        return jnp.stack([count, size - count], axis=1).reshape(-1)

    return public.GraphsTuple(
        nodes=inputs["nodes"].reshape(batch * NODES, -1),
        edges=inputs["edges"].reshape(batch * EDGES, -1),
        senders=(inputs["senders"] + first).reshape(-1),
        receivers=(inputs["receivers"] + first).reshape(-1),
        globals=jnp.zeros((2 * batch, 1)),
        n_node=halves(inputs["n_node"], NODES),
        n_edge=halves(inputs["n_edge"], EDGES),
    )


def rays(rng):
    count = TRAIN + TEST
    directions = rng.normal(size=(count, 3)) + np.array([0, 0, 3])
    inputs = {
        "origins": rng.normal(0, 0.1, (count, 3)).astype(np.float32),
        "directions": directions.astype(np.float32),
        "viewdirs": directions.astype(np.float32),
    }
    return inputs, rng.random((count, 3)).astype(np.float32)


def noisy_pictures(rng):
    """Pictures at a time of the diffusion, and the noise that was added until then."""
    clean = rng.normal(size=(TRAIN + TEST, 8, 8, 1)).astype(np.float32)
    noise = rng.normal(size=clean.shape).astype(np.float32)
    time = rng.uniform(1e-3, 1.0, len(clean)).astype(np.float32)
    std = np.sqrt(1 - np.exp(-2 * time)).astype(np.float32)
    x = np.exp(-time)[:, None, None, None] * clean + std[:, None, None, None] * noise
    inputs = {"x": x.astype(np.float32), "labels": time * 999}
    return inputs, {"noise": noise, "std": std}


# ---- losses ----

cross_entropy = lepton.losses.cross_entropy


def of_tokens_that_count(outputs, tokens):
    return cross_entropy(outputs, tokens), (tokens > 0).astype(jnp.float32)


def of_answers(outputs, targets):
    logits, _ = outputs
    values = optax.softmax_cross_entropy(logits, targets["labels"])
    counts = jnp.arange(values.shape[1])[None] < targets["lengths"][:, None]
    return values, counts.astype(jnp.float32)


def negative_elbo(outputs, x):
    recon_x, mean, logvar = outputs
    bce = optax.sigmoid_binary_cross_entropy(recon_x, x).sum(axis=-1)
    kld = -0.5 * jnp.sum(
        1 + logvar - jnp.square(mean) - jnp.exp(logvar),
        axis=-1,
    )
    return bce + kld


def sigmoid_xent(outputs, labels):
    logits, _ = outputs
    return optax.sigmoid_binary_cross_entropy(logits, labels).sum(axis=-1)


def of_known_labels(outputs, labels):
    logits = outputs.globals[::2]  # every second graph only fills up
    known = ~jnp.isnan(labels)
    values = optax.sigmoid_binary_cross_entropy(logits, jnp.where(known, labels, 0))
    return values, known.astype(jnp.float32)


def of_both_levels(outputs, pixels):
    (coarse, *_), (fine, *_) = outputs
    return ((coarse - pixels) ** 2 + (fine - pixels) ** 2).mean(axis=-1)


def score_matching(outputs, targets):
    std = targets["std"][:, None, None, None]
    return jnp.square(outputs / std * std + targets["noise"]).mean(axis=(1, 2, 3))


# what a stock loss of labels implies
most_likely = partial(jnp.argmax, axis=-1)

# with an eps above the rounding errors of a gradient that is mathematically zero
ADAMW = optax.adamw(1e-3, eps=1e-4)


# ---- the models ----

MNIST = public.MnistCNN
RESNET = public.TinyResNet(num_classes=3)
LM = public.TransformerConfig(vocab_size=16)
LM_SERVED = public.TransformerLM(LM.replace(deterministic=True))
SEQ2SEQ = public.Seq2seq(
    teacher_force=True,
    hidden_size=8,
    vocab_size=7,
)
VAE = public.VAE(12)
VIT = public.ViT(
    5,
    variant="nano",
    dropout=0.1,
)
NANODO = public.TransformerDo(
    public.DoConfig(
        D=8,
        H=2,
        L=8,
        N=1,
        V=16,
        F=16,
        remat=True,
    )
)
BONSAI = partial(public.BottleneckResNet, public.ResNetConfig.nano())
GEMMA = partial(public.Gemma, public.GemmaConfig())
GRIFFIN = public.Griffin(
    public.GriffinConfig(
        vocab_size=16,
        width=8,
        mlp_expanded_width=12,
        num_heads=2,
        block_types=(
            public.TemporalBlockType.RECURRENT,
            public.TemporalBlockType.ATTENTION,
        ),
        attention_window_size=4,
    )
)
GRAPHS = public.GraphNet(6, 1, 1, 3)
NERF = public.NerfModel()
SCORE = public.ScoreUNet(public.ScoreConfig())

CASES = {
    "mnist": Case(
        model=MNIST,
        data=partial(
            pictures,
            shape=(8, 8, 1),
            classes=10,
        ),
        loss=cross_entropy,
        forward=nnx_by_hand(
            lambda rngs: MNIST(rngs),
            lambda net, x, key, train: net(x, nnx.Rngs(key) if train else None),
        ),
        decode=most_likely,
        fields={"metrics": {"accuracy": lepton.metrics.accuracy}},
    ),
    "imagenet": Case(
        model=RESNET,
        data=partial(
            pictures,
            shape=(8, 8, 3),
            classes=3,
        ),
        loss=cross_entropy,
        # by hand the batch is whole: there is no axis to average over
        forward=linen_by_hand(
            RESNET.clone(axis_name=None),
            lambda apply, x, train: apply(x, train=train),
        ),
        decode=most_likely,
        optimizer=optax.sgd(
            0.05,
            momentum=0.9,
            nesterov=True,
        ),
        fields={"metrics": {"accuracy": lepton.metrics.accuracy}},
    ),
    "lm1b": Case(
        model=public.TransformerLM(LM),
        served=LM_SERVED,
        data=packed_text,
        optimizer=ADAMW,
        loss=of_tokens_that_count,
        forward=linen_by_hand(
            public.TransformerLM(LM),
            lambda apply, x, train: apply(**x),
            LM_SERVED,
        ),
    ),
    "seq2seq": Case(
        model=SEQ2SEQ,
        data=additions,
        loss=of_answers,
        forward=linen_by_hand(
            SEQ2SEQ,
            lambda apply, x, train: apply(x["encoder_inputs"], x["decoder_inputs"]),
        ),
    ),
    "vae": Case(
        model=VAE,
        data=binary_pictures,
        optimizer=ADAMW,
        loss=negative_elbo,
        forward=vae_by_hand,
    ),
    "big_vision": Case(
        model=VIT,
        data=labelled_pictures,
        loss=sigmoid_xent,
        forward=linen_by_hand(
            VIT,
            lambda apply, x, train: apply(x["image"], train=train),
        ),
    ),
    "nanodo": Case(
        model=NANODO,
        data=next_tokens,
        loss=cross_entropy,
        forward=linen_by_hand(
            NANODO,
            lambda apply, x, train: apply(x),
        ),
        fields={"decode": lambda logits: logits},
    ),
    "bonsai": Case(
        model=BONSAI,
        data=partial(
            pictures,
            shape=(8, 8, 3),
            classes=3,
        ),
        loss=cross_entropy,
        forward=nnx_by_hand(
            lambda rngs: BONSAI(rngs=rngs),
            lambda net, x, key, train: net(x),
        ),
        fields={"decode": jax.nn.softmax},
    ),
    "gemma": Case(
        model=GEMMA,
        data=segmented_tokens,
        optimizer=ADAMW,
        loss=lambda outputs, targets: cross_entropy(outputs["logits"], targets),
        forward=nnx_by_hand(
            lambda rngs: GEMMA(rngs=rngs),
            lambda net, x, key, train: net(**x),
        ),
    ),
    "recurrentgemma": Case(
        model=GRIFFIN,
        data=tokens_with_positions,
        loss=lambda outputs, targets: cross_entropy(outputs[0], targets),
        forward=linen_by_hand(
            GRIFFIN,
            lambda apply, x, train: apply(x["tokens"], x["segment_pos"]),
        ),
    ),
    "ogbg": Case(
        model=GRAPHS,
        data=molecules,
        loss=of_known_labels,
        forward=linen_by_hand(
            GRAPHS,
            lambda apply, x, train: apply(one_graph(x)),
        ),
        fields={"preprocess": one_graph, "decode": lambda graphs: graphs.globals[::2]},
    ),
    "nerf": Case(
        model=NERF,
        data=rays,
        loss=of_both_levels,
        forward=linen_by_hand(
            NERF,
            lambda apply, x, train: apply(
                x["origins"],
                x["directions"],
                x["viewdirs"],
                randomized=train,
            ),
        ),
    ),
    "score_sde": Case(
        model=SCORE,
        data=noisy_pictures,
        loss=score_matching,
        forward=linen_by_hand(
            SCORE,
            lambda apply, x, train: apply(
                x["x"],
                x["labels"],
                train=train,
            ),
        ),
    ),
}


# ---- by hand ----


def mean_of(result: Any) -> Any:
    """The mean over a batch of what a loss returns."""
    if isinstance(result, tuple):
        values, weights = result
        return (values * weights).sum() / weights.sum()
    return result.mean()


def train_by_hand(
    case: Case,
    params: Any,
    variables: Any,
) -> tuple[Any, Any, Any]:
    """(losses, parameters, variables) after STEPS updates on the training samples."""
    train, _ = case.parts()
    opt_state = case.optimizer.init(params)

    @jax.jit
    def step(
        params,
        variables,
        opt_state,
        index,
        inputs,
        targets,
    ):
        key = jax.random.fold_in(jax.random.key(0), index)

        def loss_of(params):
            outputs, after = case.forward(
                params,
                variables,
                inputs,
                key,
                True,
            )
            return mean_of(case.loss(outputs, targets)), after

        (loss, after), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = case.optimizer.update(
            gradients,
            opt_state,
            params,
        )
        return optax.apply_updates(params, updates), after, opt_state, loss

    losses = []
    for index in range(STEPS):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        batch = jax.tree.map(
            lambda x, rows=rows: x[rows],
            train,
        )
        params, variables, opt_state, loss = step(
            params, variables, opt_state, index, *batch
        )
        losses.append(loss)
    return np.array(losses), params, variables


def evaluate_by_hand(
    case: Case,
    params: Any,
    variables: Any,
) -> tuple[float, Any]:
    """(loss, outputs as predicted) of the test samples, batch by batch.

    Each batch draws the same random numbers.
    """
    _, test = case.parts()
    decode = case.fields.get("decode", case.decode)

    @jax.jit
    def evaluate(params, variables, inputs, targets):
        outputs, _ = case.forward(
            params,
            variables,
            inputs,
            jax.random.key(0),
            False,
        )
        return case.loss(outputs, targets), decode(outputs)

    found = []
    for start in range(0, TEST, BATCH):
        rows = np.arange(start, start + BATCH) % TEST
        batch = jax.tree.map(
            lambda x, rows=rows: x[rows],
            test,
        )
        found.append(evaluate(params, variables, *batch))
    result, outputs = jax.tree.map(lambda *x: np.concatenate(x)[:TEST], *found)
    return float(mean_of(result)), outputs


def near(actual: Any, expected: Any) -> None:
    """Assert that two trees of arrays have the same shape and nearly same values."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        partial(
            np.testing.assert_allclose,
            rtol=TOLERANCE,
            atol=TOLERANCE,
        ),
        actual,
        expected,
    )


# ---- the tests ----


class Runs:
    """Runs that several tests look at: each is made once, when it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._made: dict[Any, Any] = {}

    def once(
        self,
        name: Any,
        make: Callable[[], Any],
    ) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def run_dir(
        self,
        name: str,
        devices: int,
    ) -> Path:
        return self.folder / f"{name}-{devices}"

    def whole(
        self,
        name: str,
        devices: int,
    ) -> Any:
        """A trainer that has trained all STEPS, and its history."""

        def make():
            run = CASES[name].trainer(
                devices,
                run_dir=self.run_dir(name, devices),
            )
            return run, run.fit()

        return self.once((name, devices), make)

    def fresh(
        self,
        name: str,
        devices: int,
        **options: Any,
    ) -> Any:
        """Another trainer; it follows the plan of `whole`, for a search takes long."""
        run, _ = self.whole(name, devices)
        same = CASES[name].served is None or "served" not in options
        plan = run.program.plan if same else None
        return CASES[name].trainer(
            devices,
            plan=plan,
            **options,
        )

    def saved(
        self,
        name: str,
        devices: int,
    ) -> Path:
        """The model that `whole` has saved."""

        def make():
            run, _ = self.whole(name, devices)
            return run.save(self.folder / f"{name}-{devices}-saved")

        return self.once((name, devices, "saved"), make)

    def serving(
        self,
        name: str,
        devices: int,
    ) -> Any:
        """A fresh trainer that has loaded what `whole` has saved."""

        def make():
            fresh = self.fresh(name, devices, served=True)
            return fresh.load(self.saved(name, devices))

        return self.once((name, devices, "serving"), make)

    def by_hand(self, name: str) -> tuple[Any, Any, Any]:
        """Losses, parameters and variables of the loop written by hand."""

        def make():
            run, _ = self.whole(name, 1)
            state = run.program.init(0)
            return train_by_hand(
                CASES[name],
                state.params,
                state.variables,
            )

        return self.once((name, "by hand"), make)

    def evaluated_by_hand(self, name: str) -> tuple[float, Any]:
        """Loss and predictions, computed by hand, of what was trained by hand."""

        def make():
            _, params, variables = self.by_hand(name)
            return evaluate_by_hand(CASES[name], params, variables)

        return self.once((name, "evaluated"), make)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("public"))


# By default seven models run on one device, and on eight one whose layers are a loop:
# this file takes as long as compiling does.
SLOW_TO_COMPILE = ("score_sde", "recurrentgemma", "bonsai", "nerf", "lm1b", "seq2seq")
QUICK = CASES.keys() - set(SLOW_TO_COMPILE)
ON_EIGHT = ("nanodo",)
PLACES = [
    pytest.param(
        name,
        devices,
        id=f"{name}-{devices}",
        marks=() if name in (QUICK if devices == 1 else ON_EIGHT) else pytest.mark.slow,
    )
    for devices in (1, 8)
    for name in CASES
]
over_models_and_devices = pytest.mark.parametrize(("name", "devices"), PLACES)


@over_models_and_devices
def test_training_is_the_loop_written_by_hand(name, devices, runs):
    run, history = runs.whole(name, devices)
    losses, params, variables = runs.by_hand(name)
    near(history["loss"], losses)
    near(run.state.params, params)
    near(run.state.variables, variables)


@over_models_and_devices
def test_evaluation_is_the_one_written_by_hand(name, devices, runs):
    loss, _ = runs.evaluated_by_hand(name)
    serving = runs.serving(name, devices)
    assert serving.evaluate().loss == pytest.approx(loss, rel=TOLERANCE)
    assert serving.evaluate().loss == serving.evaluate().loss

    _, history = runs.whole(name, devices)
    ((step, metrics),) = history.evaluations
    assert step == STEPS
    assert np.isfinite(metrics["loss"])
    if CASES[name].served is None:
        assert metrics["loss"] == pytest.approx(loss, rel=TOLERANCE)


@over_models_and_devices
def test_predictions_of_what_is_saved_and_loaded_are_those_by_hand(name, devices, runs):
    _, expected = runs.evaluated_by_hand(name)
    _, (inputs, _) = CASES[name].parts()
    predicted = runs.serving(name, devices).predict(inputs)
    assert {len(leaf) for leaf in jax.tree.leaves(predicted)} == {TEST}
    near(predicted, expected)
    if CASES[name].served is None:
        run, _ = runs.whole(name, devices)
        jax.tree.map(
            np.testing.assert_array_equal,
            run.predict(inputs),
            predicted,
        )


@over_models_and_devices
def test_a_run_resumed_half_way_ends_as_the_whole_run_to_the_bit(name, devices, runs):
    whole, history = runs.whole(name, devices)
    folder = runs.folder / f"{name}-{devices}-resumed"
    shutil.copytree(runs.run_dir(name, devices), folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    resumed = runs.fresh(name, devices, run_dir=folder).resume()
    assert resumed.step == STEPS // 2

    later = resumed.fit()
    np.testing.assert_array_equal(later["loss"], history["loss"][STEPS // 2 :])
    for part in ("params", "variables", "optimizer"):
        jax.tree.map(
            np.testing.assert_array_equal,
            getattr(resumed.state, part),
            getattr(whole.state, part),
        )
