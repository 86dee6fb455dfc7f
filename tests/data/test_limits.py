"""Values out of range are named wherever the data enters."""

import grain
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.data import Source, mix
from lepton_jax.losses import cross_entropy

pytestmark = pytest.mark.usefixtures("quick_compilation")

SAMPLES = 48
IDS = np.random.default_rng(0).integers(0, 50, (SAMPLES, 6)).astype(np.int32)
LABELS = np.random.default_rng(1).integers(0, 3, SAMPLES).astype(np.int32)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(50, 8, rngs=rngs)
        self.layer = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer(self.table(x).mean(1))


class NextToken(Net):
    def __call__(self, x):
        return self.table.attend(self.table(x))


def spoiled(x, *changes):
    x = x.copy()
    for place, value in changes:
        x[place] = value
    return x


LATE = spoiled(
    LABELS,
    (30, -1),
    (41, 3),
)
WRONG_IDS = spoiled(IDS, ((33, 2), 50))


def in_memory(inputs, targets):
    return inputs, targets


def as_elements(inputs, targets):
    return grain.MapDataset.source(
        list(
            zip(
                inputs,
                targets,
                strict=True,
            )
        )
    )


def as_iterable(inputs, targets):
    return as_elements(inputs, targets).repeat().to_iter_dataset()


def as_source(inputs, targets):
    return Source((inputs, targets), name="texts")


def as_mixture(inputs, targets):
    parts = {"good": Source((IDS, LABELS)), "late": Source((inputs, targets))}
    return mix(parts, weights={"good": 1, "late": 1})


def trainer(**fields):
    defaults = {
        "model": Net,
        "loss": cross_entropy,
        "optimizer": optax.sgd(0.1),
    }
    return lepton.Trainer(**defaults | {"batch_size": 8, "devices": 1} | fields)


DATA = {
    in_memory: "sample 30: -1",
    as_elements: "sample 30: -1",
    as_iterable: "sample 30: -1",
    as_source: "sample texts:0:30: -1",
    as_mixture: "sample late:0:30: -1",
}


@pytest.mark.parametrize("make", DATA)
@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        lambda o, t: 2 * cross_entropy(o, t),
    ],
)
def test_labels_out_of_range_do_not_train_as_other_classes(make, loss):
    data = make(IDS, LATE)
    with pytest.raises(
        lepton.DataError, match="targets outside 0 to 2: there are 3"
    ) as caught:
        trainer(loss=loss, shuffle=False).fit(data, steps=15)
    assert DATA[make] in caught.value.where
    assert "(values, labels >= 0)" in caught.value.remedy


@pytest.mark.parametrize("make", DATA)
def test_ids_beyond_the_table_are_named(make):
    with pytest.raises(
        lepton.DataError, match="'table/embedding', which has 50 rows"
    ) as caught:
        trainer(shuffle=False).fit(
            make(WRONG_IDS, LABELS),
            steps=15,
        )
    assert DATA[make].replace("30: -1", "33: 50") in caught.value.where


@pytest.mark.parametrize("shuffle", [False, True])
def test_on_eight_devices_and_several_steps_a_call(shuffle):
    fields = {"devices": 8, "steps_per_call": 2, "shuffle": shuffle}
    for make in (as_elements, as_source):
        with pytest.raises(lepton.DataError, match="outside 0 to 2"):
            trainer(**fields).fit(make(IDS, LATE), steps=6)


def test_packed_documents_are_checked_row_by_row():
    documents = [np.arange(10) % 50 for _ in range(20)]
    documents[9] = spoiled(documents[9], (4, 51))
    data = Source(documents, name="books").pack(8)
    with pytest.raises(lepton.DataError, match="inputs outside 0 to 49") as caught:
        trainer(model=NextToken, shuffle=False).fit(data, steps=5)
    assert "books:0:9[" in caught.value.where
    assert caught.value.where.endswith(": 51")


def test_test_data_and_inputs_to_predict_are_checked():
    model = trainer()
    model.fit((IDS, LABELS), steps=2)
    for data in (in_memory(IDS, LATE), as_elements(IDS, LATE)):
        with pytest.raises(lepton.DataError, match="targets outside 0 to 2") as caught:
            model.evaluate(data)
        assert "sample 30: -1" in caught.value.where
    with pytest.raises(lepton.DataError, match="inputs outside 0 to 49") as caught:
        model.predict(WRONG_IDS)
    assert caught.value.where == "inputs, first in sample 33: 50"
    assert len(model.predict(IDS)) == SAMPLES


def test_the_remedy_for_labels_that_do_not_count_works():
    def weighted(outputs, labels):
        return cross_entropy(outputs, labels), labels >= 0

    ignored = spoiled(
        LABELS,
        (30, -1),
        (41, -2),
    )
    for make in (in_memory, as_elements, as_source):
        history = trainer(loss=weighted).fit(
            make(IDS, ignored),
            steps=6,
        )
        assert np.isfinite(history["loss"]).all()
    of_all = trainer(loss=weighted)
    logits = of_all.fit((IDS, ignored), steps=1) and of_all.predict(
        IDS, decode=lambda outputs: outputs
    )
    counted = ignored >= 0
    expected = cross_entropy(jnp.asarray(logits[counted]), LABELS[counted]).mean()
    assert of_all.evaluate((IDS, ignored)).loss == pytest.approx(
        float(expected), rel=1e-5
    )


def test_an_id_that_wraps_around_at_32_bits_is_seen_before_it_does():
    wide = IDS.astype(np.int64)
    wide[5, 0] = 2**32 + 1
    with pytest.raises(lepton.DataError) as caught:
        trainer(shuffle=False).fit(
            as_elements(wide, LABELS),
            steps=2,
        )
    assert f"sample 5: {2**32 + 1}" in caught.value.where


def test_data_in_range_train_as_they_did():
    history = trainer(shuffle=False).fit(
        as_elements(IDS, LABELS),
        steps=12,
    )
    other = trainer(shuffle=False).fit(
        (IDS, LABELS),
        steps=12,
    )
    np.testing.assert_array_equal(history["loss"], other["loss"])
