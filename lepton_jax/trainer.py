"""The short way through everything: a recipe in, a trained model out."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax
import grain
import jax
import numpy as np
import optax

from lepton_jax import adapt
from lepton_jax.baselines import Comparison, Samples
from lepton_jax.checkpoint.adoption import Fresh
from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.checkpoint.local import LocalCheckpoints, NoLocalCheckpoints
from lepton_jax.controller import select_weights
from lepton_jax.controller.journal import knobs_set_live
from lepton_jax.data import (
    Arrays,
    described,
    epoch_samples,
    one_pass,
    sample,
    settled,
)
from lepton_jax.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    LeptonError,
    ModelError,
    NoCheckpointError,
    PlanError,
    RecipeError,
    pointing_at_user,
    users_frame,
)
from lepton_jax.hardware import Topology, here, topology
from lepton_jax.hosts import agreement, phase
from lepton_jax.hosts.mailbox import Mailbox
from lepton_jax.monitor import Monitor, SampleTrace, Sink, plain, write_report
from lepton_jax.monitor.energy import EnergyMeter
from lepton_jax.planner import Plan, Trace, ahead, plan, resized, trace
from lepton_jax.recipe import Recipe
from lepton_jax.step.module import is_linen
from lepton_jax.step.optimizers import parts_of
from lepton_jax.step.state import State
from lepton_jax.train import recovery
from lepton_jax.train.baseline import SECONDS, compare
from lepton_jax.train.checks import (
    INPUTS,
    TEST_DATA,
    TRAINING_DATA,
    check_data,
    check_hidden,
)
from lepton_jax.train.compilation import Compilation
from lepton_jax.train.evaluation import evaluate
from lepton_jax.train.examination import (
    GENERATED,
    facts_of,
    write_examined,
    write_samples,
)
from lepton_jax.train.folder import (
    SERVED,
    describe,
    is_a_saved_model,
    read_parts,
    read_shapes,
    replace_folder,
    served_state,
)
from lepton_jax.train.history import History
from lepton_jax.train.judged import (
    MOST_TRAINING_ROWS,
    Examined,
    Judged,
    is_worth_it,
    judged,
    outputs_of,
    rows_to_judge,
    samples_of,
)
from lepton_jax.train.loop import Loop, Start
from lepton_jax.train.outputs import Outputs
from lepton_jax.train.program import Program
from lepton_jax.train.raw_inputs import (
    are_raw,
    in_words,
    load_preparation,
    prepared_inputs,
    prepared_samples,
)
from lepton_jax.train.restore import Reader, Restored
from lepton_jax.train.run_record import Position, RunRecord, order_of
from lepton_jax.trees import by_path

BASELINE_NEEDS = {"train": "fit a baseline on", "test": "measure a baseline on"}
# Parts of the order of data, as a message calls them.
ORDER_IN_WORDS = {"seed": "the seed of the shuffling", "of": "the number of samples"}


class Trainer:
    """Traces, plans, compiles and runs a recipe.

    Args:
      recipe: a Recipe, or a function that returns one.
      run_dir: folder for what the run leaves behind; None: nothing is written.
      devices: how many of the live devices to use; None: all.
      sinks: receivers of the run's events, e.g. `lepton_jax.monitor.Progress()`.
      source: where the recipe came from (file and settings), kept in the run folder.
      plan: a plan, or the file of one, to follow instead of searching: what
        `Trainer.plan` gave, perhaps with pins.
      resize_plan: where there are other devices than `plan` is for, whether to search
        for one with the same axes and forms; else that is an error.
      trace_samples: write into the run folder which samples each step was made of
        (`samples.jsonl`).
      local_dir: a folder on each host's own disk (or in its memory) for fast
        checkpoints next to those of the run folder; `resume` takes the newest that all
        hosts can read.
      local_every: seconds between two of these.
      changes: fields of a Recipe, instead of or on top of `recipe`.
    """

    def __init__(
        self,
        recipe: Recipe | Callable[[], Recipe] | None = None,
        *,
        run_dir: str | Path | None = None,
        devices: int | None = None,
        sinks: Sequence[Sink] = (),
        source: dict[str, Any] | None = None,
        plan: Plan | str | Path | None = None,
        resize_plan: bool = False,
        trace_samples: bool = False,
        local_dir: str | Path | None = None,
        local_every: float = 60.0,
        **changes: Any,
    ):
        # Fields next to a recipe are what a person asks for now; without a recipe they
        # are the recipe.
        self._asked = set(changes) if recipe is not None else set()
        recipe = _made(recipe, changes)
        self.recipe = recipe.with_(
            train=_settled(None, recipe.train),
            test=_settled(None, recipe.test),
        )
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.topology, self._devices = here(devices)
        self.trace: Trace | None = None
        self.program: Program | None = None
        self.state: State | None = None
        self.step = 0

        self._sinks = () if agreement.host() else tuple(sinks)
        self._source = source or {}
        self._given_plan = _loaded(plan)
        self._resizes_plan = resize_plan
        self._trace_samples = trace_samples
        self._opened: Path | None = None  # the folder that was loaded last
        self._local: LocalCheckpoints = NoLocalCheckpoints()
        if local_dir is not None and self.run_dir is not None:
            self._local = LocalCheckpoints(Path(local_dir), self.run_dir, local_every)
        self._monitor = Monitor(None)
        self._notes: list[str] = []

        # What the next fit goes on from.
        self._record = RunRecord()
        self._is_same_run = False  # whether that is a step of this run
        self._is_resumed = False
        self._trained_on: Any = None
        self._reader: Reader | None = None
        self._bases: dict[str, float] = {}
        # The end of the run, in steps, that the policies at work were told of.
        self._told_end: int | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        devices: int | None = None,
        **given: Any,
    ) -> Trainer:
        """Open a saved model to predict with, without the file of its recipe.

        What was made of the functions and models of Lepton and Optax is found by name.
        What was defined elsewhere (a module in a notebook, a loss of one's own) has to
        be given: `Trainer.open(folder, model=Net)`. How raw rows are prepared is in the
        folder in any case, and needs no code.

        Args:
          folder: what `save` wrote.
          devices: how many of the live devices to use; None: all. As many as before, or
            else the last bits of a prediction may differ.
          **given: fields of a Recipe, in place of those of the folder.

        Raises:
          CheckpointError: the folder holds no saved model, or can't be read.
          ModelError: the model's code is not here, and was not given.
        """
        folder = Path(folder)
        if not is_a_saved_model(folder):
            raise CheckpointError(
                "there is no saved model",
                where=folder,
                remedy="name what Trainer.save wrote; a run is opened by its recipe",
            )
        parts = {"optimizer": optax.identity(), **read_parts(folder, given)}
        trainer = cls(devices=devices, **parts)
        weights = folder / SERVED if (folder / SERVED).is_dir() else folder
        trainer.step, restored = trainer._restore(weights, NoLocalCheckpoints(), None)
        trainer.state = restored.state
        trainer._opened = folder
        return trainer

    @property
    def preparation(self) -> Any:
        """The way from raw rows to inputs: the loaded model's, else the recipe's.

        None: the model takes arrays alone.

        Raises:
          DataError: the loaded model has one that can't be read.
        """
        if self._opened is None:
            return self.recipe.preparation
        return load_preparation(self._opened) or self.recipe.preparation

    # ---- the public verbs ----

    def plan(
        self,
        on: str | Topology | None = None,
        *,
        objective: str = "time",
        mesh: dict[str, int] | None = None,
        pins: dict[str, Any] | None = None,
        remat: str | None = None,
        micro_batches: int | None = None,
        **forms: Any,
    ) -> Plan:
        """Return the plan for a topology, which need not be there.

        As long as there is no data to take shapes from, it covers an NNX model's
        parameters and optimizer alone. To run a plan that the arguments decide, give it
        to `Trainer(..., plan=...)`.

        Args:
          on: "v5p:4x4x4", "h200:8", ...; None: the live devices.
          objective: "time", "memory" or "cost": what is to be least.
          mesh: mesh axis name to size; None: the search decides.
          pins: pattern of parameter paths to the PartitionSpec to use.
          remat: "none", "dots", "full" or "keep ...", as a plan shows it; None: the
            mildest that fits.
          micro_batches: parts of a batch; None: the recipe's, or the fewest that fit.
          **forms: fixed forms of the step, as in `planner.plan`: context, flags,
            stages.

        Raises:
          PlanError: no such topology, nothing fits, or a pin is impossible.
          DataError: a Linen model has no parameters before the shapes of its inputs are
            known.
        """
        if on is not None and not isinstance(on, str | Topology):
            raise PlanError(
                f"{on!r} is no topology",
                where="Trainer.plan",
                remedy='name one, e.g. "h200:8"',
            )
        target = self.topology
        if on is not None:
            target = topology(on) if isinstance(on, str) else on
        knows_no_data = self.trace is None and self.recipe.train is None
        if knows_no_data and not is_linen(self.recipe.model):
            return plan(trace(self.recipe, None, None), target)
        return plan(
            self._tracing(None),
            target,
            objective=objective,
            mesh=mesh,
            pins=pins,
            remat=remat,
            micro_batches=micro_batches,
            **forms,
        )

    def fit(
        self,
        train: Any = None,
        *,
        test: Any = None,
        epochs: float | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
    ) -> History:
        """Train, evaluate and save as the recipe says.

        Without `epochs` and `steps` training goes on to the recipe's total, so a
        resumed run ends where the whole run would have; one that a policy has stopped
        stays where it is. With either of them it goes on for that much more.

        Args:
          train: data to train on; None: the recipe's.
          test: data to evaluate on; None: the recipe's.
          epochs: passes over the data to train for.
          steps: steps to train for.
          batch_size: samples of a step, from now on; None: as before.

        Raises:
          DivergedError: a loss is not finite. The last committed checkpoint is from
            before it.
          DataError, ModelError, PlanError, CheckpointError: as their messages say.
        """
        given = self.recipe.train if train is None else train
        train = _settled(train, self.recipe.train)
        test = _settled(test, self.recipe.test)
        if train is None:
            raise DataError(
                "there is nothing to train on",
                where="Trainer.fit",
                remedy="pass (inputs, targets), or set Recipe.train",
            )
        if self.recipe.preparation is not None:
            self._opened = None  # what is trained now is prepared by the recipe
        program = self._ready_to_train(train, test, batch_size)
        self._settle_position(given, order_of(self.recipe, train))
        planned = self._planned_steps(train)
        until = self._until(train, epochs, steps)
        budget = max(until, planned or 0)
        begun = self._budget_begins(program, until, budget)
        return self._run(program, train, test, until, (begun, budget))

    def evaluate(self, test: Any = None) -> Any:
        """Return loss and metrics on samples, each of which counts exactly once.

        Args:
          test: data to evaluate on, or a path or a table of raw rows with the target;
            None: the recipe's.

        Returns:
          A named tuple, the loss first.
        """
        if are_raw(test, None, self.preparation is not None):
            test = prepared_samples(self.preparation, test)
        test = _settled(test, self.recipe.test)
        if test is None:
            raise DataError(
                "there is nothing to evaluate on",
                where="Trainer.evaluate",
                remedy="pass (inputs, targets), or set Recipe.test",
            )
        program = self._ready(sample(test))
        check_data(program, test, TEST_DATA)
        metrics = evaluate(program, self._state(program), test)
        result: Any = collections.namedtuple(  # type: ignore[misc]
            "Evaluation",
            list(metrics),
            rename=True,
        )
        return result(*metrics.values())

    def predict(
        self,
        inputs: Any,
        decode: Callable | None = None,
        words: bool = False,
    ) -> Any:
        """Return the model's predictions, as NumPy arrays, one row a sample.

        Args:
          inputs: an array, or a dict of arrays as the model's keyword arguments; or raw
            rows, which are prepared as the training rows were: a dict of column and
            value, a list of these, a table of pandas, Polars or Arrow, or a path.
          decode: outputs to predictions, in JAX; None: the recipe's, or what its loss
            implies.
          words: whether to return a list of the target's own values ("yes", "no") in
            place of their numbers.

        Raises:
          DataError: the outputs of some samples hold NaN, and their predictions, such
            as labels, would not show it.
          ModelError: a prediction can't be joined from batches: it has no dim for
            samples.
        """
        program = self._ready(None)
        preparation = self.preparation
        taken = program.trace.inputs
        names = list(taken) if isinstance(taken, dict) else None
        if are_raw(inputs, names, preparation is not None):
            inputs = prepared_inputs(preparation, inputs)
        data = inputs if isinstance(inputs, Arrays) else Arrays(inputs)
        check_data(program, data, INPUTS)
        size = self.recipe.batch_size
        prediction = program.prediction(decode)
        prediction.check(len(data))

        parts = []
        rows = []
        hidden = []
        fill = len(data) % size == 0 or prediction.meeting is None
        batches = one_pass(data, size, program.sharding_of, fill)
        for (batch, _), count in batches:
            state = self._state(program)
            decoded, hides = program.predict_and_look(state, batch, decode)
            parts.append(decoded)
            rows.append(count)
            if hides is not None:
                hidden.append(hides)
        if hidden:
            is_hidden = [
                np.asarray(batch)[:count]
                for batch, count in zip(hidden, rows, strict=True)
            ]
            check_hidden(np.flatnonzero(np.concatenate(is_hidden)), len(data))
        predictions = prediction.joined(parts, rows)
        return in_words(preparation, predictions) if words else predictions

    def module(self) -> Any:
        """Return the trained model as a Flax module, to call without Lepton.

        It holds the weights that `evaluate` and `predict` use, and is set to
        evaluation. The recipe's `preprocess` is not part of it.

        Returns:
          An NNX module; or a Linen module that is bound to its variables.
        """
        program = self._ready(None)
        weights = select_weights(self._state(program), self.recipe)
        return program.trace.functional.whole(*weights)

    def with_module(self, module: Any, **changes: Any) -> Trainer:
        """Return a trainer with another module, which brings its weights along.

        Optimizer and policies begin anew, at step 0. Data, preparation and what else
        the recipe says stay, and nothing is written to the run's folder.

        Args:
          module: an NNX module that takes the same inputs.
          **changes: other fields of the recipe.

        Raises:
          ModelError: the module can't be called with the inputs, or the loss can't be
            taken of its outputs.
        """
        traced = self._ready(None).trace
        trainer = Trainer(
            self.recipe.with_(model=module, **changes),
            devices=len(self._devices),
            source=self._source,
        )
        shapes = None
        if trainer.recipe.train is None:
            shapes = (traced.inputs, traced.targets)
        trainer._opened = self._opened
        trainer._state(trainer._ready(shapes, traced.samples))
        return trainer

    def merged(self) -> Trainer:
        """Return a trainer of the plain model, with its adapters in the weights.

        Its recipe's model and optimizer are those that `lepton_jax.adapt` was given, so
        what it saves is a plain model. Optimizer and policies begin anew. Without
        adapters it is this trainer itself.
        """
        model = adapt.plain_model(self.recipe.model)
        if model is None:
            return self
        plain = adapt.merge(self.module())
        optimizer = adapt.trained_by(self.recipe.optimizer)
        trainer = self.with_module(plain, optimizer=optimizer)
        program = trainer.program
        state = trainer.state
        assert program is not None and state is not None

        # the same weights under the model's own name
        named = Trainer(
            trainer.recipe.with_(model=model),
            devices=len(self._devices),
            source=self._source,
        )
        named._opened = self._opened
        named.step = self.step
        shapes = (program.trace.inputs, program.trace.targets)
        made = named._ready(shapes, program.trace.samples)
        named.state = jax.device_put(
            replace(named._state(made), params=state.params, variables=state.variables),
            made.state_sharding,
        )
        return named

    def baseline(self, seconds: float = SECONDS) -> list[Comparison]:
        """Fit the recipe's baselines, and compare the network with them.

        They are fitted on the training rows and measured on the test rows, by the
        recipe's metrics, each within a time; one that fails says why. Only host 0
        fits. Where the recipe names none, it is `baselines.majority`, if the targets
        are classes or quantities.

        Args:
          seconds: that each baseline may take.

        Returns:
          A comparison for each, which prints as a sentence a metric.

        Raises:
          DataError: the recipe has no training or no test data.
          ModelError: the model's outputs have no rows.
        """
        for name in ("train", "test"):
            if getattr(self.recipe, name) is None:
                raise DataError(
                    f"the recipe has no data to {BASELINE_NEEDS[name]}",
                    where="Trainer.baseline",
                    remedy=f"set Recipe.{name}",
                )
        program = self._ready(None)
        with phase.phase("evaluation"):
            test_rows = judged(program, self._state(program), self.recipe.test)
            return self._compared(program, test_rows, seconds)

    def examine(self, seconds: float = SECONDS) -> Examined | None:
        """Look at the network on the test rows, and write it into the run's report.

        That is the baselines, and what of it a person wants to see: which classes are
        mistaken for which, the worst rows, how far probabilities can be trusted. What
        can't be had is an event that says why. All hosts call it, after `fit`.

        Args:
          seconds: that each baseline may take; 0: none is fitted.

        Returns:
          The test rows with the network's outputs, and the comparisons; None: there is
          nothing to look at.
        """
        if self.program is None:
            return None
        examined = None
        with phase.phase("evaluation"):
            try:
                self._generate(self.program)
                if self.recipe.test is not None:
                    examined = self._examined(self.program, seconds)
            except (ModelError, DataError) as error:
                self._notice("warning", text=f"the report lacks a part: {error}")
        if self.run_dir is not None and agreement.host() == 0:
            write_report(self.run_dir)
        return examined

    def _examined(self, program: Program, seconds: float) -> Examined | None:
        """Look at the test rows, fit the baselines, and write both down."""
        samples = rows_to_judge(program, self.recipe.test)
        if not is_worth_it(program, samples):
            return None
        outputs = outputs_of(program, self._state(program), samples.inputs)
        test_rows = Judged(samples, outputs)
        if self.run_dir is not None and agreement.host() == 0:
            names = getattr(self.preparation, "words", ())
            write_examined(self.run_dir, facts_of(test_rows, names))
        compared = []
        if seconds and self.recipe.train is not None:
            compared = self._compared(program, test_rows, seconds)
        for one in compared:
            self._notice("baseline", step=self.step, **one.to_fields())
        return Examined(test_rows, compared)

    def _generate(self, program: Program) -> None:
        """Write a grid of pictures that the model generates, if it generates any."""
        if program.trace.functional.samples is None or self.run_dir is None:
            return
        state = self._state(program)
        pictures = program.generate(state, self.recipe.seed, GENERATED)
        if agreement.host() == 0:
            count = write_samples(self.run_dir, np.asarray(pictures))
            self._notice("samples", step=self.step, count=count)

    def _compared(
        self,
        program: Program,
        test_rows: Judged,
        seconds: float,
    ) -> list[Comparison]:
        """Compare the network with baselines on host 0, and tell it on each host."""

        def read_training() -> Samples:
            return samples_of(program, self.recipe.train, MOST_TRAINING_ROWS)

        def say() -> list[dict[str, Any]]:
            compared = compare(self.recipe, test_rows, read_training, seconds)
            return plain([one.to_fields() for one in compared])

        return [Comparison.from_fields(fields) for fields in agreement.first(say)]

    def save(self, folder: str | Path) -> Path:
        """Write state, recipe and plan to a folder.

        An older save there is replaced once this one is whole.

        Returns:
          The folder.

        Raises:
          CheckpointError: there is nothing to save, the folder holds something else, or
            it can't be written.
        """
        program = self.program
        if program is None:
            raise CheckpointError(
                "there is nothing to save yet",
                where=folder,
                remedy="call fit or load first",
            )
        folder = Path(folder)
        if os.path.exists(folder) and not is_a_saved_model(folder):
            raise CheckpointError(
                "the folder exists and holds something else than a saved model",
                where=folder,
                remedy="name another folder",
            )
        fresh = folder.with_name(folder.name + ".new")
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(fresh, ignore_errors=True)
        preparation = self.preparation
        agreement.first(lambda: describe(fresh, program, self._source, preparation))

        record = replace(
            self._record,
            plan=program.plan.to_json(),
            given=program.given(),
        )
        state = self._state(program)
        self._save_state(fresh, state, record)
        served = served_state(state, self.recipe)
        if served is not None:
            agreement.first(lambda: describe(fresh / SERVED, program, self._source))
            self._save_state(fresh / SERVED, served, record)
        agreement.first(lambda: replace_folder(folder, fresh, old))
        return folder

    def _save_state(
        self,
        folder: Path,
        state: State,
        record: RunRecord,
    ) -> None:
        checkpoints = Checkpoints(folder / "checkpoints", keep=1, again="save again")
        checkpoints.save(self.step, state, record.model_to_json())
        checkpoints.wait()
        checkpoints.prove(self.step)  # before the older save goes
        checkpoints.close()

    def load(
        self,
        folder: str | Path,
        step: int | None = None,
        *,
        fresh: Iterable[str] | None = None,
    ) -> Trainer:
        """Go on from a saved model or a run folder.

        Parameters and variables have to fit. The recipe may have another optimizer,
        other policies, knobs or rates: they are in effect; state of theirs that fits is
        kept, and the rest begins anew, which is said by name. A schedule is read at the
        count of updates, which goes on.

        Args:
          folder: of the saved model or the run.
          step: which one; None: the latest readable one.
          fresh: patterns of parameters that begin anew, e.g. ["head/*"]; they need not
            be in the folder, nor have its shapes. What is loaded then are the weights
            that were served, and a run begins with them: step, schedule, optimizer and
            policies begin anew. An empty list: all parameters are loaded so.

        Raises:
          CheckpointError: nothing readable is there, or it does not fit the model; each
            leaf that differs is named. Or a pattern matches nothing.
        """
        folder = Path(folder)
        if fresh is not None:
            self._begin_with(folder, step, fresh)
            return self
        is_own = self.run_dir is not None and folder.resolve() == self.run_dir.resolve()
        local = self._local if is_own and step is None else NoLocalCheckpoints()
        step, restored = self._restore(folder, local, step)
        phase.reached(step=step, done=step)

        record = restored.record
        if is_own:
            record = recovery.recalled(folder, step, record)
            if restored.resets_rate:
                record = replace(record, slow=None)
        else:
            record = RunRecord(record.position, rollbacks=record.rollbacks)
        assert self.program is not None
        self.step = step
        self.state = restored.state
        self._record = record
        self._opened = folder
        self._is_same_run = is_own
        self._bases = restored.bases
        self._told_end = _told_end(self.program, restored)
        for note in restored.notes:
            self._note(note)
        return self

    def _begin_with(
        self,
        folder: Path,
        step: int | None,
        fresh: Iterable[str],
    ) -> None:
        """Begin a run with the weights of a folder, of which some begin anew."""
        patterns = [fresh] if isinstance(fresh, str) else list(fresh)
        place = folder / SERVED if (folder / SERVED).is_dir() else folder
        checkpoints = Checkpoints(place / "checkpoints")
        if not checkpoints.steps():
            raise _nothing(folder)
        shapes = None if self.recipe.train is not None else read_shapes(folder)
        reader = Reader(self._ready(shapes))
        with phase.phase("restore"):
            self.state, note = reader.begin_with(
                checkpoints,
                step,
                Fresh(patterns),
                self._damaged,
            )
            checkpoints.close()
        self._begin_anew(folder)
        if note:
            self._note(f"parameters of {folder.name}, {note}")

    def begin_with(
        self,
        read: Callable[[dict[str, Any]], Mapping[str, Any]],
        shapes: tuple[Any, Any] | None = None,
    ) -> Trainer:
        """Begin a run with weights from elsewhere, read onto the planned mesh.

        Step, schedule, optimizer and policies begin anew.

        Args:
          read: shapes of all parameters by path, e.g. "blocks/0/norm/scale", each with
            dtype and sharding, to these parameters. Of an array only the parts that
            lie on this host's devices are needed (`jax.make_array_from_callback`).
            Those that it leaves out begin as the recipe's seed says.
          shapes: inputs and targets of a batch, where the recipe has no data.

        Returns:
          The trainer.
        """
        needs_shapes = self.trace is None and self.recipe.train is None
        reader = Reader(self._ready(shapes if needs_shapes else None))
        with phase.phase("restore"):
            self.state = reader.begin_with_weights(read)
        self._begin_anew(None)
        return self

    def _begin_anew(self, folder: Path | None) -> None:
        """Begin a run at step 0, with the weights of a folder if it is a model's."""
        self.step = 0
        self._record = RunRecord()
        self._opened = folder
        self._is_same_run = False
        self._reader = None
        self._bases = {}
        self._told_end = None

    def resume(self, asked: Iterable[str] = ()) -> Trainer:
        """Go on with the run in `run_dir`.

        One that was stopped before its first checkpoint begins anew.

        A value that the recipe says now and did not say then is in effect: the learning
        rate, for example. A value that somebody set while the run went on stays as it
        is, as long as the recipe says the same as before.

        Args:
          asked: names of settings that a person has just given: these are in effect in
            any case. Fields given to `Trainer` by name count as such.

        Raises:
          CheckpointError: none of its checkpoints can be read, or they do not fit the
            model.
        """
        if self.run_dir is None:
            raise CheckpointError(
                "there is no run folder to resume",
                where="Trainer",
                remedy="give run_dir",
            )
        self._asked |= set(asked)
        try:
            self.load(self.run_dir)
            self._is_resumed = True
        except NoCheckpointError:
            self._notice(
                "warning",
                text="the run has no committed checkpoint; it begins at step 0",
            )
        return self

    # ---- getting ready ----

    def _ready_to_train(
        self,
        train: Any,
        test: Any,
        batch_size: int | None,
    ) -> Program:
        """Return the program, for which the data is checked."""
        if batch_size is not None and batch_size != self.recipe.batch_size:
            self._change_recipe(batch_size=batch_size)
        if isinstance(train, grain.IterDataset) and self.recipe.steps_per_call != 1:
            # Between the batches of a block the position of a data set that can only be
            # iterated is not known.
            self._change_recipe(steps_per_call=1)
        if self.trace is not None and self.trace.samples != _count(train):
            self._change_recipe()

        program = self._ready(sample(train), _count(train))
        check_data(program, train, TRAINING_DATA)
        if test is not None:
            check_data(program, test, TEST_DATA)
        elif self.recipe.best is not None:
            raise RecipeError(
                f"best={self.recipe.best!r} asks for evaluations, but there is nothing"
                " to evaluate on",
                where="Recipe.best",
                remedy="set Recipe.test, or leave best out",
            )
        elif by_evaluations := _stopping_by_evaluations(program):
            raise RecipeError(
                f"{by_evaluations} ends the run by its evaluations, but there is"
                " nothing to evaluate on",
                where="Recipe.controller",
                remedy=f"set Recipe.test, or leave {by_evaluations} out",
            )
        program.rehearse(None if test is None else epoch_samples(test))
        return program

    def _change_recipe(self, **changes: Any) -> None:
        """Change fields of the recipe, after which all is traced and planned anew."""
        self.recipe = self.recipe.with_(**changes)
        self.trace = None
        self.program = None

    def _restore(
        self,
        folder: Path,
        local: LocalCheckpoints,
        step: int | None,
    ) -> tuple[int, Restored]:
        """Read a step, or the newest, from a folder or the local tier of its run."""
        checkpoints = Checkpoints(folder / "checkpoints")
        steps = checkpoints.steps()
        if not steps and isinstance(local, NoLocalCheckpoints):
            raise _nothing(folder)
        shapes = None if self.recipe.train is not None else read_shapes(folder)
        program = self._ready(shapes)
        reader = Reader(program, self._asked, knobs_set_live(folder))
        self._reader = reader

        with phase.phase("restore"):
            newest = max(steps, default=0)
            near = local.newest(
                newest,
                reader.template(),
                self._damaged,
            )
            if near is not None:
                step, state, content = near
                restored = reader.settle(step, state, content)
            elif not steps:
                raise _nothing(folder)
            elif step is None:
                step, restored = reader.read_latest(checkpoints, self._damaged)
            else:
                restored = reader.read(checkpoints, step)
            checkpoints.close()
        return step, restored

    def _settle_position(
        self,
        given: Any,
        now: dict[str, Any],
    ) -> None:
        """Begin at the first sample of other data, or of another order of it.

        A run that is resumed must find its own data, in its own order.
        """
        then = self._record.position.order
        is_other_order = bool(then) and then != now
        if is_other_order and self._is_resumed:
            what = ", ".join(
                f"{words} was {then[name]} and is {now[name]}"
                for name, words in ORDER_IN_WORDS.items()
                if then[name] != now[name]
            )
            raise CheckpointError(
                f"the run can't go on where it was in the data: {what}",
                where=self.run_dir,
                remedy=(
                    "resume with the run's own data, seed and shuffle; or load() its"
                    " state and fit anew"
                ),
            )
        is_other_data = self._trained_on is not None and not _same(
            given, self._trained_on
        )
        if is_other_order or is_other_data:
            self._record = replace(self._record, position=Position())
        self._trained_on = given
        self._is_resumed = False

    def _until(
        self,
        train: Any,
        epochs: float | None,
        steps: int | None,
    ) -> int:
        """Return the step at which this fit ends."""
        if epochs is not None or steps is not None:
            return self.step + self._steps(train, epochs, steps)
        if self._record.stopped:
            return self.step
        total = self._steps(
            train,
            self.recipe.epochs,
            self.recipe.steps,
        )
        return max(total, self.step)

    def _planned_steps(self, train: Any) -> int | None:
        """Return the steps of the whole run; None if the recipe doesn't say."""
        if self.recipe.epochs is None and self.recipe.steps is None:
            return None
        return self._steps(
            train,
            self.recipe.epochs,
            self.recipe.steps,
        )

    def _budget_begins(
        self,
        program: Program,
        until: int,
        budget: int,
    ) -> int:
        """Return the step before the budget that policies are told of.

        A policy that decays or averages towards the end does so once in a budget. A run
        in several calls of fit() has one budget only if the recipe says the whole; else
        one begins with each call that comes after the end of the one before.

        Args:
          program: its policies are told.
          until: the step at which this fit ends.
          budget: the step at which the budget ends.
        """
        names = _towards_the_end(program)
        before = self._told_end
        self._told_end = budget
        begun = _begun(self.state)
        if not names or until == self.step or before == budget:
            return begun
        if self.step and (before is None or self.step >= before):
            begun = self.step
        if self.step and before is not None:
            goes_on = "goes on" if begun < self.step else "begins anew"
            self._note(
                f"{' and '.join(names)} took step {before} for the end of the run,"
                f" which {goes_on} with a budget of steps {begun + 1} to {budget}: say"
                " the whole budget once, as Recipe.epochs or Recipe.steps;"
                " fit(epochs=1) then trains pieces of it"
            )
        return begun

    # ---- one run ----

    def _run(
        self,
        program: Program,
        train: Any,
        test: Any,
        until: int,
        budget: tuple[int, int],
    ) -> History:
        """Train, and leave everything behind in order, whatever ends the run.

        Args:
          program: what is trained.
          train: the training data.
          test: the test data, or None.
          until: the step to reach.
          budget: the steps before and at the end of the budget.
        """
        outputs = Outputs(
            Monitor(None if agreement.host() else self.run_dir, self._sinks)
        )
        self._monitor = outputs.monitor
        energy = EnergyMeter().start()
        loop = None
        status = "failed"
        reason: BaseException | None = None
        try:
            if self.run_dir is not None:
                self._open(outputs, self.run_dir, program)
            _check_hosts_alike(program, train, test)
            self._announce(program, train, until)
            self._announce_budget(program, *budget)
            self._clear(outputs)
            loop = Loop(
                program,
                Start(
                    self._state(program),
                    self.step,
                    self._record,
                    self._bases,
                ),
                train,
                test,
                until,
                outputs,
                budget,
                self._reader,
            )
            self._bases = {}
            loop.run()
            status = loop.history.status
        except DivergedError as error:
            status = "diverged"
            reason = error
            raise
        except BaseException as error:
            reason = error
            raise
        finally:
            phase.reached(phase="shutdown")
            try:
                if loop is not None:
                    self._take_over(loop)
                    self._conclude(loop.history, program, status, reason, energy)
            finally:
                energy.close()
                self._close(outputs, loop is not None, status, reason)
        return loop.history

    def _open(
        self,
        outputs: Outputs,
        folder: Path,
        program: Program,
    ) -> None:
        """Open what a run with a folder has, one after the other."""
        if not agreement.host():
            outputs.mailbox = Mailbox(folder)
        agreement.first(lambda: self._describe_run(folder, program))
        if self._trace_samples and agreement.host() == 0:
            outputs.samples = SampleTrace(folder)
        outputs.checkpoints = Checkpoints(
            folder / "checkpoints", self.recipe.keep, self.recipe.best
        )
        outputs.local = self._local
        outputs.folder = folder

    def _describe_run(
        self,
        folder: Path,
        program: Program,
    ) -> None:
        if not self._is_same_run:
            (folder / recovery.FILE).unlink(missing_ok=True)
        describe(folder, program, self._source, self.preparation)

    def _clear(self, outputs: Outputs) -> None:
        """Tell what is to be told, and put checkpoints away that are in the way."""
        for note in self._notes:
            outputs.monitor.event("warning", text=note)
        self._notes = []
        outputs.local.forget(self.step)
        for later in outputs.checkpoints.set_aside(self.step):
            outputs.monitor.event(
                "warning",
                text=(
                    f"the checkpoint of step {later} is later than this run; moved"
                    " to set_aside/"
                ),
            )
        outputs.checkpoints.begin()

    def _take_over(self, loop: Loop) -> None:
        """Take over where the loop has ended."""
        self.state = loop.state
        if self.state is None:
            # The checkpoints to which the run should have gone back can't be read.
            self.step = 0
            self._record = RunRecord()
            self._is_same_run = False
            return
        self.step = loop.step
        self._record = loop.record
        self._is_same_run = True

    def _close(
        self,
        outputs: Outputs,
        has_begun: bool,
        status: str,
        reason: BaseException | None,
    ) -> None:
        """Close what the run had open, and write its report.

        Args:
          outputs: of the run.
          has_begun: whether there was a loop.
          status: how the run ended.
          reason: what was raised.
        """
        outputs.mailbox.close(status)
        outputs.monitor.close()
        self._monitor = Monitor(None)
        if self.run_dir is None or not isinstance(reason, Exception | None):
            return
        # A save that is on its way may end, and the report is written. Should they fail
        # too, a person is told what failed first.
        suppressed = [LeptonError] if reason else []
        with contextlib.suppress(*suppressed):
            outputs.checkpoints.close()
            if has_begun and agreement.host() == 0:
                write_report(self.run_dir)

    def _announce(
        self,
        program: Program,
        train: Any,
        until: int,
    ) -> None:
        params = by_path(program.trace.state.params)
        self._monitor.event(
            "start",
            name=self.recipe.name,
            version=version("lepton-jax"),
            jax=jax.__version__,
            flax=flax.__version__,
            python=platform.python_version(),
            platform=self.topology.platform,
            device_kind=self._devices[0].device_kind,
            devices=len(self._devices),
            parameters=sum(leaf.size for leaf in params.values()),
            parts=parts_of(self.recipe.optimizer, program.trace.state.params),
            steps=until,
            step=self.step,
            batch_size=self.recipe.batch_size,
            samples_per_epoch=epoch_samples(train),
            metrics=list(self.recipe.metrics),
            best=self.recipe.best,
            plan=str(program.plan),
            price_per_hour=program.plan.price_per_hour,
            table=_table(program.plan),
            recipe=self._source.get("file"),
            settings=self._source.get("settings", {}),
            folder=None if self.run_dir is None else str(self.run_dir),
        )

        for text in program.trace.tables.refused:
            self._monitor.event("warning", step=self.step, text=text)

    def _announce_budget(
        self,
        program: Program,
        begun: int,
        end: int,
    ) -> None:
        """Say which steps the policies that look at the budget take for it."""
        names = _towards_the_end(program)
        if names:
            self._monitor.event(
                "budget",
                step=self.step,
                begun=begun,
                end=end,
                policies=names,
            )

    def _conclude(
        self,
        history: History,
        program: Program,
        status: str,
        reason: BaseException | None,
        energy: EnergyMeter,
    ) -> None:
        history.status = status
        history.folder = self.run_dir
        history.compilations = sum(c.program == "train" for c in program.compilations)
        why = history.reason
        if reason is not None:
            why = getattr(reason, "what", None) or repr(reason)
        rate = history.samples / history.seconds if history.seconds else None
        self._monitor.event(
            "end",
            status=status,
            steps=history.steps,
            step=self.step,
            seconds=history.seconds,
            samples_per_second=rate,
            compilations=history.compilations,
            metrics=history.evaluations[-1][1] if history.evaluations else {},
            energy=energy.told(),
            **({"reason": why} if why else {}),
        )
        if not self._sinks and not agreement.host():
            for noticed in history.notices:
                warnings.warn(str(noticed), stacklevel=users_frame())

    # ---- trace, plan, program, state ----

    def _tracing(
        self,
        shapes: tuple[Any, Any] | None,
        samples: int | None = None,
    ) -> Trace:
        if self.trace is None:
            train = _settled(None, self.recipe.train)
            if train is None and shapes is None:
                raise DataError(
                    "the shapes of the data are not known yet",
                    where="Trainer",
                    remedy=(
                        "give the recipe train=(inputs, targets), or call fit or load"
                        " first"
                    ),
                )
            inputs, targets = shapes or sample(train)
            samples = samples or _count(train)
            self.trace = trace(
                self.recipe,
                inputs,
                targets,
                samples=samples,
            )
        return self.trace

    def _ready(
        self,
        shapes: tuple[Any, Any] | None,
        samples: int | None = None,
    ) -> Program:
        """Return the program; it is traced and planned if there is none yet.

        Args:
          shapes: inputs and targets of a batch; None: as of the recipe's data.
          samples: in an epoch; None: not known.
        """
        if self.program is None:
            with phase.phase("plan"):
                traced = self._tracing(shapes, samples)
                chosen = self._planned(traced)
            devices: Any = self._devices
            if self._given_plan is None or self._resizes():
                devices = ahead.mesh_devices(
                    self.topology,
                    chosen.mesh,
                    self._devices,
                )
            self.program = Program(traced, chosen, devices, self._compiled)
        return self.program

    def _planned(self, traced: Trace) -> Plan:
        """Return host 0's plan, which is run everywhere.

        The other hosts check it against what they have traced.
        """
        if self._given_plan is not None:
            self._given_plan.check(traced)
        if agreement.hosts() == 1:
            return self._own_plan(traced)
        chosen = Plan.from_json(
            agreement.first(lambda: self._own_plan(traced).to_json())
        )
        if agreement.host():
            chosen.check(traced)
        return chosen

    def _own_plan(self, traced: Trace) -> Plan:
        """Return the plan that was given, or else the best one for these devices."""
        given = self._given_plan
        if given is None:
            return plan(traced, self.topology)
        if not self._resizes():
            return given
        fitting = resized(given, traced, self.topology)
        mesh = ", ".join(f"{name}={size}" for name, size in fitting.mesh.items())
        self._note(
            f"the plan that was given is for {given.devices} devices, and there are"
            f" {self.topology.devices}: they follow another one, {fitting.name} over"
            f" {mesh}, remat {fitting.remat}"
        )
        return fitting

    def _resizes(self) -> bool:
        """Whether a plan was given for another number of devices, and may change."""
        given = self._given_plan
        if given is None or not self._resizes_plan:
            return False
        return given.devices != self.topology.devices

    def _state(self, program: Program) -> State:
        if self.state is None:
            self.state = program.init(self.recipe.seed)
        return self.state

    def _steps(
        self,
        train: Any,
        epochs: float | None,
        steps: int | None,
    ) -> int:
        """Return the number of steps that a budget makes."""
        self.recipe.with_(epochs=epochs, steps=steps)  # checks them
        if steps is not None:
            return steps
        samples = epoch_samples(train)
        if epochs is None or samples is None:
            fault = "the data's length is not known"
            if epochs is None:
                fault = "no budget is given"
            raise RecipeError(
                fault,
                where="Recipe.steps",
                remedy="set steps=..." + (" or epochs=..." if samples else ""),
            )
        steps = math.ceil(epochs * samples / self.recipe.batch_size)
        self.recipe.with_(steps=steps)
        return steps

    # ---- events ----

    def _compiled(self, compilation: Compilation) -> None:
        self._monitor.event("compile", **asdict(compilation))

    def _damaged(
        self,
        step: int,
        reason: str,
    ) -> None:
        self._notice("damaged", step=step, reason=reason)

    def _note(self, text: str) -> None:
        """Tell a person something about the run to come; the run's events repeat it."""
        self._notes.append(text)
        # Sinks hear it with the events of the fit.
        if not self._sinks and not agreement.host():
            warnings.warn(text, stacklevel=users_frame())

    def _notice(
        self,
        kind: str,
        **fields: Any,
    ) -> None:
        """Record an event outside of a fit."""
        has_folder = self.run_dir is not None and self.run_dir.is_dir()
        file = Monitor(self.run_dir if has_folder and agreement.host() == 0 else None)
        file.event(kind, **fields)
        file.close()
        for sink in self._sinks:
            sink.event({"kind": kind, **fields})


# ---- internals ----


def _made(
    recipe: Recipe | Callable[[], Recipe] | None,
    changes: dict[str, Any],
) -> Recipe:
    """Return the recipe that a person has given, with the changes next to it.

    Raises:
      RecipeError: it is none, or lacks a field.
    """
    if callable(recipe):
        with pointing_at_user(
            "making the recipe",
            "give a Recipe or a function that returns one and needs no "
            "arguments; a model goes to model=...",
            where="Trainer(recipe)",
            kind=RecipeError,
        ):
            recipe = recipe()
    if recipe is None:
        return _of_fields(changes)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"a {type(recipe).__name__} is given where a Recipe is expected",
            where="Trainer",
            remedy=(
                "give a Recipe, a function that returns one, or a Recipe's fields"
                " by name"
            ),
        )
    return recipe.with_(**changes)


def _of_fields(given: dict[str, Any]) -> Recipe:
    needed = [
        field.name
        for field in fields(Recipe)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    missing = [name for name in needed if name not in given]
    if missing:
        examples = ", ".join(f"{name}=..." for name in needed)
        raise RecipeError(
            f"{' and '.join(missing)} not given",
            where="Trainer",
            remedy=f"pass a Recipe, or at least {examples}",
        )
    recipe = Recipe(**{name: given[name] for name in needed})
    # An unknown name is an error that suggests the nearest.
    return recipe.with_(**given)


def _loaded(given: Plan | str | Path | None) -> Plan | None:
    return given if given is None or isinstance(given, Plan) else Plan.load(given)


def _check_hosts_alike(
    program: Program,
    train: Any,
    test: Any,
) -> None:
    """Check that all hosts have the same data and the same train step."""
    if agreement.hosts() > 1:
        agreement.same(
            {
                "the training data": described(train),
                "the test data": described(test),
                "the train step": program.fingerprint(),
            }
        )


def _table(plan: Plan) -> list[dict[str, Any]]:
    """Return how the parameters lie on the devices, a row for each."""
    return [
        {
            "path": array.path,
            "kind": array.kind,
            "shape": list(array.shape),
            "dtype": array.dtype,
            "bytes": array.bytes,
            "spec": ", ".join(map(str, array.spec)) or "replicated",
        }
        for array in plan.arrays
        if array.kind == "params"
    ]


def _towards_the_end(program: Program) -> list[str]:
    """Return the names of the policies that act towards the end of a run."""
    policies = program.controller.policies
    return [policy.name for policy in policies if "progress" in policy.watches]


def _stopping_by_evaluations(program: Program) -> str | None:
    """Return the name of a policy that ends the run by evaluations alone."""
    for policy in program.controller.policies:
        evaluated = any(name.startswith("evaluation_") for name in policy.watches)
        if evaluated and {"stop", "keep_average"} <= set(policy.moves):
            return policy.name
    return None


def _begun(state: State | None) -> int:
    """Return the step after which the present budget began."""
    fed = getattr(getattr(state, "controller", None), "fed", {})
    return int(np.asarray(fed.get("begun", 0)))


def _told_end(
    program: Program,
    restored: Restored,
) -> int | None:
    """Return the end that these policies knew when the state was saved.

    It is None if they begin anew.
    """
    names = _towards_the_end(program)
    given = restored.record.given
    begins_anew = given is not None and not set(names) <= set(given["policies"])
    if not names or begins_anew:
        return None
    return int(np.asarray(restored.state.controller.fed["steps"])) or None


def _nothing(folder: Path) -> NoCheckpointError:
    return NoCheckpointError(
        "there is no committed checkpoint",
        where=folder,
        remedy="name the folder of a run or of a saved model",
    )


def _settled(data: Any, otherwise: Any) -> Any:
    """Return data in one of the forms that can be read; None: there is none."""
    data = otherwise if data is None else data
    return None if data is None else settled(data)


def _count(data: Any) -> int | None:
    return len(data) if isinstance(data, Arrays) else None


def _same(left: Any, right: Any) -> bool:
    """Whether two arguments hold the very same data.

    A pair of arrays is written anew at each call, so it is the arrays that count.
    """
    if not isinstance(left, tuple | list) or not isinstance(right, tuple | list):
        return left is right
    if len(left) != len(right):
        return False
    return all(a is b for a, b in zip(left, right, strict=True))
