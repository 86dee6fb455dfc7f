"""The short way through everything: a recipe in, a trained model out."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax
import grain
import jax
import numpy as np

from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.checkpoint.local import LocalCheckpoints
from lepton_jax.controller.journal import knobs_set_live
from lepton_jax.controller.live import Live
from lepton_jax.data import (
    Arrays,
    check_limits,
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
    PlanError,
    RecipeError,
    pointing_at_user,
    users_frame,
    writing_remedy,
)
from lepton_jax.hardware import Topology, here, topology
from lepton_jax.hosts import agreement, phase
from lepton_jax.monitor import Monitor, SampleTrace, Sink, write_report
from lepton_jax.planner import Plan, Trace, ahead, check_plan, plan, trace
from lepton_jax.recipe import Recipe
from lepton_jax.step.module import is_linen
from lepton_jax.step.state import State
from lepton_jax.train.history import History
from lepton_jax.train.loop import Loop, evaluate, order
from lepton_jax.train.program import Compilation, Program
from lepton_jax.train.recovery import recalled
from lepton_jax.train.restore import Reader, Restored
from lepton_jax.trees import by_path

ROWS_SHOWN = 5  # rows that a message names
NOTHING = "there is no committed checkpoint"
NAMES = {"seed": "the seed of the shuffling", "of": "the number of samples"}


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
      trace_samples: write into the run folder which samples each step was made of
        (`samples.jsonl`).
      local_dir, local_every: a folder on each host's own disk (or in its memory) for
        fast checkpoints beside those of the run folder, and seconds between them;
        `resume` takes the newest that all hosts can read.
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
        trace_samples: bool = False,
        local_dir: str | Path | None = None,
        local_every: float = 60.0,
        **changes: Any,
    ):
        if callable(recipe):
            with pointing_at_user(
                "making the recipe",
                "give a Recipe or a function that returns one and needs no "
                "arguments; a model goes to model=...",
                where="Trainer(recipe)",
                kind=RecipeError,
            ):
                recipe = recipe()
        # fields next to a recipe are what a person asks for now; without one they are
        # the recipe
        self._asked = set(changes) if recipe is not None else set()
        if recipe is None:
            needed = [
                f.name
                for f in fields(Recipe)
                if f.default is MISSING and f.default_factory is MISSING
            ]
            missing = [name for name in needed if name not in changes]
            if missing:
                raise RecipeError(
                    f"{' and '.join(missing)} not given",
                    where="Trainer",
                    remedy=(
                        "pass a Recipe, or at least"
                        f" {', '.join(f'{n}=...' for n in needed)}"
                    ),
                )
            recipe = Recipe(**{n: changes.pop(n) for n in needed})
        if not isinstance(recipe, Recipe):
            raise RecipeError(
                f"a {type(recipe).__name__} is given where a Recipe is expected",
                where="Trainer",
                remedy=(
                    "give a Recipe, a function that returns one, or a Recipe's fields"
                    " by name"
                ),
            )
        recipe = recipe.with_(**changes)
        self.recipe = recipe.with_(
            train=_settled(None, recipe.train),
            test=_settled(None, recipe.test),
        )
        self.run_dir = None if run_dir is None else Path(run_dir)
        (self.topology, self._devices) = here(devices)
        self._sinks = () if agreement.host() else tuple(sinks)
        self._source = source or {}
        self._given = (
            plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
        )
        self._monitor = Monitor(None)
        self._trace_samples = trace_samples
        self._local = None
        if local_dir is not None and self.run_dir is not None:
            self._local = LocalCheckpoints(
                Path(local_dir),
                self.run_dir,
                local_every,
            )
        self.trace: Trace | None = None
        self.program: Program | None = None
        self.state: State | None = None
        self.step = 0
        self._position: dict[str, Any] = {"samples": 0, "grain": None}
        self._kept: dict[str, Any] = {}
        self._trained_on: Any = None
        self._resumed = False
        self._reader: Reader | None = None
        self._given_now: dict[str, float] = {}
        # the end of the run, in steps, that the policies at work were told of
        self._told_end: int | None = None
        self._notes: list[str] = []

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
    ) -> Plan:
        """The plan for a topology by name, which need not be there; None: for the live
        devices.

        Args:
          on: "v5p:4x4x4", "h200:8", ...
          objective, mesh, pins, remat, micro_batches: as of `lepton_jax.plan`. To run a
            plan that they decide, give it to `Trainer(..., plan=...)`.

        As long as there is no data to take shapes from, it covers an NNX model's
        parameters and optimizer alone.

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
        target = topology(on) if isinstance(on, str) else on or self.topology
        if (
            self.trace is None
            and self.recipe.train is None
            and not is_linen(self.recipe.model)
        ):
            return plan(trace(self.recipe, None, None), target)  # the parameters alone
        return plan(
            self._tracing(None),
            target,
            objective=objective,
            mesh=mesh,
            pins=pins,
            remat=remat,
            micro_batches=micro_batches,
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
        """Train, evaluate and save as the recipe says; what is given here goes before
        the recipe's.

        Without `epochs` and `steps` training goes on to the recipe's total, so a
        resumed run ends where the whole run would have; one that a policy has stopped
        stays where it is. With either of them it goes on for that much more.

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
        if batch_size is not None and batch_size != self.recipe.batch_size:
            self.recipe = self.recipe.with_(batch_size=batch_size)
            self.trace = None
            self.program = None
        if isinstance(train, grain.IterDataset) and self.recipe.steps_per_call != 1:
            # between the batches of a block the position of a data set that can only be
            # iterated is not known
            self.recipe = self.recipe.with_(steps_per_call=1)
            self.trace = None
            self.program = None
        if self.trace is not None and self.trace.samples != _count(train):
            self.trace = self.program = None
        program = self._ready(sample(train), _count(train))
        self._check(train, "training data")
        if test is not None:
            self._check(test, "test data")
        elif self.recipe.best is not None:
            raise RecipeError(
                f"best={self.recipe.best!r} asks for evaluations, but there is nothing"
                " to evaluate on",
                where="Recipe.best",
                remedy="set Recipe.test, or leave best out",
            )
        program.rehearse(None if test is None else epoch_samples(test))
        self._settle_position(given, order(self.recipe, train))
        more = epochs is not None or steps is not None
        planned = self._planned_steps(train)
        if more:
            until = self.step + self._steps(train, epochs, steps)
        elif self._kept.get("stopped"):
            until = self.step
        else:
            until = max(
                self._steps(train, self.recipe.epochs, self.recipe.steps), self.step
            )
        budget = max(until, planned or 0)
        self._compare_budgets(program, budget)
        return self._run(program, train, test, until, budget)

    def evaluate(self, test: Any = None) -> Any:
        """Loss and metrics on samples, each of which counts exactly once: a named
        tuple, the loss first.
        """
        test = _settled(test, self.recipe.test)
        if test is None:
            raise DataError(
                "there is nothing to evaluate on",
                where="Trainer.evaluate",
                remedy="pass (inputs, targets), or set Recipe.test",
            )
        program = self._ready(sample(test))
        self._check(test, "test data")
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
    ) -> Any:
        """What the model makes of inputs, as NumPy arrays, one row a sample.

        Args:
          inputs: an array, or a dict of arrays as the model's keyword arguments.
          decode: outputs to predictions, in JAX; None: the recipe's, or what its loss
            implies.

        Raises:
          DataError: the outputs of some samples hold NaN, and their predictions, such
            as labels, would not show it.
          ModelError: a prediction can't be joined from batches: it has no dim for
            samples.
        """
        data = inputs if isinstance(inputs, Arrays) else Arrays(inputs)
        program = self._ready(None)
        self._check(data, "inputs")
        size = self.recipe.batch_size
        prediction = program.prediction(decode)
        prediction.check(len(data))

        parts = []
        rows = []
        hidden = []
        fill = len(data) % size == 0 or prediction.meeting is None
        for (batch, _), count in one_pass(data, size, program.sharding_of, fill):
            decoded, look = program.predict_and_look(
                self._state(program), batch, decode
            )
            parts.append(decoded)
            rows.append(count)
            if look is not None:
                hidden.append(look)
        if hidden:
            looks = [np.asarray(x)[:n] for x, n in zip(hidden, rows, strict=True)]
            _check_hidden(np.flatnonzero(np.concatenate(looks)), len(data))
        return prediction.joined(parts, rows)

    def save(self, folder: str | Path) -> Path:
        """Write state, recipe and plan to a folder; an older save there is replaced
        once this one is whole.
        """
        if self.program is None:
            raise CheckpointError(
                "there is nothing to save yet",
                where=folder,
                remedy="call fit or load first",
            )
        folder = Path(folder)
        if os.path.exists(folder) and (
            not (folder / "recipe.json").exists() or (folder / "events.jsonl").exists()
        ):
            raise CheckpointError(
                "the folder exists and holds something else than a saved model",
                where=folder,
                remedy="name another folder",
            )
        fresh = folder.with_name(folder.name + ".new")
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(fresh, ignore_errors=True)
        agreement.first(lambda: self._describe(fresh))
        checkpoints = Checkpoints(
            fresh / "checkpoints",
            keep=1,
            again="save again",
        )
        checkpoints.save(
            self.step,
            self._state(self.program),
            {
                "position": self._position,
                "plan": self.program.plan.to_json(),
                "rollbacks": self._kept.get("rollbacks"),
                "given": self.program.given(),
            },
        )
        checkpoints.wait()
        checkpoints.prove(self.step)  # before the older save goes
        checkpoints.close()
        agreement.first(lambda: _replace(folder, fresh, old))
        return folder

    def load(
        self,
        folder: str | Path,
        step: int | None = None,
    ) -> Trainer:
        """Go on from a saved model or a run folder: its latest readable step, or the
        one given.

        Parameters and variables have to fit. The recipe may have another optimizer,
        other policies, knobs or rates: they are in effect; state of theirs that fits is
        kept, and the rest begins anew, which is said by name. A schedule is read at the
        count of updates, which goes on.

        Raises:
          CheckpointError: nothing readable is there, or it does not fit the model; each
            leaf that differs is named.
        """
        folder = Path(folder)
        checkpoints = Checkpoints(folder / "checkpoints")
        own = self.run_dir is not None and folder.resolve() == self.run_dir.resolve()
        steps = checkpoints.steps()
        if not steps and not (own and self._local):
            raise _nothing(folder)
        program = self._ready(
            None if self.recipe.train is not None else _shapes_in(folder)
        )
        reader = self._reader = Reader(
            program,
            self._asked,
            knobs_set_live(folder),
        )
        with phase.phase("restore"):
            local = self._local if own and step is None else None
            newest = max(steps, default=0)
            near = (
                local.newest(
                    newest,
                    reader.template(),
                    self._damaged,
                )
                if local
                else None
            )
            if near is not None:
                step, state, record = near
                restored = reader.settle(step, state, record)
            elif not steps:
                raise _nothing(folder)
            elif step is None:
                step, restored = reader.read_latest(checkpoints, self._damaged)
            else:
                restored = reader.read(checkpoints, step)
            checkpoints.close()
        phase.reached(step=step, done=step)
        record = restored.record
        if own:
            slow = record.get("slow", ())
            record = recalled(folder, step, record)
            record["slow"] = None if slow is None else record.get("slow")
        self.step = step
        self.state = restored.state
        self._position = record["position"]
        names = ["rollbacks"] + (["journal", "stopped", "slow"] if own else [])
        self._kept = {name: record.get(name) for name in names}
        self._given_now = restored.knobs
        self._told_end = _told_end(program, restored)
        for note in restored.notes:
            self._note(note)
        return self

    def resume(self, asked: Iterable[str] = ()) -> Trainer:
        """Go on with the run in `run_dir`; one that was stopped before its first
        checkpoint begins anew.

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
            self._resumed = True
        except CheckpointError as error:
            if error.what != NOTHING:
                raise
            self._notice(
                "warning",
                text="the run has no committed checkpoint; it begins at step 0",
            )
        return self

    # ---- behind them ----

    def _settle_position(
        self,
        given: Any,
        now: dict[str, Any],
    ) -> None:
        """Other data, or another order of it, starts at its first sample; but a run to
        be resumed must find its own.
        """
        then = {name: self._position[name] for name in now if name in self._position}
        if then and then != now and self._resumed:
            what = ", ".join(
                f"{NAMES[k]} was {then[k]} and is {now[k]}"
                for k in now
                if then[k] != now[k]
            )
            raise CheckpointError(
                f"the run can't go on where it was in the data: {what}",
                where=self.run_dir,
                remedy=(
                    "resume with the run's own data, seed and shuffle; or load() its"
                    " state and fit anew"
                ),
            )
        if (then and then != now) or (
            self._trained_on is not None and not _same(given, self._trained_on)
        ):
            self._position = {"samples": 0, "grain": None}
        self._trained_on = given
        self._resumed = False

    def _planned_steps(self, train: Any) -> int | None:
        """Steps of the whole run as the recipe says; None if it says nothing."""
        if self.recipe.epochs is None and self.recipe.steps is None:
            return None
        return self._steps(
            train,
            self.recipe.epochs,
            self.recipe.steps,
        )

    def _compare_budgets(
        self,
        program: Program,
        budget: int,
    ) -> None:
        """Warn where policies were told of another end of the run than the one to come.

        A policy that decays or averages towards the end does so once. A run in several
        calls of fit() has one end only if the recipe says the whole budget.
        """
        names = _towards_the_end(program)
        before = self._told_end
        self._told_end = budget
        if not names or not self.step or before in (None, budget):
            return
        self._note(
            f"{' and '.join(names)} took step {before} for the end of the run, which"
            f" now ends at step {budget}: say the whole budget once, as Recipe.epochs"
            " or Recipe.steps; fit(epochs=1) then trains pieces of it"
        )

    def _run(
        self,
        program: Program,
        train: Any,
        test: Any,
        until: int,
        budget: int,
    ) -> History:
        monitor = self._monitor = Monitor(
            None if agreement.host() else self.run_dir, self._sinks
        )
        checkpoints = None
        loop = None
        live = None
        samples = None
        status = "failed"
        reason: BaseException | None = None
        try:
            if self.run_dir is not None:
                folder = self.run_dir
                live = Live(None if agreement.host() else folder)
                agreement.first(lambda: self._describe(folder, run=True))
                samples = (
                    SampleTrace(folder)
                    if self._trace_samples and agreement.host() == 0
                    else None
                )
                checkpoints = Checkpoints(
                    self.run_dir / "checkpoints",
                    self.recipe.keep,
                    self.recipe.best,
                )
            if agreement.hosts() > 1:
                agreement.same(
                    {
                        "the training data": described(train),
                        "the test data": described(test),
                        "the train step": program.fingerprint(),
                    }
                )
            self._announce(program, train, until)
            for note in self._notes:
                monitor.event("warning", text=note)
            self._notes = []
            if self._local is not None:
                self._local.forget(self.step)
            for later in checkpoints.set_aside(self.step) if checkpoints else ():
                monitor.event(
                    "warning",
                    text=(
                        f"the checkpoint of step {later} is later than this run; moved"
                        " to set_aside/"
                    ),
                )
            if checkpoints is not None:
                checkpoints.begin()
            loop = Loop(
                program,
                self._state(program),
                self.step,
                train,
                test,
                self._position,
                until,
                monitor,
                checkpoints,
                self.run_dir,
                live,
                {"journal": 0, **self._kept},
                samples,
                self._local,
                budget=budget,
                given=self._given_now,
                reader=self._reader,
            )
            self._given_now = {}
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
                    self.state = loop.state
                    self.step = loop.step
                    self._position = loop.position
                    self._kept = loop.kept
                    # the checkpoints that it should go back to can't be read
                    if self.state is None:
                        self.step = 0
                        self._position = {"samples": 0, "grain": None}
                        self._kept = {}
                    self._conclude(loop.history, program, status, reason)
            finally:
                if live is not None:
                    live.close(status)
                monitor.close()
                self._monitor = Monitor(None)
                # a save on its way may end, and the report is written; should they fail
                # too, what failed before is told
                if self.run_dir is not None and (
                    reason is None or isinstance(reason, Exception)
                ):
                    with contextlib.suppress(*[LeptonError] if reason else []):
                        if checkpoints is not None:
                            checkpoints.close()
                        if loop is not None and agreement.host() == 0:
                            write_report(self.run_dir)
        return loop.history

    def _announce(
        self,
        program: Program,
        train: Any,
        until: int,
    ) -> None:
        table = [
            {
                "path": a.path,
                "kind": a.kind,
                "shape": list(a.shape),
                "dtype": a.dtype,
                "bytes": a.bytes,
                "spec": ", ".join(map(str, a.spec)) or "replicated",
            }
            for a in program.plan.arrays
            if a.kind == "params"
        ]
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
            parameters=sum(
                x.size for x in by_path(program.trace.state.params).values()
            ),
            steps=until,
            step=self.step,
            batch_size=self.recipe.batch_size,
            samples_per_epoch=epoch_samples(train),
            metrics=list(self.recipe.metrics),
            best=self.recipe.best,
            plan=str(program.plan),
            table=table,
            recipe=self._source.get("file"),
            settings=self._source.get("settings", {}),
            folder=None if self.run_dir is None else str(self.run_dir),
        )

    def _conclude(
        self,
        history: History,
        program: Program,
        status: str,
        reason: BaseException | None,
    ) -> None:
        history.status = status
        history.folder = self.run_dir
        history.compilations = sum(c.program == "train" for c in program.compilations)
        why = {"reason": history.reason} if history.reason else {}
        why = (
            why
            if reason is None
            else {"reason": getattr(reason, "what", None) or repr(reason)}
        )
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
            **why,
        )

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
            self.trace = trace(
                self.recipe,
                *(shapes or sample(train)),
                samples=samples or _count(train),
            )
        return self.trace

    def _ready(
        self,
        shapes: tuple[Any, Any] | None,
        samples: int | None = None,
    ) -> Program:
        if self.program is None:
            with phase.phase("plan"):
                traced = self._tracing(shapes, samples)
                chosen = self._planned(traced)
            devices = (
                ahead.mesh_devices(
                    self.topology,
                    chosen.mesh,
                    self._devices,
                )
                if self._given is None
                else self._devices
            )
            self.program = Program(
                traced,
                chosen,
                devices,
                self._compiled,
            )
        return self.program

    def _planned(self, traced: Trace) -> Plan:
        """Host 0's plan: it is the one that is run everywhere, if it is one for what
        the other hosts have traced.
        """
        if self._given is not None:
            check_plan(self._given, traced)
        if agreement.hosts() == 1:
            return self._given or plan(traced, self.topology)
        text = agreement.first(
            lambda: (self._given or plan(traced, self.topology)).to_json()
        )
        chosen = Plan.from_json(text)
        if agreement.host():
            check_plan(chosen, traced)
        return chosen

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
        self.recipe.with_(epochs=epochs, steps=steps)  # checks them
        if steps is not None:
            return steps
        samples = epoch_samples(train)
        if epochs is None or samples is None:
            raise RecipeError(
                (
                    "no budget is given"
                    if epochs is None
                    else "the data's length is not known"
                ),
                where="Recipe.steps",
                remedy="set steps=..." + (" or epochs=..." if samples else ""),
            )
        steps = math.ceil(epochs * samples / self.recipe.batch_size)
        self.recipe.with_(steps=steps)
        return steps

    def _check(
        self,
        data: Any,
        what: str,
    ) -> None:
        """That a data set has the shapes and dtypes that the program is traced for, and
        labels within its classes.
        """
        assert self.trace is not None
        if what == "test data" and epoch_samples(data) is None:
            raise DataError(
                "a data set that is read in order has no end to evaluate up to",
                where=what,
                remedy="give arrays or a grain.MapDataset",
            )
        inputs, targets = sample(data)
        pairs = [("inputs", self.trace.inputs, inputs)]
        pairs += [] if what == "inputs" else [("targets", self.trace.targets, targets)]
        for name, expected, found in pairs:
            one = lambda x: (
                f"{jax.dtypes.canonicalize_dtype(x.dtype)}{list(x.shape[1:])}"
            )
            expected, found = (
                {path: one(leaf) for path, leaf in by_path(x).items()}
                for x in (expected, found)
            )
            if expected != found:
                a, b = (
                    ", ".join(f"{path} {kind}".strip() for path, kind in x.items())
                    or "absent"
                    for x in (expected, found)
                )
                raise DataError(
                    f"{name} of a sample: {b}; the model was traced for {a}",
                    where=what,
                    remedy=(
                        "give data of the shapes and dtypes that the model is"
                        " trained on"
                    ),
                )
        assert self.program is not None
        if isinstance(data, Arrays):
            targets = None if what == "inputs" else data.targets
            check_limits(
                self.program.limits,
                (data.inputs, targets),
                what,
                str,
            )
        if what == "test data":
            self.program.evaluation.check(epoch_samples(data) or 0)

    def _describe(
        self,
        folder: Path,
        run: bool = False,
    ) -> None:
        """recipe.json and plan.json."""
        assert self.program is not None
        if run and "journal" not in self._kept:  # not of this run: it begins anew
            (folder / "rollback.json").unlink(missing_ok=True)
        plain = {f.name: getattr(self.recipe, f.name) for f in fields(Recipe)}
        plain = {
            k: v for k, v in plain.items() if isinstance(v, int | float | str | None)
        }
        shapes = jax.tree.map(
            lambda x: {"shape": list(x.shape), "dtype": str(x.dtype)},
            {
                "inputs": self.program.trace.inputs,
                "targets": self.program.trace.targets,
            },
        )
        text = json.dumps(
            {
                **self._source,
                "model": self.program.trace.functional.name,
                "fields": plain,
                "batch": shapes,
            },
            indent=1,
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.json").write_text(text)
            (folder / "plan.json").write_text(self.program.plan.to_json())
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise CheckpointError(
                f"the run folder can't be written: {error}",
                where=folder,
                remedy=f"{writing_remedy(error)}, or name another folder",
            ) from error

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
        if self._sinks or agreement.host():
            # sinks hear it with the events of the fit
            self._notes.append(text)
            return
        self._notes.append(text)
        warnings.warn(text, stacklevel=users_frame())

    def _notice(
        self,
        kind: str,
        **what: Any,
    ) -> None:
        """An event outside of a fit."""
        folder = (
            self.run_dir
            if self.run_dir and self.run_dir.is_dir() and agreement.host() == 0
            else None
        )
        file = Monitor(folder)
        file.event(kind, **what)
        file.close()
        for sink in self._sinks:
            sink.event({"kind": kind, **what})


def _towards_the_end(program: Program) -> list[str]:
    """Names of the policies that do something towards the end of a run."""
    return [p.name for p in program.controller.policies if "progress" in p.watches]


def _told_end(program: Program, restored: Restored) -> int | None:
    """The end that these policies knew when the state was saved; None if they begin
    anew.
    """
    given = restored.record.get("given")
    known = None if given is None else given["policies"]
    names = _towards_the_end(program)
    if not names or (known is not None and not set(names) <= set(known)):
        return None
    return int(np.asarray(restored.state.controller.fed["steps"])) or None


def _check_hidden(rows: np.ndarray, total: int) -> None:
    """Check that no prediction was made of outputs that are not numbers."""
    if not len(rows):
        return
    shown = ", ".join(map(str, rows[:ROWS_SHOWN])) + (
        ", ..." if len(rows) > ROWS_SHOWN else ""
    )
    raise DataError(
        f"the model's outputs hold NaN for {len(rows)} of {total} inputs, and what "
        "predict returns would not show it",
        where=f"inputs, rows {shown}",
        remedy=(
            "look at those inputs, and at the model's parameters; to get the outputs "
            "as they are, call predict(inputs, decode=lambda outputs: outputs)"
        ),
    )


def _nothing(folder: Path) -> CheckpointError:
    return CheckpointError(
        NOTHING, where=folder, remedy="name the folder of a run or of a saved model"
    )


def _replace(
    folder: Path,
    fresh: Path,
    old: Path,
) -> None:
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _settled(data: Any, otherwise: Any) -> Any:
    data = otherwise if data is None else data
    return None if data is None else settled(data)


def _count(data: Any) -> int | None:
    return len(data) if isinstance(data, Arrays) else None


def _same(left: Any, right: Any) -> bool:
    """Whether two arguments hold the very same data; a pair of arrays is written anew
    at each call.
    """
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(
            a is b for a, b in zip(left, right, strict=True)
        )
    return left is right


def _shapes_in(folder: Path) -> tuple[Any, Any]:
    is_leaf = lambda x: set(x) == {"shape", "dtype"}
    try:
        batch = json.loads((folder / "recipe.json").read_text())["batch"]
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x["shape"], x["dtype"]),
            batch,
            is_leaf=is_leaf,
        )
        return shapes["inputs"], shapes["targets"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"recipe.json can't be read: {error}",
            where=folder,
            remedy="name the folder of a run or of a saved model",
        ) from error
