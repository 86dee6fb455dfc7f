"""The artifact: made of a trainer, written, opened and asked for predictions."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lepton_jax.errors import CheckpointError, DataError, ModelError
from lepton_jax.ship.artifact import files, making
from lepton_jax.ship.artifact.columns import names_of_files
from lepton_jax.ship.artifact.compiled import (
    LADDER,
    BatchProgram,
    batches,
    filled,
    rows_of,
)
from lepton_jax.ship.artifact.given import as_inputs, check_ranges
from lepton_jax.ship.artifact.manifest import FORMAT, NAME, Manifest
from lepton_jax.ship.artifact.measuring import measured
from lepton_jax.ship.artifact.signature import (
    ANY,
    OUTPUTS,
    PREDICTION,
    Column,
    Tensor,
)
from lepton_jax.ship.artifact.stored import Stored
from lepton_jax.ship.artifact.tensors import read_tensors, write_tensors
from lepton_jax.train.raw_inputs import are_raw, in_words

PROGRAM = "program.stablehlo"
MEASURE = "measure.stablehlo"
WEIGHTS = "weights.safetensors"
SERVING = "serving"
STORED = "stored"
TRAINING = "training.json"
ROWS = 200  # stored rows; the count that the parity of an export is judged on
ROWS_SHOWN = 5  # rows that a message names


class Artifact:
    """A trained model with what it needs to predict.

    >>> artifact = lepton.Artifact.of(trainer)  # doctest: +SKIP
    >>> artifact.save("digits.lepton")  # doctest: +SKIP
    >>> lepton.Artifact.open("digits.lepton").predict(images)  # doctest: +SKIP

    Attributes:
      manifest: what is known of it.
      weights: arrays by path, "params/out/kernel", which the program takes.
      serving: the way from raw rows to inputs, a `Serving`; None: the model takes
        arrays alone.
      profile: distributions of the training rows after the steps; None: there is none.
      stored: rows with the trainer's outputs on them.
      training: what the rows of training looked like as they were read, for a server's
        drift gauges: the JSON of a `ship.watch.reference.Reference`; None: not known.
      folder: where it was opened; None: it was made here.
    """

    def __init__(
        self,
        parts: making.Parts,
        folder: Path | None = None,
    ):
        self.manifest = parts.manifest
        self.weights = parts.weights
        self.serving = parts.serving
        self.profile = parts.profile
        self.stored = parts.stored
        self.training = parts.training
        self.folder = folder
        self._programs = parts.programs
        self._opened: dict[int, Any] = {}
        self._measure = parts.measure
        self._compiled: dict[int, BatchProgram] = {}
        self._compiling = threading.Lock()

    @classmethod
    def of(
        cls,
        trainer: Any,
        name: str | None = None,
        version: str = "1",
        rows: Any = ROWS,
    ) -> Artifact:
        """Make an artifact of a trained model.

        Args:
          trainer: a `Trainer` that has fitted, loaded or opened a model; its adapters
            are merged into the weights.
          name: of the model; None: the recipe's.
          version: of the model.
          rows: held-out rows that are stored with the trainer's outputs, at most; of
            raw rows a quarter is made awkward: missing values, unseen categories,
            broken pictures. Or a Polars table of raw rows to store, without targets.

        Raises:
          ModelError: there is no model, or it can't be exported.
        """
        return cls(
            making.parts_of(
                trainer.merged(),
                name,
                version,
                rows,
            )
        )

    @classmethod
    def open(
        cls,
        place: str | Path,
        *,
        check: bool = True,
    ) -> Artifact:
        """Open an artifact; neither the recipe nor the model's class is needed.

        Args:
          place: a folder, or a zip file.
          check: whether the files are compared with their checksums.

        Raises:
          CheckpointError: there is none, it is damaged, or of a newer format.
          MissingExtraError: a library that it needs is not installed.
        """
        place = Path(place)
        with files.opened(place) as opened:
            manifest = _read_manifest(opened.folder, place)
            if check:
                files.check(opened.folder, manifest.files, place)
            artifact = cls(
                _read_parts(opened.folder, manifest, place),
                place,
            )
            opened.keep_for(artifact)
        return artifact

    def save(self, place: str | Path) -> Path:
        """Write the artifact, whole or not at all.

        Args:
          place: a folder, or a file whose name ends in .zip; an artifact that stands
            there is replaced.

        Returns:
          The place.

        Raises:
          CheckpointError: something else stands there, or it can't be written.
        """
        place = Path(place)
        with files.writing(place) as folder:
            for size, program in self._programs.items():
                (folder / _file_of(size)).write_bytes(program)
            if self._measure:
                (folder / MEASURE).write_bytes(self._measure)
            write_tensors(folder / WEIGHTS, self.weights)
            if self.serving is not None:
                self.serving.save(folder / SERVING)
            self.stored.save(folder / STORED)
            if self.training is not None:
                (folder / TRAINING).write_text(self.training, encoding="utf-8")
            manifest = replace(
                self.manifest,
                files=files.checksums(folder),
            )
            (folder / NAME).write_text(
                manifest.to_json(),
                encoding="utf-8",
            )
        return place

    # ---- what it is ----

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arrays that the program takes."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The arrays that the program returns."""
        return self.manifest.outputs

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of raw rows; () where the model takes arrays alone."""
        return self.manifest.columns

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes of the ladder, ascending."""
        if self.manifest.meeting is not None:
            return (self.manifest.batch_size,)
        return self.manifest.sizes or LADDER

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(array.nbytes for array in self.weights.values())

    def __repr__(self) -> str:
        name = self.manifest.name
        return f"Artifact({name!r}, version {self.manifest.version!r})"

    # ---- predicting ----

    def prepare(
        self,
        raw: Any,
    ) -> dict[str, np.ndarray]:
        """Return the program's inputs of raw rows, as training prepared its own.

        Args:
          raw: a row as a dict, a list of these, a table of pandas, Polars or Arrow, a
            dict of columns, or the path of a file.

        Raises:
          DataError: the model takes arrays alone, a column is missing, a cell can't be
            what its column is, or a step drops a row.
        """
        if self.serving is None:
            names = ", ".join(tensor.name for tensor in self.inputs)
            raise DataError(
                "the model takes arrays alone: it was not trained on prepared rows",
                where="raw rows",
                remedy=f"give the arrays {names}",
            )
        # only here: reading raw rows needs libraries that arrays do not
        import polars as pl

        from lepton_jax.data.prepare.raw_rows import as_table

        rows = as_table(raw, self.serving.reading)
        for name in self._names_of_files:
            if name not in rows.columns:
                rows = rows.with_columns(pl.lit("").alias(name))
        return as_inputs(
            self.serving.arrays(rows),
            self.inputs,
        )

    def compiled(self, size: int) -> BatchProgram:
        """Return the program compiled for a batch size; each is compiled once.

        Args:
          size: rows of a batch.

        Raises:
          ModelError: there is no program for this size, or for this kind of device.
        """
        with self._compiling:
            if size not in self._compiled:
                self._compiled[size] = self._compile(size)
            return self._compiled[size]

    def run(
        self,
        inputs: Any,
    ) -> dict[str, np.ndarray]:
        """Return all outputs of any number of rows, by name.

        Args:
          inputs: an array, or a dict of arrays by name.

        Raises:
          DataError: they do not fit the signature, or hold whole numbers that are out
            of range.
        """
        arrays = as_inputs(inputs, self.inputs)
        check_ranges(arrays, self.manifest.limits)
        rows = rows_of(arrays)
        if self.manifest.meeting is not None:
            return self._run_as_trained(arrays, rows)
        parts = []
        start = 0
        for count, size in batches(rows, self.sizes):
            parts.append(
                self._part(
                    arrays,
                    start,
                    count,
                    size,
                )
            )
            start += count
        return self._joined(parts)

    def predict(
        self,
        data: Any,
        words: bool = False,
    ) -> Any:
        """Return predictions of any number of rows, as `Trainer.predict` does.

        Args:
          data: raw rows (see `prepare`); or an array, or a dict of arrays by name.
          words: whether to return a list of the target's own values in place of their
            numbers.

        Returns:
          An array, one row a sample; a dict of them where the model has several
          predictions.

        Raises:
          DataError: see `prepare` and `run`; or the outputs of some rows hold NaN, and
            their predictions, such as labels, would not show it.
        """
        names = [tensor.name for tensor in self.inputs]
        if are_raw(
            data,
            names,
            self.serving is not None,
        ):
            data = self.prepare(data)
        outputs = self.run(data)
        _check_hidden(outputs)
        predictions = _predictions(outputs)
        return in_words(self.serving, predictions) if words else predictions

    def measure(
        self,
        outputs: Mapping[str, Any],
        targets: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Return loss and metrics of outputs, as the recipe computes them.

        Args:
          outputs: of this model, or of one that stands in for it, by name.
          targets: of the same rows, by name; None: the outputs are those of the stored
            held-out rows.

        Returns:
          Numbers by name; {}: there are no targets, or the metrics could not be
          exported (see the manifest's notes).
        """
        targets = self.stored.targets if targets is None else targets
        if not self._measure or not targets:
            return {}
        rows = len(next(iter(targets.values())))
        given = {name: leaf[:rows] for name, leaf in outputs.items()}
        return measured(self._metrics, given, targets)

    # ---- internals ----

    @cached_property
    def _metrics(self) -> Any:
        return making.deserialized(self._measure)

    @property
    def exported(self) -> Any:
        """The program as a `jax.export.Exported`; of several the one for most rows.

        Raises:
          CheckpointError: this version of JAX can't open it.
        """
        return self._exported(max(self._programs))

    def _exported(self, size: int) -> Any:
        """Return the program for a batch size; -1: any."""
        if size not in self._opened:
            try:
                self._opened[size] = making.deserialized(self._programs[size])
            except Exception as error:  # flatbuffers and JAX raise what comes
                raise CheckpointError(
                    f"jax {jax.__version__} can't open the program: {error}",
                    where=self.folder,
                    remedy=self.manifest.expiry(),
                ) from error
        return self._opened[size]

    @cached_property
    def _names_of_files(self) -> set[str]:
        return names_of_files(self.serving)

    @cached_property
    def _on_device(self) -> dict[str, jax.Array]:
        return {path: jax.device_put(array) for path, array in self.weights.items()}

    def _compile(self, size: int) -> BatchProgram:
        platform = jax.default_backend()
        known_size = ANY if ANY in self._programs else size
        if known_size not in self._programs:
            raise ModelError(
                f"there is no program for batches of {size} rows",
                where=self.folder,
                remedy=f"take one of {', '.join(map(str, self.sizes))}",
            )
        exported = self._exported(known_size)
        known = exported.platforms
        named = "cuda" if platform == "gpu" else platform
        if named not in known:
            raise ModelError(
                f"the program is for {', '.join(known)}, and this is {platform}",
                where=self.folder,
                remedy="run it with JAX_PLATFORMS=cpu, or export it again",
            )
        shapes = {
            tensor.name: jax.ShapeDtypeStruct(
                (size, *tensor.shape[1:]),
                tensor.dtype,
            )
            for tensor in self.inputs
        }
        return BatchProgram(
            exported,
            self._on_device,
            shapes,
            size,
        )

    def _part(
        self,
        arrays: Mapping[str, np.ndarray],
        start: int,
        count: int,
        size: int,
    ) -> dict[str, np.ndarray]:
        batch = {
            name: filled(
                array,
                start,
                count,
                size,
            )
            for name, array in arrays.items()
        }
        outputs = self.compiled(size)(batch)
        return {name: leaf[:count] for name, leaf in outputs.items()}

    def _run_as_trained(
        self,
        arrays: Mapping[str, np.ndarray],
        rows: int,
    ) -> dict[str, np.ndarray]:
        """Run batches of the recipe's size, the last one as large as it is.

        Where samples meet, a batch that is filled up predicts something else.
        """
        size = self.manifest.batch_size
        starts = range(0, rows, size)
        counts = [
            min(
                size,
                rows - start,
            )
            for start in starts
        ]
        pairs = zip(starts, counts, strict=True)
        return self._joined(
            [
                self._part(
                    arrays,
                    at,
                    n,
                    n,
                )
                for at, n in pairs
            ]
        )

    def _joined(
        self,
        parts: list[dict[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        if not parts:
            return {
                tensor.name: np.zeros(
                    (0, *tensor.shape[1:]),
                    tensor.dtype,
                )
                for tensor in self.outputs
            }
        if len(parts) == 1:
            return parts[0]
        names = parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _read_manifest(folder: Path, place: Path) -> Manifest:
    """Read the manifest.

    Raises:
      CheckpointError: it is damaged, or of a newer format.
    """
    try:
        manifest = Manifest.from_json((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{NAME} can't be read: {error}",
            where=place,
            remedy=f"copy the artifact again, or {files.AGAIN}",
        ) from error
    if manifest.format > FORMAT:
        raise CheckpointError(
            f"the artifact has format {manifest.format}; this version of Lepton reads"
            f" up to {FORMAT}",
            where=place,
            remedy="install a newer lepton-jax",
        )
    return manifest


def _read_parts(
    folder: Path,
    manifest: Manifest,
    place: Path,
) -> making.Parts:
    serving = None
    if (folder / SERVING).is_dir():
        # only here: reading raw rows needs libraries that arrays do not
        from lepton_jax.data.prepare.serving import Serving

        serving = Serving.load(folder / SERVING)
    try:
        wanted = manifest.sizes or (ANY,)
        programs = {size: (folder / _file_of(size)).read_bytes() for size in wanted}
        has_metrics = (folder / MEASURE).is_file()
        measure = (folder / MEASURE).read_bytes() if has_metrics else b""
        weights = read_tensors(folder / WEIGHTS)
        stored = Stored.load(folder / STORED)
        known = folder / TRAINING
        training = known.read_text(encoding="utf-8") if known.is_file() else None
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the artifact can't be read: {error}",
            where=place,
            remedy=f"copy it again, or {files.AGAIN}",
        ) from error
    profile = None if serving is None else serving.profile
    return making.Parts(
        manifest,
        programs,
        measure,
        weights,
        serving,
        profile,
        stored,
        training,
    )


def _file_of(size: int) -> str:
    """Return the file of the program for a batch size; -1: any."""
    path = Path(PROGRAM)
    return PROGRAM if size == ANY else f"{path.stem}-{size}{path.suffix}"


def _predictions(outputs: Mapping[str, np.ndarray]) -> Any:
    """Return the decoded outputs: one array, or a dict by path."""
    if PREDICTION in outputs:
        return outputs[PREDICTION]
    prefix = f"{PREDICTION}."
    return {
        name.removeprefix(prefix): leaf
        for name, leaf in outputs.items()
        if name.startswith(prefix)
    }


def _check_hidden(outputs: Mapping[str, np.ndarray]) -> None:
    """Raise DataError where whole-number predictions hide a NaN of the outputs."""
    hides = False
    is_nan: Any = False
    for name, leaf in outputs.items():
        is_float = leaf.dtype.kind not in "iub"
        if name.startswith(PREDICTION):
            hides |= not is_float
        elif name.startswith(OUTPUTS) and is_float:
            others = tuple(range(1, leaf.ndim))
            is_nan = is_nan | np.isnan(leaf).any(axis=others)
    if not hides or not np.any(is_nan):
        return
    rows = np.flatnonzero(is_nan)
    shown = ", ".join(
        map(
            str,
            rows[:ROWS_SHOWN],
        )
    )
    raise DataError(
        f"the model's outputs hold NaN for {len(rows)} rows, and what predict returns"
        " would not show it",
        where=f"inputs, rows {shown}{', ...' if len(rows) > ROWS_SHOWN else ''}",
        remedy="look at those rows; Artifact.run returns the outputs as they are",
    )
