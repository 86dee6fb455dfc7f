"""`lepton launch RECIPE.py ...`: train a recipe, here or on many hosts.

`python tools/launch.py` and `python -m lepton_jax launch` are the same. One process
goes one of three ways:

    --on WHERE                   write or submit a job, see `launch.submit`
    several hosts, or --restarts watch over a worker process, see `launch.supervise`
    else, and in each worker     join the other hosts and train, see `launch.joining`
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from lepton_jax.cli import folds, settings
from lepton_jax.compat import coordination, keep_executables
from lepton_jax.cross_validation import cross_validate
from lepton_jax.errors import (
    CheckpointError,
    LeptonError,
    RecipeError,
    SettingError,
    first_line,
    nearest,
    of_another_host,
)
from lepton_jax.hosts import agreement
from lepton_jax.launch import (
    children,
    discovery,
    joining,
    serve,
    submit,
    surroundings,
    tokens,
)
from lepton_jax.launch.cluster import Cluster
from lepton_jax.launch.options import reader
from lepton_jax.launch.supervise import rules, supervisor, watchdog
from lepton_jax.launch.supervise.verdict import LOST_PEER
from lepton_jax.monitor import Progress, TensorBoard
from lepton_jax.recipe import Recipe
from lepton_jax.train.baseline import SECONDS
from lepton_jax.train.history import History
from lepton_jax.trainer import Trainer

# exit codes
MISTAKE = 2
INTERRUPTED = 130
# assumption: virtual devices of a CPU take memory and threads, and a typing error must
# not take all of them
MOST_DEVICES = 1024
LONGEST_REASON = 300  # characters of an error of another host's
# characters of a digest by which hosts compare the recipe's file
DIGEST = 12
DESCRIPTION = (
    "Train a recipe: plan it for the devices that are there, run it, keep what it"
    " leaves in a run folder."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
      0; 2 for an error of the user's; 1 where the hosts of a run could not go on; 130
      after Ctrl-C; else the exit code of a process that was started and failed.
    """
    with watchdog.leaving():
        return watchdog.leave(_main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    try:
        summary = launch(arguments)
    except (LeptonError, MemoryError, JaxRuntimeError) as problem:
        if of_another_host(problem):
            reason = first_line(problem)[:LONGEST_REASON]
            print(f"another host can no longer be reached: {reason}", file=sys.stderr)
            return LOST_PEER
        if isinstance(problem, LeptonError):
            return _report_error(problem, arguments)
        return _report_error(_short_of_memory(problem), arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED if watchdog.begin() is None else watchdog.EARLY

    if summary and "exit_code" in summary:
        return summary["exit_code"]
    interrupted = summary is not None and summary["status"] == "interrupted"
    return INTERRUPTED if interrupted else 0


def _report_error(error: LeptonError, arguments: list[str]) -> int:
    """Print an error, or hand it to the supervisor; return the exit code."""
    if watchdog.tell(error):
        return MISTAKE
    print(f"error: {error}", file=sys.stderr)
    if "--json" in arguments:
        settings.print_failure(error, status="failed")
    return error.exit_code if isinstance(error, rules.HostsError) else MISTAKE


def _short_of_memory(problem: Exception) -> LeptonError:
    """Return the error of a machine or a device whose memory does not suffice.

    Raises:
      JaxRuntimeError: it is another fault of XLA's.
    """
    # XLA raises one class for all its faults, so that only the text tells them apart
    text = str(problem)
    out_of_memory = "out of memory" in text.lower() or "RESOURCE_EXHAUSTED" in text
    if isinstance(problem, JaxRuntimeError) and not out_of_memory:
        raise problem
    return LeptonError(
        f"the memory does not suffice: {first_line(problem)}",
        where=f"host {platform.node()}",
        remedy=(
            "lower batch_size, raise micro_batches, or make the model or the data"
            " smaller"
        ),
    )


@dataclass(frozen=True)
class _Order:
    """A command line that has been read.

    Args:
      arguments: as they were typed.
      options: of the launcher.
      assignment: of this process by its supervisor; None without one.
      function: the recipe's.
      file: of the recipe.
      given: settings that were typed.
      chosen: settings of the run: those of `given`, and of the run that goes on.
      folder: of the run.
    """

    arguments: list[str]
    options: argparse.Namespace
    assignment: watchdog.Assignment | None
    function: Callable[..., Recipe]
    file: Path
    given: dict[str, Any]
    chosen: dict[str, Any]
    folder: Path


def launch(arguments: list[str]) -> dict[str, Any] | None:
    """Do what a command line says.

    Returns:
      A summary of the run; None if only help was asked for.

    Raises:
      LeptonError: a mistake that the user can fix.
    """
    assignment = watchdog.begin()
    parser = _parser()
    # The recipe's settings are options only once the recipe has been loaded, and before
    # that the platform must be known: so the command line is read twice.
    early = _early_options(parser, arguments, assignment)
    wants_help = "-h" in arguments or "--help" in arguments
    if wants_help and early.recipe is None:
        parser.print_help()
        return None

    run = _resumed(early.resume)
    file = _recipe_file(early, run)
    place = None if early.status is None else serve.address(early.status)
    cluster = (
        None if wants_help or early.on is not None else _cluster(early, assignment)
    )
    watched = (
        cluster is not None
        and assignment is None
        and supervisor.wanted(cluster, rules.read(early))
    )
    if watched:
        # the chips are the worker's, should the recipe compute when it is imported
        jax.config.update("jax_platforms", "cpu")

    function = settings.load(file)
    parser.description = settings.story(function) or DESCRIPTION
    settings.add(parser, function)
    if wants_help:
        parser.print_help()
        return None

    options, given, chosen = _settings(
        parser,
        arguments,
        function,
        early,
        run,
    )
    folder = _folder(options, file.stem)
    order = _Order(
        arguments, options, assignment, function, file, given, chosen, folder
    )
    if submit.wanted(options):
        _check_folder(order)
        summary = submit.start(options, given, file, folder, arguments)
        return _print_summary(options, summary)
    assert cluster is not None
    return _run(order, cluster, place, watched)


def _run(
    order: _Order,
    cluster: Cluster,
    place: tuple[str, int] | None,
    watched: bool,
) -> dict[str, Any]:
    """Do this process's share of the run: watch over a worker, or train.

    Args:
      order: the command line.
      cluster: as this process found it.
      place: name and port to serve the status at; None: nowhere.
      watched: whether this process starts a worker and watches over it.
    """
    if order.assignment is None and cluster.host_id == 0:
        _check_folder(order)
    else:
        place = None  # one server for a run
    if not watched:
        return _work(order, cluster, place)
    with serve.serving(place, order.folder):
        return _print_summary(order.options, _watch(order, cluster))


def _settings(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    function: Callable[..., Recipe],
    early: argparse.Namespace,
    run: dict[str, Any],
) -> tuple[argparse.Namespace, dict[str, Any], dict[str, Any]]:
    """Return the options, the settings that were typed, and those of the run."""
    names = list(inspect.signature(function).parameters)
    folds.check_known(arguments, function)
    options, given = settings.parse(parser, arguments, names)
    options.resume = early.resume
    options.run_dir = early.run_dir
    options.go_on = early.go_on

    stored = {
        name: value
        for name, value in run.get("settings", {}).items()
        if name not in given
    }
    path = Path(early.resume or "") / "recipe.json"
    return options, given, _typed(parser, stored, path) | given


def _cluster(
    options: argparse.Namespace, assignment: watchdog.Assignment | None
) -> Cluster:
    """Return the cluster of this process.

    A worker learns from its supervisor how many hosts take part, and where they meet.
    """
    cluster = discovery.find(
        os.environ,
        coordinator=options.coordinator,
        hosts=options.hosts,
        host_id=options.host_id,
        devices=options.devices,
        metadata=surroundings.metadata_server(os.environ),
    )
    if assignment is None:
        return cluster
    return replace(
        cluster,
        hosts=assignment.hosts,
        host_id=assignment.host_id,
        coordinator=assignment.coordinator,
        missing=cluster.hosts - assignment.hosts,
    )


# ---- watching over a worker ----


def _watch(order: _Order, cluster: Cluster) -> dict[str, Any]:
    """Start this host's share of the run as another process, and watch over it."""
    if cluster.host_id == 0 and cluster.hosts > 1:
        print(cluster, file=sys.stderr, flush=True)
    options = order.options
    digest = hashlib.sha256(order.file.read_bytes()).hexdigest()
    given = sorted(order.given.items())
    texts = {name: str(value) for name, value in given}
    facts = {
        **joining.facts(),
        "recipe": digest[:DIGEST],
        "settings": json.dumps(texts),
    }
    name = [options.run_dir or options.resume, os.environ.get("SLURM_JOB_ID")]
    environment = None
    if cluster.source == "local":
        # hosts on one machine can't share its chips
        environment = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cpu"}
    watched = supervisor.WatchedRun(
        cluster,
        rules.read(options),
        [*children.python(), *order.arguments],
        facts=facts,
        limit=joining.time_to_meet(cluster),
        name=" ".join(part for part in name if part),
        folder=order.folder,
        environment=environment,
    )
    return supervisor.run(watched, _token(options, cluster))


def _token(options: argparse.Namespace, cluster: Cluster) -> tokens.Token:
    """Return the source of the run's token.

    A folder that nobody named is not the same on all hosts.
    """
    named = options.run_dir or options.resume
    file = options.token_file
    return tokens.of_run(
        cluster,
        Path(named) if named else None,
        Path(file) if file else None,
    )


# ---- training ----


def _work(
    order: _Order,
    cluster: Cluster,
    place: tuple[str, int] | None,
) -> dict[str, Any]:
    """Join the other hosts, and train."""
    assignment = order.assignment
    if order.options.go_on:
        joining.heed_sigterm(once=assignment is not None)
    joining.ask_for_devices(order.options.devices)

    def work() -> dict[str, Any]:
        if folds.wanted(order.function, order.chosen):
            return _train_folds(order, cluster)
        recipe = settings.call(order.function, order.chosen)
        return _train(order, recipe, cluster)

    with serve.serving(
        place,
        order.folder,
        serve.Here(),
    ):
        summary = joining.run(cluster, work, supervised=assignment is not None)
    if cluster.host_id == 0:
        _print_summary(order.options, summary)
    return summary


def _train(order: _Order, recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    options = order.options
    folder = order.folder
    # so that a restart need not compile again
    keep_executables(folder.resolve() / "cache")
    trainer = Trainer(
        _named(order, recipe),
        run_dir=folder,
        sinks=_sinks(order, folder),
        source=_source(order, order.chosen),
        local_dir=options.local_dir,
        **_trainer_options(options, cluster),
    )
    watchdog.measure(_device_memory)
    if options.resume is not None:
        trainer.resume(asked=_asked(order))
    history = trainer.fit()
    if history.status == "finished":
        trainer.examine(options.baseline_seconds)
    return _summary(trainer, history, folder)


def _train_folds(order: _Order, cluster: Cluster) -> dict[str, Any]:
    """Train all folds, one after the other; a fold that is finished stays as it is."""
    options = order.options
    folder = order.folder
    count = folds.check(options, order.chosen)

    def chosen(fold: int) -> dict[str, Any]:
        return {**order.chosen, folds.FOLD: fold}

    def make(fold: int) -> Recipe:
        return _named(order, settings.call(order.function, chosen(fold)))

    keep_executables(folder.resolve() / "cache")
    watchdog.measure(_device_memory)
    if agreement.host() == 0:
        folds.describe(folder, _source(order, order.chosen))
    began = time.monotonic()
    done = cross_validate(
        make,
        count,
        run_dir=folder,
        baseline_seconds=options.baseline_seconds,
        sinks=lambda place: _sinks(order, place or folder),
        source=lambda fold: _source(order, chosen(fold)),
        trainer=_trainer_options(options, cluster),
    )
    if agreement.host() == 0:
        print(done, file=sys.stderr)
    return folds.summary(done, time.monotonic() - began)


def _named(order: _Order, recipe: Recipe) -> Recipe:
    """Return a recipe that has a name: that of its file, where it has none."""
    return recipe.with_(name=order.file.stem) if recipe.name == "run" else recipe


def _source(order: _Order, chosen: dict[str, Any]) -> dict[str, Any]:
    """Return where a run's recipe came from, in plain data."""
    plain = {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in chosen.items()
    }
    return {"file": str(order.file.resolve()), "settings": plain}


def _sinks(order: _Order, folder: Path) -> list[Any]:
    sinks: list[Any] = [Progress()]
    if order.options.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard"))
    return sinks


def _trainer_options(options: argparse.Namespace, cluster: Cluster) -> dict[str, Any]:
    """Return the options that go to a `Trainer` as they are."""
    return {
        "devices": None if coordination() else options.devices,
        "plan": options.plan,
        "resize_plan": cluster.missing > 0,
        "trace_samples": options.trace_samples,
        "local_every": options.local_every,
    }


def _summary(
    trainer: Trainer,
    history: History,
    folder: Path,
) -> dict[str, Any]:
    rate = history.samples / history.seconds if history.steps else 0.0
    return {
        "run_dir": str(folder),
        "status": history.status,
        "steps": trainer.step,
        "seconds": history.seconds,
        "samples_per_second": rate,
        "compilations": history.compilations,
        "metrics": history.metrics,
    }


def _asked(order: _Order) -> set[str]:
    """Return the settings that a person changes by this resume.

    A job that goes on by itself, and a worker that is begun again, change none.
    """
    options = [word.partition("=")[0] for word in order.arguments]
    again = order.assignment is not None and order.assignment.generation > 1
    if again or "--resume" not in options:
        return set()
    return set(order.given)


def _device_memory() -> int | None:
    """Return the bytes in use on that of this host's devices that has the most.

    None where the platform does not tell.
    """
    sizes = [
        stats.get("bytes_in_use", 0)
        for device in jax.local_devices()
        if (stats := device.memory_stats())
    ]
    return max(sizes, default=None)


def _print_summary(
    options: argparse.Namespace, summary: dict[str, Any]
) -> dict[str, Any]:
    """Print the summary if it was asked for; return it.

    Where hosts were started here and all went well, host 0 has printed it already.
    """
    of_workers = summary.keys() == {"status", "exit_code"}
    if not options.json or (of_workers and summary["status"] != "failed"):
        return summary
    try:
        print(json.dumps(summary), flush=True)
    except OSError as error:
        remedy = "it is done nevertheless"
        if "run_dir" in summary:
            remedy = (
                f"the run itself is whole, in {summary['run_dir']}; read its"
                " events.jsonl"
            )
        raise LeptonError(
            f"the summary can't be printed: {error.strerror or error}",
            where="standard output",
            remedy=remedy,
        ) from error
    return summary


# ---- the command line ----


def _parser() -> settings.Parser:
    program = settings.program("launch")
    parser = settings.Parser(
        prog=program,
        description=DESCRIPTION,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{program} RECIPE.py [--setting value ...] [options]",
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        help=(
            "a Python file with a function `recipe`; its settings become options, "
            "listed by RECIPE.py --help"
        ),
    )
    group = parser.add_argument_group("options")
    group.add_argument(
        "-h",
        "--help",
        action="store_true",
        help="show this, and the recipe's settings if one is named",
    )
    group.add_argument(
        "--run-dir",
        metavar="DIR",
        help="folder for what the run leaves (default: runs/NAME-TIME)",
    )
    group.add_argument(
        "--resume",
        metavar="RUN",
        help=(
            "go on with a run from its latest readable checkpoint; recipe and "
            "settings are the run's, unless given"
        ),
    )
    _add_outputs(group)
    _add_local(group)
    discovery.add_options(parser.add_argument_group("where the hosts are"))
    rules.add_options(parser.add_argument_group("when something fails"))
    submit.add_options(parser.add_argument_group("starting it somewhere else"))
    return parser


def _add_outputs(group: Any) -> None:
    """Add the options about devices, plan and output to an argparse group."""
    group.add_argument(
        "--devices",
        type=reader(int),
        metavar="N",
        help="use N devices; on a CPU, N virtual ones (default: all)",
    )
    group.add_argument(
        "--plan",
        metavar="FILE",
        help="follow a plan that tools/plan.py --save wrote, without a search",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print, last, one JSON object that sums up the run",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write TensorBoard scalars into the run folder",
    )
    group.add_argument(
        "--baseline-seconds",
        type=reader(float),
        metavar="SECONDS",
        default=SECONDS,
        help=(
            "time that each of the recipe's baselines may take after the training "
            f"(default: {SECONDS:g}; 0: none)"
        ),
    )
    group.add_argument(
        "--trace-samples",
        action="store_true",
        help=(
            "write down which samples each step was made of, in "
            "the run folder's samples.jsonl"
        ),
    )
    group.add_argument(
        "--status",
        metavar="[HOST:]PORT",
        help=(
            "serve from host 0 how the run stands: / for a person, /status for a"
            " program, /metrics for Prometheus, /control for requests; without HOST to"
            " that machine alone, elsewhere only to who sends the token in"
            " control/run.json (default: not)"
        ),
    )


def _add_local(group: Any) -> None:
    """Add the options about checkpoints and restarts to an argparse group."""
    group.add_argument(
        "--local-dir",
        metavar="DIR",
        help=(
            "also keep fast checkpoints in a folder on each host's own disk or "
            "memory; a run goes on from the newest that all hosts can read"
        ),
    )
    group.add_argument(
        "--local-every",
        type=reader(float),
        metavar="SECONDS",
        default=60.0,
        help="seconds between them (default: 60)",
    )
    group.add_argument(
        "--go-on",
        action="store_true",
        help=(
            "go on with the run in --run-dir if there is one, else begin it there, and"
            " take SIGTERM for Ctrl-C: for a job that a scheduler ends and starts again"
        ),
    )


def _early_options(
    parser: settings.Parser,
    arguments: list[str],
    assignment: watchdog.Assignment | None,
) -> argparse.Namespace:
    """Return the options that are known before the recipe's settings are.

    The recipe is the argument that no option takes as its value.
    """
    early, unknown = parser.parse_known_args(arguments)
    if arguments and not arguments[0].startswith("-"):
        early.recipe = arguments[0]
    elif unknown and early.resume is None:
        early.recipe = next((word for word in arguments if word.endswith(".py")), None)
    elif early.recipe is not None and not early.recipe.endswith(".py"):
        early.recipe = None

    if early.devices is not None and not 1 <= early.devices <= MOST_DEVICES:
        raise SettingError(
            f"--devices is {early.devices}",
            where="command line, --devices",
            remedy=f"ask for 1 to {MOST_DEVICES} devices",
        )
    if not early.baseline_seconds >= 0:  # also where it is no number
        raise SettingError(
            f"--baseline-seconds is {early.baseline_seconds}",
            where="command line, --baseline-seconds",
            remedy="give a number of seconds of at least 0",
        )
    if assignment is not None and assignment.run_dir is not None:
        early.run_dir = assignment.run_dir
        early.go_on = True
    if early.run_dir == "":
        raise SettingError(
            "--run-dir is empty",
            where="command line, --run-dir",
            remedy="name a folder, or leave it out",
        )
    if early.go_on and early.run_dir is None:
        raise SettingError(
            "--go-on is given without --run-dir",
            where="command line, --go-on",
            remedy="name the folder of the run by --run-dir",
        )
    if early.go_on and early.resume is None and _holds_run(early.run_dir):
        early.resume = early.run_dir
    return early


def _holds_run(folder: str) -> bool:
    # unlike Path.exists this takes a path that is too long
    return os.path.exists(Path(folder) / "recipe.json")


def _recipe_file(early: argparse.Namespace, run: dict[str, Any]) -> Path:
    """Return the recipe's file, named on the command line or by the run to resume."""
    file = early.recipe or run.get("file")
    if file is None:
        what = "no recipe is named"
        if early.resume is not None:
            what = "the run was not started from a recipe file"
        raise SettingError(
            what,
            where="command line",
            remedy="name a recipe file, e.g. recipes/digits_cnn.py",
        )
    if early.recipe is None and not Path(file).is_file():
        raise RecipeError(
            f"the recipe of the run is gone: there is no file {file}",
            where=Path(early.resume) / "recipe.json",
            remedy=f"say where it is now: launch.py RECIPE.py --resume {early.resume}",
        )
    return Path(file)


# ---- the run folder ----


def _resumed(folder: str | None) -> dict[str, Any]:
    """Return recipe.json of the run to resume; empty without one."""
    if folder is None:
        return {}
    path = Path(folder) / "recipe.json"
    try:
        run = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            f"there is no run to resume: {error.strerror or error}",
            where=path,
            remedy="name the folder of a run: it holds recipe.json and checkpoints/",
        ) from error
    except ValueError as error:
        raise _damaged(path, error) from error
    if (
        not isinstance(run, dict)
        or not isinstance(run.get("file"), str | None)
        or not isinstance(run.get("settings", {}), dict)
    ):
        raise _damaged(path, "it has no settings and file of a recipe")
    return run


def _damaged(path: Path, fault: object) -> CheckpointError:
    return CheckpointError(
        f"the run's recipe.json is damaged: {fault}",
        where=path,
        remedy=(
            'restore it from a copy, or write {"file": "RECIPE.py", "settings": {}}'
            " into it"
        ),
    )


def _typed(
    parser: argparse.ArgumentParser,
    stored: dict[str, Any],
    path: Path,
) -> dict[str, Any]:
    """Return the settings of a run's recipe.json in the types of their options.

    Raises:
      SettingError: the recipe no longer has a setting, or the setting is of another
        type now.
    """
    actions = {
        action.dest.removeprefix("setting:"): action
        for action in parser._actions
        if action.dest.startswith("setting:")
    }
    typed = {}
    for name, value in stored.items():
        if name not in actions:
            raise SettingError(
                f"the run was started with {name}={value!r}, a setting that the recipe"
                f" does not have{nearest(name, actions)}",
                where=path,
                remedy="resume with the recipe as it was, or start a new run",
            )
        read: Any = actions[name].type or settings.yes_or_no
        try:
            typed[name] = None if value is None else read(str(value))
        except argparse.ArgumentTypeError as error:
            raise SettingError(
                f"the run was started with {name}={value!r}, but {error}",
                where=path,
                remedy=(
                    f"give --{name.replace('_', '-')} anew, or resume with the recipe"
                    " as it was"
                ),
            ) from error
    return typed


def _folder(options: argparse.Namespace, name: str) -> Path:
    """Return the folder of the run."""
    if options.resume is None:
        usual = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        return Path(options.run_dir or usual)

    resumed = Path(options.resume)
    named = resumed if options.run_dir is None else Path(options.run_dir)
    if named.resolve() != resumed.resolve():
        raise SettingError(
            "--run-dir and --resume name different folders",
            where="command line",
            remedy="a resumed run goes on in its own folder: leave out --run-dir",
        )
    return resumed


def _check_folder(order: _Order) -> None:
    """Raise SettingError if the run may not be in its folder."""
    folder = order.folder
    if order.options.resume is not None:
        return
    # unlike Path.exists this takes a path that is too long
    if os.path.exists(folder) and not folder.is_dir():
        raise SettingError(
            "the run folder is a file", where=folder, remedy="name another folder"
        )
    traces = ("recipe.json", "checkpoints", "events.jsonl")
    if order.options.go_on:
        return
    if any(os.path.exists(folder / name) for name in traces):
        raise SettingError(
            "the folder already holds a run",
            where=folder,
            remedy=f"go on with it by --resume {folder}, or name another folder",
        )
