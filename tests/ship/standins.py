"""Small artifacts for the tests of the server, without a trainer.

They keep the contract of `lepton_jax.Artifact`: a manifest, tensors, columns, stored
rows, and a program for each batch size.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import ml_dtypes
import numpy as np


@dataclass
class Tensor:
    name: str
    dtype: str
    shape: tuple


@dataclass
class Column:
    name: str
    kind: str
    values: tuple = ()
    example: object = None


class Stored:
    def __init__(self, inputs=None, outputs=None):
        self.inputs = inputs or {}
        self.outputs = outputs or {}
        self.rows = None

    def __len__(self):
        return len(next(iter(self.inputs.values()), ()))


@dataclass
class Standin:
    """An artifact whose program is a function of NumPy arrays."""

    function: object
    inputs: tuple
    outputs: tuple
    name: str = "model"
    version: str = "1"
    columns: tuple = ()
    labels: tuple = ()
    sizes: tuple = (1, 2, 4, 8)
    prepare_rows: object = None
    stored: Stored = field(default_factory=Stored)
    compiled_sizes: list = field(default_factory=list)
    limits: tuple = ()
    profile: object = None
    training: object = None
    meeting: str | None = None
    serving: object = None

    @property
    def manifest(self):
        return SimpleNamespace(
            name=self.name,
            version=self.version,
            labels=self.labels,
            meeting=self.meeting,
            batch_size=8,
            limits=self.limits,
            metrics={},
            made={},
            recipe={},
        )

    def prepare(self, rows):
        return self.prepare_rows(rows)

    def compiled(self, size):
        self.compiled_sizes.append(size)

        def program(arrays):
            assert all(len(array) == size for array in arrays.values())
            return self.function(arrays)

        return program


def linear(name="linear", version="1", scale=2.0):
    """`outputs = scale * inputs`, and its row's largest place."""

    def function(arrays):
        outputs = arrays["inputs"] * np.float32(scale)
        return {"outputs": outputs, "prediction": outputs.argmax(1).astype("int32")}

    return Standin(
        function,
        (Tensor("inputs", "float32", (-1, 3)),),
        (
            Tensor("outputs", "float32", (-1, 3)),
            Tensor("prediction", "int32", (-1,)),
        ),
        name,
        version,
    )


def identity(dtype, name="identity"):
    """The input as the output, of any dtype."""
    return Standin(
        lambda arrays: {"outputs": arrays["inputs"]},
        (Tensor("inputs", dtype, (-1, 2)),),
        (Tensor("outputs", dtype, (-1, 2)),),
        name,
    )


def poisoned(name="poisoned"):
    """`linear`, but the whole batch fails if any row holds 13."""
    artifact = linear(name)
    healthy = artifact.function

    def function(arrays):
        if (arrays["inputs"] == 13).any():
            raise FloatingPointError("thirteen")
        return healthy(arrays)

    artifact.function = function
    return artifact


def people(name="people"):
    """Raw rows of an age and a job; the class is whether the age is above 40."""

    def prepare(rows):
        from lepton_jax.errors import DataError

        ages = []
        for row in rows:
            age = row.get("age")
            if isinstance(age, str):
                raise DataError("age is no number", where="age", remedy="send one")
            ages.append(np.nan if age is None else age)
        return {"inputs": np.array(ages, np.float32)[:, None]}

    def function(arrays):
        old = np.nan_to_num(arrays["inputs"]) > 40
        return {
            "outputs": old.astype("float32"),
            "prediction": old[:, 0].astype("int32"),
        }

    return Standin(
        function,
        (Tensor("inputs", "float32", (-1, 1)),),
        (Tensor("outputs", "float32", (-1, 1)), Tensor("prediction", "int32", (-1,))),
        name,
        columns=(
            Column("age", "number", example=39.0),
            Column("job", "category", ("clerk", "cook"), "clerk"),
        ),
        labels=("young", "old"),
        prepare_rows=prepare,
    )


BFLOAT16 = ml_dtypes.bfloat16


def digits(name="digits"):
    """The nearest of scikit-learn's digits, of 8x8 pixels from 0 to 16."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)

    def function(arrays):
        pixels = arrays["inputs"].reshape(-1, 1, 64).astype(np.float32)
        distances = np.square(pixels - images[None]).sum(2)
        scores = np.stack(
            [-distances[:, labels == digit].min(1) / 100 for digit in range(10)], 1
        )
        return {
            "outputs": scores.astype(np.float32),
            "prediction": scores.argmax(1).astype(np.int32),
        }

    inputs = images[:50].reshape(-1, 8, 8, 1).astype(np.uint8)
    return Standin(
        function,
        (Tensor("inputs", "uint8", (-1, 8, 8, 1)),),
        (Tensor("outputs", "float32", (-1, 10)), Tensor("prediction", "int32", (-1,))),
        name,
        stored=Stored({"inputs": inputs}, function({"inputs": inputs})),
        sizes=(1, 2),
    )


def half():
    """The input as the output, in FP16."""
    return identity("float16", "half")


def brain():
    """The input as the output, in BF16."""
    return identity("bfloat16", "brain")
