"""Checkpoints by Orbax, asynchronous and atomic.

The latest is the newest that is committed and readable. A step's folder appears under
its name only when it is whole:

    checkpoints/20/state/     the arrays, under their quoted paths
    checkpoints/20/record/    {"body": JSON text, "crc32": of it}
                              body: {"step", "record", "checksums": one for each array}
    set_aside/30              a later step, which the run has left

The checksums are made on the device from the very values that were to be written. So
what was damaged on disk is told from what is intact, whatever the storage format
notices.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import traceback
import weakref
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from lepton_jax.checkpoint.adoption import REPLACEABLE, Fresh
from lepton_jax.checkpoint.keys import as_stored, as_wanted, is_key, stored_shape
from lepton_jax.compat import jit_where, make_mesh
from lepton_jax.errors import (
    CheckpointError,
    LeptonError,
    of_another_host,
    writing_remedy,
)
from lepton_jax.hosts import agreement
from lepton_jax.trees import by_path, with_leaves

T = TypeVar("T")
# Whether a path of the template and one of the checkpoint have one shape and dtype.
Fits = Callable[[str, str], bool]
# (record, paths of the checkpoint, fits) to path of the template: path of its source.
Choose = Callable[[dict[str, Any], list[str], Fits], dict[str, str]]
# The percent sign comes first, as the other codes bring more of it.
QUOTES = {"%": "%25", "/": "%2F", ".": "%2E"}
GIVEN_UP = "a save is given up"
# Seconds that a save of several hosts may take. The run's supervision is sooner; and
# Orbax reads the clock, which may jump.
MONTH = 30 * 86400
# Characters of a library's message that are shown: of a longer one the beginning and
# the end, where the cause stands (assumption).
LONGEST_REASON = 300
REASON_BEGINNING = 100
REASON_END = 200

# Paths that reach the libraries below as they are. Others are reached by a link:
# Orbax looks for its parts by a glob over the whole path ("*", "?", "[x]"), etils takes
# /gs/, /s3/, /az/, /hf/ and "gs:/" for buckets, TensorStore refuses backslashes and
# what is not UTF-8 (seen in orbax-checkpoint 0.12.8 with tensorstore 0.1).
PLAIN = re.compile(r"(?!/(?:gs|s3|az|hf)(?:/|$))[\w./ =,+@~()'-]*")
# Characters of such a path; Orbax adds about 200 of its own, and Linux takes 4096.
LONGEST_PLAIN = 2000


class Checkpoints:
    """The checkpoints of one folder.

    Args:
      folder: created with the first save.
      keep: how many of the latest stay.
      best: a metric's name, after "-" for lowest first: one more checkpoint stays, the
        best by it.
      again: how a person goes on after a save that failed, for the error.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        best: str | None = None,
        again: str = "go on with --resume, or resume() in a notebook",
    ):
        self.folder = Path(folder).absolute()
        self._again = again
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if best is not None:
            name = best.removeprefix("-")
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[name],
                    reverse=best.startswith("-"),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._preserved = checkpoint_managers.AnyPreservationPolicy(policies)
        self._manager: ocp.CheckpointManager | None = None
        self._reader: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._link: Path | None = None
        self._unlink: Callable[[], object] | None = None

    def begin(self) -> None:
        """Make the folder and try it.

        So it is known before anything is computed that nothing can be saved there.

        Raises:
          CheckpointError: nothing can be written there, or what is written can't be
            read back.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise self._failed(error) from error

        if agreement.first(self._needs_link):
            self._try()

    def _needs_link(self) -> bool:
        return self._reached() != self.folder

    def _try(self) -> None:
        """Save and restore a small array in a folder next to this one.

        All hosts do it together.
        """
        place = self.folder.with_name(f".{self.folder.name}.try")
        everywhere = NamedSharding(
            make_mesh({"data": jax.device_count()}, jax.devices()), PartitionSpec()
        )
        values = np.arange(3, dtype=np.int32)
        array = jax.make_array_from_callback(
            values.shape, everywhere, lambda index: values[index]
        )
        shape = jax.ShapeDtypeStruct(
            values.shape,
            values.dtype,
            sharding=everywhere,
        )
        trial = Checkpoints(place, keep=1)
        try:
            trial.save(1, {"tried": array}, {})
            trial.wait()
            trial.restore(1, {"tried": shape})
        except Damaged as error:
            raise CheckpointError(
                f"what is saved in this folder can't be read back: {error.reason}",
                where=self.folder,
                remedy=(
                    "name a folder whose path has letters, digits, '-', '_' and '.'"
                    " alone"
                ),
            ) from error
        finally:
            trial.close()
            agreement.first(lambda: shutil.rmtree(place, ignore_errors=True))

    def save(
        self,
        step: int,
        state: Any,
        record: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Start to save.

        The state is copied before this returns, and may be donated afterwards.

        Args:
          step: of the state.
          state: a pytree of arrays.
          record: plain data that going on from here takes in addition.
          metrics: of the latest evaluation, for `best`.

        Raises:
          CheckpointError: this or the save before it could not be written.
        """
        self.wait()
        self._saving = step
        try:
            arrays, sums = _copy_and_checksum(_storable(state))
            sums = jax.device_get(sums)
            checksums = {path: int(value) for path, value in sums.items()}
            content = {"step": step, "record": record, "checksums": checksums}
            body = json.dumps(content)
            sealed = {"body": body, "crc32": zlib.crc32(body.encode())}
            saved = self._open().save(
                step,
                metrics=metrics,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    record=ocp.args.JsonSave(sealed),
                ),
            )
        except Exception as error:
            raise self._failed(error) from error
        assert saved, f"Orbax skips step {step}; the steps are {self.steps()}"

    def wait(self) -> None:
        """Return when what was saved is committed.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                raise self._failed(error) from error
        self._saving = None

    def close(self) -> None:
        """Wait, and let go of the folder."""
        if self._manager is not None:
            self.wait()
            self._manager.close()
            self._manager = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._unlink is not None:
            self._unlink()
            self._link = None
            self._unlink = None

    def prove(self, step: int) -> None:
        """Open a step that is committed, as a restore does.

        Raises:
          Damaged: it can't be read.
        """
        _alike(step, lambda: self._index(step))

    def lacks(self, step: int) -> bool:
        """Whether this step still has to be saved."""
        return step not in self.steps()

    def steps(self) -> list[int]:
        """Return the committed steps, in order, as host 0 sees them.

        Whether they can be read is seen only by reading them.
        """
        return agreement.first(self._committed)

    def _committed(self) -> list[int]:
        if not os.path.isdir(self.folder):  # False for a path that is too long, too
            return []
        return sorted(
            int(p.name)
            for p in self.folder.iterdir()
            if p.is_dir() and re.fullmatch(r"\d+", p.name)
        )

    def set_aside(self, after: int) -> list[int]:
        """Move steps later than `after` into the folder `set_aside` next to this one.

        So they can be saved anew.

        Returns:
          The steps.
        """
        steps = self.steps()
        later = [step for step in steps if step > after]
        if later:
            self.close()  # Orbax remembers which steps there are
        agreement.first(lambda: self._moved(later))
        return later

    def _moved(self, steps: list[int]) -> None:
        place = self.folder.with_name("set_aside")
        for step in steps:
            place.mkdir(exist_ok=True)
            taken = len(list(place.glob(f"{step}*")))
            name = f"{step}.{taken}" if taken else str(step)
            folder = self.folder / str(step)
            folder.rename(place / name)

    def restore(
        self,
        step: int,
        template: Any,
        choose: Choose | None = None,
        fresh: Fresh | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Read one step's state and its record.

        The state is laid out as the template's shardings say.

        Args:
          step: a committed one.
          template: a pytree of `jax.ShapeDtypeStruct` with shardings.
          choose: decides where each leaf of the template comes from, given the
            checkpoint's record, its paths, and whether two paths fit; None: each from
            the leaf of its own path, and all have to fit.
          fresh: parameters and variables that need not fit; None: all have to.

        Returns:
          The state and the record. Leaves that `choose` gives no source stay the
          template's.

        Raises:
          CheckpointError: there is no such step, or leaves that have to fit do not;
            each difference is named.
          Damaged: the content on disk is not the one that was saved.
        """
        steps = self.steps()
        if step not in steps:
            listed = ", ".join(map(str, steps)) or "(there are none)"
            raise CheckpointError(
                f"there is no checkpoint of step {step!r}",
                where=self.folder,
                remedy=f"name one of the steps {listed}",
            )
        wanted = jax.eval_shape(_storable, template)
        record, checksums, stored = _alike(step, lambda: self._index(step))
        sources = self._sources(
            step,
            wanted,
            stored,
            record,
            choose,
            fresh,
        )
        places = by_path(jax.tree.map(lambda leaf: leaf.sharding, template))

        shapes = {}
        for path, source in sources.items():
            leaf = wanted[_quoted(path)]
            shapes[_quoted(source)] = jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=places[path]
            )
        some = len(shapes) < len(stored)
        arrays = _alike(step, lambda: self._arrays(step, shapes, some))
        _verify(step, arrays, checksums)
        restored = {path: arrays[_quoted(source)] for path, source in sources.items()}
        return _filled(template, wanted, restored), record

    def _sources(
        self,
        step: int,
        wanted: dict[str, Any],
        stored: dict[str, Any],
        record: dict[str, Any],
        choose: Choose | None,
        fresh: Fresh | None,
    ) -> dict[str, str]:
        """Return path of each leaf that is restored, to its path in the checkpoint."""
        if choose is None:
            self._compare(step, wanted, stored)
            return {_unquoted(name): _unquoted(name) for name in wanted}

        def fits(path: str, source: str) -> bool:
            mine = wanted[_quoted(path)]
            theirs = stored[_quoted(source)]
            return _shape(mine) == _shape(theirs)

        if fresh is not None:
            fresh.check(map(_unquoted, wanted), map(_unquoted, stored))

        def is_fixed(path: str) -> bool:
            is_fresh = fresh is not None and fresh(path)
            return not path.startswith(REPLACEABLE) and not is_fresh

        def strict(leaves: dict[str, Any]) -> dict[str, Any]:
            return {n: leaf for n, leaf in leaves.items() if is_fixed(_unquoted(n))}

        fixed = strict(wanted)
        self._compare(step, fixed, strict(stored))
        paths = [_unquoted(name) for name in stored]
        return choose(record, paths, fits)

    def restore_latest(
        self,
        template: Any,
        on_damaged: Callable[[int, str], None],
        choose: Choose | None = None,
        fresh: Fresh | None = None,
    ) -> tuple[int, Any, dict[str, Any]]:
        """Read the newest step that can be read.

        Args:
          template: as of `restore`.
          on_damaged: called with each newer step, which can't be read, and why.
          choose: as of `restore`.
          fresh: as of `restore`.

        Returns:
          Step, state, record.

        Raises:
          CheckpointError: no step can be read, or the newest readable one does not fit
            the template.
        """
        steps = self.steps()
        reasons = []
        for step in reversed(steps):
            try:
                return (step, *self.restore(step, template, choose, fresh))
            except Damaged as error:
                on_damaged(step, error.reason)
                reasons.append(f"step {step}: {error.reason}")
        what = "\n    ".join(
            [f"none of the {len(steps)} checkpoints can be read", *reasons]
        )
        raise CheckpointError(
            what,
            where=self.folder,
            remedy="start the run anew, or name another run folder",
        )

    def _index(
        self, step: int
    ) -> tuple[dict[str, Any], dict[str, int], dict[str, Any]]:
        """Return a step's record, its checksums, and the shapes of its arrays."""
        record, checksums = self._record(step)
        try:
            # Read the index alone: Orbax would find the fault in as many threads as
            # there are arrays.
            place = {
                "driver": "file",
                "path": f"{self._reached() / str(step) / 'state'}/",
            }
            tensorstore.KvStore.open(
                {"driver": "ocdbt", "base": place}
            ).result().list().result()
            return record, checksums, self._read().item_metadata(step)["state"].tree
        except Exception as error:
            raise self._damaged(step, error) from error

    def _arrays(
        self,
        step: int,
        shapes: dict[str, Any],
        some: bool,
    ) -> dict[str, Any]:
        """Read arrays.

        Args:
          step: of which.
          shapes: of the wanted ones.
          some: whether the checkpoint has others.
        """
        try:
            if some:
                return self._some_arrays(step, shapes)
            return self._read().restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)),
            )["state"]
        except Exception as error:
            raise self._damaged(step, error) from error

    def _some_arrays(
        self,
        step: int,
        shapes: dict[str, Any],
    ) -> dict[str, Any]:
        # Orbax's standard handler reads all arrays of a step or none.
        hosts = None if agreement.hosts() == 1 else [agreement.host()]
        manager = self._make(hosts, ocp.PyTreeCheckpointHandler)
        restore = ocp.args.PyTreeRestore(
            item=shapes,
            restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
            partial_restore=True,
        )
        try:
            items = manager.restore(step, args=ocp.args.Composite(state=restore))
            return items["state"]
        finally:
            manager.close()

    def _record(self, step: int) -> tuple[dict[str, Any], dict[str, int]]:
        try:
            sealed = self._read().restore(
                step,
                args=ocp.args.Composite(record=ocp.args.JsonRestore()),
            )["record"]
            body = sealed["body"]
            intact = zlib.crc32(body.encode()) == sealed["crc32"]
        except Exception as error:
            raise self._damaged(step, error) from error
        if not intact:
            raise Damaged(step, "the checksum of its record does not match")
        content = json.loads(body)
        if content["step"] != step:
            raise Damaged(step, f"it holds step {content['step']} under another name")
        return content["record"], content["checksums"]

    def _compare(
        self,
        step: int,
        wanted: dict[str, Any],
        stored: dict[str, Any],
    ) -> None:
        """Compare the leaves of a template with those of a checkpoint.

        Raises:
          CheckpointError: they differ; it names each difference.
        """
        lines = []
        missing = wanted.keys() - stored.keys()
        surplus = stored.keys() - wanted.keys()
        shared = wanted.keys() & stored.keys()
        for name in sorted(missing):
            shape = _shape(wanted[name])
            lines.append(f"missing in the checkpoint: {_unquoted(name)} {shape}")
        for name in sorted(surplus):
            shape = _shape(stored[name])
            lines.append(f"surplus in the checkpoint: {_unquoted(name)} {shape}")
        for name in sorted(shared):
            theirs = _shape(stored[name])
            mine = _shape(wanted[name])
            if theirs != mine:
                lines.append(
                    f"{_unquoted(name)}: the checkpoint has {theirs}, the model {mine}"
                )
        if lines:
            raise CheckpointError(
                f"the checkpoint does not fit the model, {len(lines)} leaves"
                " differ:\n    " + "\n    ".join(lines),
                where=self.folder / str(step),
                remedy="restore with the model and optimizer that it was saved with",
            )

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = self._make(
                None if agreement.hosts() == 1 else range(agreement.hosts())
            )
        return self._manager

    def _read(self) -> ocp.CheckpointManager:
        """Return the manager that reads.

        Each host reads by itself: one that can't read would leave the others waiting.
        """
        if agreement.hosts() == 1:
            return self._open()
        if self._reader is None:
            self._reader = self._make([agreement.host()])
        return self._reader

    def _make(
        self,
        hosts: Iterable[int] | None,
        handler: Callable[..., Any] = ocp.StandardCheckpointHandler,
    ) -> ocp.CheckpointManager:
        _quieten()
        together: dict[str, Any] = {}
        waiting: dict[str, Any] = {}
        if hosts is not None:
            together = {"multiprocessing_options": _together(hosts)}
            if len(list(hosts)) > 1:
                waiting = {
                    "async_options": ocp.AsyncOptions(
                        timeout_secs=MONTH, barrier_sync_fn=_wait_for_the_others
                    )
                }
        try:
            # Orbax would find out late, and in another thread.
            self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                create=hosts is None,
                preservation_policy=self._preserved,
                **together,
                **waiting,
            )
            return ocp.CheckpointManager(
                self._reached(),
                options=options,
                item_handlers={
                    "state": handler(**together),
                    "record": ocp.JsonCheckpointHandler(**together),
                },
            )
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise self._failed(error) from error

    def _reached(self) -> Path:
        """Return a path to the folder that the libraries take as it is.

        It is its own, or a link to it for as long as it is open.
        """
        path = str(self.folder)
        if PLAIN.fullmatch(path) and len(path) <= LONGEST_PLAIN:
            return self.folder
        if self._link is None:
            self._link = self._linked()
        return self._link

    def _linked(self) -> Path:
        """Make a link to the folder.

        It is removed when this is closed, or at the latest when the process ends.
        """
        temporary = Path(tempfile.gettempdir()).absolute()
        fault = ""
        if not PLAIN.fullmatch(str(temporary)):
            fault = f"{temporary}, where a link to it would be, has none either"
        place = temporary
        try:
            if not fault:
                place = Path(tempfile.mkdtemp(prefix="lepton-", dir=temporary))
                (place / "checkpoints").symlink_to(
                    self.folder, target_is_directory=True
                )
        except OSError as error:
            fault = f"a link to it can't be made: {error}"
        if fault:
            raise CheckpointError(
                f"the folder's path is no plain one, and {fault}",
                where=self.folder,
                remedy=(
                    "name a folder whose path has letters, digits, '-', '_' and '.'"
                    " alone, or set TMPDIR to such a folder, where this user may write"
                ),
            )
        self._unlink = weakref.finalize(
            self,
            shutil.rmtree,
            place,
            ignore_errors=True,
        )
        return place / "checkpoints"

    def _shown(self, reason: str) -> str:
        """Return a reason that names the folder as the person did, not by the link."""
        if self._link is None:
            return reason
        return reason.replace(str(self._link), str(self.folder))

    def _damaged(
        self,
        step: int,
        error: Exception,
    ) -> Damaged:
        return Damaged(step, self._shown(_reason(error)))

    def _failed(self, error: Exception) -> Exception:
        if of_another_host(error) or isinstance(error, CheckpointError):
            return error
        step = self._saving
        self._saving = None
        committed = self._committed()
        last = (
            f"step {committed[-1]} is the last committed one"
            if committed
            else "no step is committed yet"
        )
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        fault = self._shown(_reason(error))
        return CheckpointError(
            f"{which} can't be written ({last}): {fault}",
            where=self.folder,
            remedy=f"{writing_remedy(error)}; then {self._again}",
        )


class NoCheckpoints(Checkpoints):
    """The checkpoints of a run that does not save any."""

    def __init__(self) -> None:
        self.folder = Path("none")

    def begin(self) -> None:
        pass

    def lacks(self, step: int) -> bool:
        return False

    def steps(self) -> list[int]:
        return []

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass

    def set_aside(self, after: int) -> list[int]:
        return []


def _together(hosts: Iterable[int]) -> ocp.options.MultiprocessingOptions:
    """Return options by which these hosts save or read together."""
    hosts = set(hosts)
    return ocp.options.MultiprocessingOptions(
        primary_host=min(hosts),
        active_processes=hosts,
        barrier_sync_key_prefix=f"hosts{min(hosts)}to{max(hosts)}",
    )


def _verify(
    step: int,
    arrays: dict[str, Any],
    checksums: dict[str, int],
) -> None:
    """Check that arrays are the ones that were saved.

    Raises:
      Damaged: one is not.
    """
    sums = jax.device_get(_copy_and_checksum(arrays)[1])
    for name, value in sums.items():
        if checksums.get(name) != int(value):
            raise Damaged(step, f"the checksum of {_unquoted(name)} does not match")


def _filled(
    template: Any,
    wanted: dict[str, Any],
    restored: dict[str, Any],
) -> Any:
    """Return a template with the arrays that were restored; others stay shapes.

    Args:
      template: of shapes.
      wanted: its leaves that a checkpoint can hold, by quoted path.
      restored: arrays by path.
    """
    leaves = []
    for path, leaf in by_path(template).items():
        is_stored = _quoted(path) in wanted
        if is_stored and path not in restored:
            leaves.append(leaf)
            continue
        array = restored[path] if is_stored else _without_elements(leaf)
        leaves.append(as_wanted(array, leaf))
    return with_leaves(template, leaves)


def _quieten() -> None:
    """Keep off stderr what Orbax writes there in addition to the error that it raises.

    It logs each failed save with its traceback. And when one array can't be read or
    written it closes its event loop over the others, whose complaints reach asyncio's
    logger and the hook for exceptions that nobody can catch.
    """
    for name, noise in (("absl", _logged_by_orbax), ("asyncio", _left_by_orbax)):
        if noise not in logging.getLogger(name).filters:
            logging.getLogger(name).addFilter(noise)
    before = sys.unraisablehook
    if getattr(before, "__module__", None) == __name__:
        return

    def hook(unraisable: Any) -> None:
        frames = traceback.extract_tb(unraisable.exc_traceback)
        is_orbax = any("/orbax/" in frame.filename for frame in frames)
        # asyncio raises a RuntimeError like others: only the text tells.
        if str(unraisable.exc_value) != "Event loop is closed" and not is_orbax:
            before(unraisable)

    sys.unraisablehook = hook


def _logged_by_orbax(record: logging.LogRecord) -> bool:
    """Whether a line may pass: it is not Orbax's."""
    return "/orbax/" not in record.pathname


def _left_by_orbax(record: logging.LogRecord) -> bool:
    """Whether a line may pass: it is no complaint about what Orbax left undone."""
    text = record.getMessage()
    if "never retrieved" not in text:
        return True
    words = ("/orbax/", "zarr", "OCDBT", "TensorStore")
    return not any(word in text for word in words)


class Damaged(CheckpointError):
    """A committed step that can't be read; `reason` says why."""

    def __init__(self, step: int, reason: object):
        self.reason = _reason(reason)
        super().__init__(
            f"the checkpoint of step {step} is damaged: {self.reason}",
            where=f"step {step}",
            remedy="use an earlier step",
        )


def _wait_for_the_others(
    *,
    key: str,
    timeout_ms: int,
) -> None:
    """Let Orbax's threads of all hosts meet while a save goes on.

    On a host where it has failed they come with that error on its way; the others must
    not wait then for what will not be.
    """
    error = sys.exc_info()[1]
    if error is None:
        agreement.barrier(key, timeout_ms / 1000, GIVEN_UP)
    elif not agreement.wished(GIVEN_UP):
        agreement.wish(GIVEN_UP, _reason(error))


def _alike(
    step: int,
    read: Callable[[], T],
) -> T:
    """Return what this host reads, if all hosts can read theirs.

    Raises:
      Damaged: some can't; the reason is that of the first of them.
    """
    fault: Damaged | None = None
    try:
        content = read()
    except Damaged as error:
        fault = error
    reasons = agreement.every(lambda: fault and fault.reason)
    if fault is not None:
        raise fault
    for host, reason in enumerate(reasons):
        if reason is not None:
            raise Damaged(step, f"host {host}: {reason}")
    return content


def _reason(error: object) -> str:
    """Return the first line of a library's message, shortened in the middle."""
    if isinstance(error, LeptonError):
        return error.what
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    if len(line) <= LONGEST_REASON:
        return line
    return f"{line[:REASON_BEGINNING]} ... {line[-REASON_END:]}"


def _quoted(path: str) -> str:
    """Return a path as one name, which Orbax takes.

    >>> _quoted("params/a.b/kernel")
    'params%2Fa%2Eb%2Fkernel'
    """
    for character, code in QUOTES.items():
        path = path.replace(character, code)
    return path


def _unquoted(path: str) -> str:
    for character, code in reversed(QUOTES.items()):
        path = path.replace(code, character)
    return path


def _shape(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _storable(state: Any) -> dict[str, Any]:
    """Return the leaves by quoted path, random keys as their key data.

    Arrays without elements, which Orbax refuses, are left out: there is nothing in them
    to keep.
    """
    arrays = {}
    for path, leaf in by_path(state).items():
        array = as_stored(leaf)
        if math.prod(array.shape):
            arrays[_quoted(path)] = array
    return arrays


def _without_elements(leaf: Any) -> jax.Array:
    """Return an array without elements, laid out as a leaf of a template.

    For random keys it is their key data.
    """
    if is_key(leaf):
        return jnp.zeros(stored_shape(leaf), jnp.uint32)
    return jax.make_array_from_callback(
        leaf.shape,
        leaf.sharding,
        lambda index: np.zeros(leaf.shape, leaf.dtype)[index],
    )


@jit_where
def _copy_and_checksum(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return copies of arrays, and the checksum of each.

    The copies share no buffer with the donated state: an asynchronous save reads them
    later.
    """
    copies = jax.tree.map(lambda array: array.copy(), arrays)
    return copies, jax.tree.map(_checksum, arrays)


def _checksum(array: Any) -> Any:
    """Return the sum of an array's words times odd weights, modulo 2**32.

    A changed word changes the sum unless another makes up for it; integer sums do not
    depend on the layout. With words 7, 0, 2 it is 1 * 7 + 3 * 0 + 5 * 2 = 17.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)

    is_integer = jnp.issubdtype(array.dtype, jnp.integer)
    limits = jnp.iinfo if is_integer else jnp.finfo
    bits = limits(array.dtype).bits  # 4 for int4, whose itemsize is a whole byte
    unsigned = jnp.dtype(f"uint{bits}")
    words = jax.lax.bitcast_convert_type(array, unsigned)
    words = words.astype(jnp.uint32).reshape(-1)
    weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    return (words * weights).sum(dtype=jnp.uint32)
