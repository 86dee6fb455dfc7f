"""`python tools/launch.py RECIPE.py ...`, which is `python -m lepton_jax launch
RECIPE.py ...`.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from lepton_jax.cli import settings
from lepton_jax.compat import coordination, keep_executables
from lepton_jax.errors import (
    CheckpointError,
    LeptonError,
    RecipeError,
    SettingError,
    nearest,
    of_another_host,
)
from lepton_jax.launch import (
    cluster,
    hosts,
    process,
    rules,
    serve,
    submit,
    supervisor,
    surroundings,
    tokens,
    watchdog,
)
from lepton_jax.launch.verdict import LOST_PEER
from lepton_jax.monitor import Progress, TensorBoard
from lepton_jax.recipe import Recipe
from lepton_jax.trainer import Trainer

# virtual ones of a CPU take memory and threads; a typing error shall not take all
MOST_DEVICES = 1024
DESCRIPTION = (
    "Train a recipe: plan it for the devices that are there, run it, keep what it"
    " leaves in a run folder."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error of the user's, 1
    where the hosts of a run could not go on, 130 after Ctrl-C; that of another process
    which it started and which failed.
    """
    with watchdog.leaving():
        return watchdog.leave(_main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    try:
        summary = launch(arguments)
    except (LeptonError, MemoryError, JaxRuntimeError) as problem:
        if of_another_host(problem):
            print(
                "another host can no longer be reached:"
                f" {str(problem).strip().partition(chr(10))[0][:300]}",
                file=sys.stderr,
            )
            return LOST_PEER
        error = (
            problem if isinstance(problem, LeptonError) else _short_of_memory(problem)
        )
        if watchdog.tell(error):
            return 2
        print(f"error: {error}", file=sys.stderr)
        if "--json" in arguments:
            print(
                json.dumps(
                    {
                        "status": "failed",
                        "error": error.what,
                        "where": error.where,
                        "remedy": error.remedy,
                    }
                )
            )
        return error.exit_code if isinstance(error, rules.HostsError) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130 if watchdog.begin() is None else watchdog.EARLY
    if summary and "exit_code" in summary:
        return summary["exit_code"]
    return 130 if summary and summary["status"] == "interrupted" else 0


def _short_of_memory(problem: Exception) -> LeptonError:
    """Of this machine or of a device; a fault of XLA's other than that is raised
    again.
    """
    text = str(problem)
    if (
        isinstance(problem, JaxRuntimeError)
        and "out of memory" not in text.lower()
        and "RESOURCE_EXHAUSTED" not in text
    ):
        raise problem
    return LeptonError(
        f"the memory does not suffice: {text.strip().partition(chr(10))[0]}",
        where=f"host {platform.node()}",
        remedy=(
            "lower batch_size, raise micro_batches, or make the model or the data"
            " smaller"
        ),
    )


def launch(arguments: list[str]) -> dict[str, Any] | None:
    """Parse, train, and say where it ended; None if only help was asked for.

    Raises:
      LeptonError: whatever the user can mend.
    """
    told = watchdog.begin()
    parser = _parser()
    head, rest = _head(parser, arguments, told)
    wants_help = bool({"-h", "--help"} & set(rest))
    if wants_help and head.recipe is None:
        parser.print_help()
        return None
    run = _resumed(head.resume)
    file = head.recipe or run.get("file")
    if file is None:
        raise SettingError(
            (
                "no recipe is named"
                if head.resume is None
                else "the run was not started from a recipe file"
            ),
            where="command line",
            remedy="name a recipe file, e.g. recipes/digits_cnn.py",
        )
    if head.recipe is None and not Path(file).is_file():
        raise RecipeError(
            f"the recipe of the run is gone: there is no file {file}",
            where=Path(head.resume) / "recipe.json",
            remedy=f"say where it is now: launch.py RECIPE.py --resume {head.resume}",
        )
    place = None if head.status is None else serve.address(head.status)
    around = None if wants_help or head.on is not None else _around(head, told)
    watched = (
        around is not None
        and told is None
        and supervisor.wanted(around, rules.read(head))
    )
    if watched:
        # the chips are the worker's, should the recipe compute when it is imported
        jax.config.update("jax_platforms", "cpu")
    function = settings.load(Path(file))
    parser.description = settings.story(function) or DESCRIPTION
    settings.add(parser, function)
    if wants_help:
        parser.print_help()
        return None
    names = list(inspect.signature(function).parameters)
    options, given = settings.parse(parser, arguments, names)
    kept = {k: v for k, v in run.get("settings", {}).items() if k not in given}
    chosen = _typed(parser, kept, Path(head.resume or "") / "recipe.json") | given
    options.resume = head.resume
    options.run_dir = head.run_dir
    options.go_on = head.go_on
    folder = _folder(options, Path(file).stem)
    if submit.wanted(options) or around is None:
        return _said(
            options,
            submit.start(
                options,
                given,
                Path(file),
                _fresh(options, folder),
                arguments,
            ),
        )
    if told is None and around.host_id == 0:
        _fresh(options, folder)
    place = place if told is None and around.host_id == 0 else None  # one server a run
    if watched:
        with serve.serving(place, folder):
            return _said(
                options,
                _watch(
                    options,
                    around,
                    Path(file),
                    given,
                    folder,
                    arguments,
                ),
            )
    if options.go_on:
        hosts.heed_sigterm(once=told is not None)
    cluster.join(options.devices)
    by_a_person = any(word.partition("=")[0] == "--resume" for word in arguments)
    again = told is not None and told.generation > 1
    asked = set(given) if by_a_person and not again else set()

    def work() -> dict[str, Any]:
        recipe = settings.call(function, chosen)
        return _train(
            options,
            recipe,
            Path(file),
            chosen,
            folder,
            asked,
        )

    with serve.serving(
        place,
        folder,
        serve.Here(),
    ):
        summary = hosts.run(
            around,
            work,
            told=told is not None,
        )
    return _said(options, summary) if around.host_id == 0 else summary


def _around(options: argparse.Namespace, told: watchdog.Told | None) -> cluster.Cluster:
    """The cluster of this process; how many take part, and where they meet, a worker
    learns from its supervisor.
    """
    around = cluster.find(
        os.environ,
        coordinator=options.coordinator,
        hosts=options.hosts,
        host_id=options.host_id,
        devices=options.devices,
        metadata=surroundings.metadata_server(os.environ),
    )
    return (
        around
        if told is None
        else replace(
            around,
            hosts=told.hosts,
            host_id=told.host_id,
            coordinator=told.coordinator,
        )
    )


def _watch(
    options: argparse.Namespace,
    around: cluster.Cluster,
    file: Path,
    given: dict[str, Any],
    folder: Path,
    arguments: list[str],
) -> dict[str, Any]:
    """Start this host's share of the run as another process, and watch over it."""
    if around.host_id == 0 and around.hosts > 1:
        print(around, file=sys.stderr, flush=True)
    facts = {
        **hosts.facts(),
        "recipe": hashlib.sha256(file.read_bytes()).hexdigest()[:12],
        "settings": json.dumps(
            {name: str(value) for name, value in sorted(given.items())}
        ),
    }
    several_here = around.source == "local"  # they can't share chips
    return supervisor.run(
        around,
        rules.read(options),
        [*process.python(), *arguments],
        facts=facts,
        limit=hosts.time_to_meet(around),
        run=" ".join(
            filter(
                None,
                [options.run_dir or options.resume, os.environ.get("SLURM_JOB_ID")],
            )
        ),
        folder=folder,
        environment=(
            {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cpu"}
            if several_here
            else None
        ),
        token=_token(options, around),
    )


def _token(options: argparse.Namespace, around: cluster.Cluster) -> tokens.Token:
    """Where this host has the run's token from; a folder that nobody named is not the
    same on all hosts.
    """
    named = options.run_dir or options.resume
    file = options.token_file
    return tokens.of_run(
        around,
        Path(named) if named else None,
        Path(file) if file else None,
    )


def _train(
    options: argparse.Namespace,
    recipe: Recipe,
    file: Path,
    chosen: dict[str, Any],
    folder: Path,
    asked: set[str],
) -> dict[str, Any]:
    if recipe.name == "run":
        recipe = recipe.with_(name=file.stem)
    plain = {
        k: str(v.resolve()) if isinstance(v, Path) else v for k, v in chosen.items()
    }
    sinks: list[Any] = [Progress()]
    if options.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard"))
    # so that a restart need not compile again
    keep_executables(folder.resolve() / "cache")
    trainer = Trainer(
        recipe,
        run_dir=folder,
        devices=None if coordination() else options.devices,
        sinks=sinks,
        source={"file": str(file.resolve()), "settings": plain},
        plan=options.plan,
        trace_samples=options.trace_samples,
        local_dir=options.local_dir,
        local_every=options.local_every,
    )
    watchdog.measure(_device_memory)
    if options.resume is not None:
        trainer.resume(asked=asked)
    history = trainer.fit()
    return {
        "run_dir": str(folder),
        "status": history.status,
        "steps": trainer.step,
        "seconds": history.seconds,
        "samples_per_second": (
            history.samples / history.seconds if history.steps else 0.0
        ),
        "compilations": history.compilations,
        "metrics": history.metrics,
    }


def _device_memory() -> int | None:
    """Bytes in use on that of this host's devices that has the most; None where the
    platform does not tell.
    """
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    return max(
        (stats.get("bytes_in_use", 0) for stats in told),
        default=None,
    )


def _said(options: argparse.Namespace, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary, printed if it was asked for; of hosts that were started here, host 0
    has done so if all went well.
    """
    if options.json and (
        summary.keys() != {"status", "exit_code"} or summary["status"] == "failed"
    ):
        try:
            print(json.dumps(summary), flush=True)
        except OSError as error:
            done = (
                f"the run itself is whole, in {summary['run_dir']}; read its"
                " events.jsonl"
                if "run_dir" in summary
                else "it is done nevertheless"
            )
            raise LeptonError(
                f"the summary can't be printed: {error.strerror or error}",
                where="standard output",
                remedy=done,
            ) from error
    return summary


def _parser() -> settings.Parser:
    parser = settings.Parser(
        prog="launch.py",
        description=DESCRIPTION,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="launch.py RECIPE.py [--setting value ...] [options]",
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
    group.add_argument(
        "--devices",
        type=settings.reader(int),
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
        type=settings.reader(float),
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
    cluster.options(parser.add_argument_group("where the hosts are"))
    rules.options(parser.add_argument_group("when something fails"))
    submit.options(parser.add_argument_group("starting it somewhere else"))
    return parser


def _head(
    parser: settings.Parser,
    arguments: list[str],
    told: watchdog.Told | None,
) -> tuple[argparse.Namespace, list[str]]:
    """The options known before the recipe is; the recipe is the argument that no option
    takes as its value.
    """
    if arguments and not arguments[0].startswith("-"):
        head, _ = parser.parse_known_args(arguments)
        head.recipe = arguments[0]
    else:
        head, unknown = parser.parse_known_args(arguments)
        if unknown and head.resume is None:
            head.recipe = next((a for a in arguments if a.endswith(".py")), None)
        elif head.recipe is not None and not head.recipe.endswith(".py"):
            head.recipe = None
    if head.devices is not None and not 1 <= head.devices <= MOST_DEVICES:
        raise SettingError(
            f"--devices is {head.devices}",
            where="command line, --devices",
            remedy=f"ask for 1 to {MOST_DEVICES} devices",
        )
    if told is not None and told.run_dir is not None:
        head.run_dir = told.run_dir
        head.go_on = True
    if head.run_dir == "":
        raise SettingError(
            "--run-dir is empty",
            where="command line, --run-dir",
            remedy="name a folder, or leave it out",
        )
    if head.go_on and head.run_dir is None:
        raise SettingError(
            "--go-on is given without --run-dir",
            where="command line, --go-on",
            remedy="name the folder of the run by --run-dir",
        )
    if (
        head.go_on
        and head.resume is None
        and os.path.exists(Path(head.run_dir) / "recipe.json")
    ):
        head.resume = head.run_dir
    return head, arguments


def _resumed(folder: str | None) -> dict[str, Any]:
    """recipe.json of the run to resume."""
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
    kept: dict[str, Any],
    path: Path,
) -> dict[str, Any]:
    """Settings as kept in a run's recipe.json, in the types of their options.

    Raises:
      SettingError: the recipe no longer has a setting, or the setting is of another
        type now.
    """
    actions = {
        a.dest.removeprefix("setting:"): a
        for a in parser._actions
        if a.dest.startswith("setting:")
    }
    typed = {}
    for name, value in kept.items():
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
    if options.resume is not None:
        if (
            options.run_dir is not None
            and Path(options.run_dir).resolve() != Path(options.resume).resolve()
        ):
            raise SettingError(
                "--run-dir and --resume name different folders",
                where="command line",
                remedy="a resumed run goes on in its own folder: leave out --run-dir",
            )
        return Path(options.resume)
    return Path(
        options.run_dir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    )


def _fresh(options: argparse.Namespace, folder: Path) -> Path:
    """The folder, if the run may be there."""
    if options.resume is not None:
        return folder
    # unlike Path.exists this takes a path that is too long
    if os.path.exists(folder) and not folder.is_dir():
        raise SettingError(
            "the run folder is a file", where=folder, remedy="name another folder"
        )
    if not options.go_on and any(
        os.path.exists(folder / name)
        for name in ("recipe.json", "checkpoints", "events.jsonl")
    ):
        raise SettingError(
            "the folder already holds a run",
            where=folder,
            remedy=f"go on with it by --resume {folder}, or name another folder",
        )
    return folder
