"""`python tools/plan.py RECIPE.py --on v5p:4x4x4`: what a step would cost, before an
array exists, on any hardware.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import PartitionSpec

from lepton_jax.cli import settings
from lepton_jax.data import from_any, sample
from lepton_jax.errors import LeptonError, PlanError, SettingError
from lepton_jax.hardware import Chip, Topology, here, read_chips, topology
from lepton_jax.launch.joining import ask_for_devices
from lepton_jax.planner import Plan, Trace, plan, trace
from lepton_jax.planner.patience import LIMIT_SECONDS
from lepton_jax.planner.program.remat import POLICIES
from lepton_jax.planner.show.frontier import Frontier, frontier
from lepton_jax.planner.show.text import duration, units
from lepton_jax.recipe import Recipe
from lepton_jax.step.module import is_linen
from lepton_jax.trees import by_path

OBJECTIVES = ("time", "memory", "cost")
TOKENS = 1e9  # for which topologies are compared if nothing else is asked for
DESCRIPTION = (
    "Plan a recipe for any hardware: how it would lie there, why, and what memory, time"
    " and money a step would take."
)
MEGA = 2**20


@dataclass
class Result:
    """What came of one topology: a plan, or the error that says why there is none and
    what would fit; XLA's verdicts.
    """

    topology: Topology
    plan: Plan | None
    error: PlanError | None
    seconds: float
    checks: dict[str, list[Any]] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0; 2 for an error of the user's or
    where nothing fits; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if (
        hasattr(sys.stdout, "reconfigure")
        and (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    ):
        # a terminal without the bars' characters
        sys.stdout.reconfigure(errors="replace")
    try:
        code = look(arguments)
        sys.stdout.flush()
        return code
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # as with `| head`; what Python flushes at its end goes nowhere
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def look(arguments: list[str]) -> int:
    """Parse, trace, plan and show; the exit code.

    Raises:
      LeptonError: whatever the user can mend.
    """
    file = _recipe_file(arguments)
    wants_help = bool({"-h", "--help"} & set(arguments))
    function = None if file is None else settings.load(Path(file))
    own = [] if function is None else list(inspect.signature(function).parameters)
    parser = _parser("micro_batches" not in own)
    if function is not None:
        parser.description = settings.story(function) or DESCRIPTION
        settings.add(parser, function)
    if wants_help:
        parser.print_help()
        return 0
    if function is None:
        # an unknown option is the likelier mistake
        settings.parse(parser, arguments, own)
        raise SettingError(
            "no recipe is named",
            where="command line",
            remedy="name a recipe file, e.g. recipes/digits_cnn.py",
        )
    options, given = settings.parse(parser, arguments, own)
    replayed, targets = _targets(options)
    _check(options, targets)
    _platform(options, targets)
    clock = time.perf_counter()
    traced = _traced(settings.call(function, given))
    seconds = time.perf_counter() - clock
    results = [
        _planned(traced, target, options, replayed) for target in targets or [here()[0]]
    ]
    return _tell(arguments, options, results, seconds)


# ---- the command line ----


def _parser(micro_batches: bool) -> settings.Parser:
    parser = settings.Parser(
        prog=settings.program("plan"),
        description=DESCRIPTION,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=(
            f"{settings.program('plan')} RECIPE.py [--on TOPOLOGY,...]"
            " [--setting value ...] [options]"
        ),
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        help="a Python file with a function `recipe`; its settings become options",
    )
    add = parser.add_argument_group("options").add_argument
    add(
        "-h",
        "--help",
        action="store_true",
        help="show this, and the recipe's settings if one is named",
    )
    add(
        "--on",
        metavar="TOPOLOGY",
        help=(
            "chips to plan for, e.g. v5p:4x4x4, h200:8 or cpu:8; several, separated by"
            " commas, are compared (default: the devices that are there)"
        ),
    )
    add(
        "--objective",
        type=settings.reader(str, choices=OBJECTIVES),
        default="time",
        metavar="|".join(OBJECTIVES),
        help="what the plan is best in (default: time)",
    )
    add(
        "--mesh",
        type=_mesh,
        metavar="AXIS=N,...",
        help="the mesh, outermost axis first, e.g. fsdp=8,tensor=4",
    )
    add(
        "--pin",
        type=_pin,
        action="append",
        metavar="PATTERN=SPEC",
        help=(
            "how parameters are kept: mesh axes dim by dim, e.g."
            " '**/embedding=tensor,None' or '**/up/kernel=fsdp,tensor+expert'; may be"
            " repeated"
        ),
    )
    add(
        "--remat",
        type=settings.reader(str, choices=tuple(POLICIES)),
        metavar="|".join(POLICIES),
        help="rematerialization (default: the mildest that fits)",
    )
    if micro_batches:
        add(
            "--micro-batches",
            type=settings.reader(int),
            metavar="N",
            help="parts in which a batch passes through the model",
        )
    add(
        "--time-limit",
        type=settings.reader(float),
        metavar="SECONDS",
        help=(
            "of computing, after which the best plan so far is taken (default:"
            f" {LIMIT_SECONDS:.0f})"
        ),
    )
    add(
        "--tokens",
        type=settings.reader(float),
        metavar="N",
        help=(
            "compare the topologies for so many tokens, or samples "
            "where there are no tokens (default: 1e9 where there are several)"
        ),
    )
    add(
        "--verify",
        action="store_true",
        help=(
            "compile the planned step for the topology and set XLA's account beside the"
            " plan"
        ),
    )
    add(
        "--prove",
        type=settings.reader(int),
        metavar="K",
        help="compile the K best plans; XLA's own memory decides among them",
    )
    add(
        "--chips",
        type=Path,
        metavar="FILE",
        help="a TOML file of more chips, or of other prices",
    )
    add(
        "--replay",
        type=Path,
        metavar="PLAN",
        help="take the plan of a file instead of searching for one",
    )
    add(
        "--diff",
        type=Path,
        metavar="PLAN",
        help="print what differs from the plan of a file",
    )
    add(
        "--save",
        type=Path,
        metavar="FILE",
        help="write the plan as JSON, for --replay and --diff",
    )
    add(
        "--html",
        type=Path,
        metavar="FILE",
        help="write the plan, or the comparison, as a page with pictures",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write plans, predictions, and what planning took",
    )
    return parser


def _recipe_file(arguments: list[str]) -> str | None:
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    return next(
        (a for a in arguments if a.endswith(".py") and not a.startswith("-")), None
    )


def _mesh(text: str) -> dict[str, int]:
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (x.strip() for x in part.partition("="))
        if not equals or not name.isidentifier() or not size.isdigit() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not of the form axis=size, as in fsdp=8,tensor=4"
            )
        if name in mesh:
            raise argparse.ArgumentTypeError(f"the axis {name!r} is given twice")
        mesh[name] = int(size)
    return mesh


def _pin(text: str) -> tuple[str, PartitionSpec]:
    pattern, equals, spec = (x.strip() for x in text.rpartition("="))
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form pattern=spec, as in"
            " '**/embedding=tensor,None'"
        )
    dims: list[tuple[str, ...] | str | None] = []
    for entry in spec.split(",") if spec else ():
        axes = tuple(axis.strip() for axis in entry.split("+"))
        if axes in (("None",), ("-",)):
            dims.append(None)
            continue
        bad = next((axis for axis in axes if not axis.isidentifier()), None)
        if bad is not None:
            raise argparse.ArgumentTypeError(
                f"{bad!r} in {text!r} is no mesh axis; write axes dim by dim, as in"
                " tensor,None or fsdp+expert"
            )
        dims.append(axes if len(axes) > 1 else axes[0])
    return pattern, PartitionSpec(*dims)


def _targets(options: argparse.Namespace) -> tuple[Plan | None, list[Topology]]:
    """The plan to replay, and the topologies; none: the live devices, which nothing
    here may start yet.
    """
    chips: Mapping[str, Chip] | None = (
        None if options.chips is None else read_chips(options.chips)
    )
    replayed = None if options.replay is None else _read(options.replay)
    names = (
        []
        if options.on is None
        else [name.strip() for name in options.on.split(",") if name.strip()]
    )
    if options.on is not None and not names:
        raise SettingError(
            "--on names no topology",
            where="command line, --on",
            remedy='name one, e.g. "h200:8"',
        )
    if replayed is not None:
        other = next(
            (name for name in names if topology(name, chips).name != replayed.topology),
            None,
        )
        if other is not None:
            raise PlanError(
                f"the plan is for {replayed.topology}, not for {other}",
                where=options.replay,
                remedy="leave out --on, or plan anew without --replay",
            )
        names = [replayed.topology]
    return replayed, list(
        {t.name: t for t in (topology(name, chips) for name in names)}.values()
    )


def _check(options: argparse.Namespace, targets: Sequence[Topology]) -> None:
    """Contradictions and files that can't be written, before minutes are spent."""
    fixed = (
        ("mesh", "pin", "remat", "micro_batches", "prove", "time_limit")
        if options.replay is not None
        else ()
    )
    for name in fixed:
        if getattr(options, name, None) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise SettingError(
                f"{flag} can't change a plan that is replayed",
                where=f"command line, {flag}",
                remedy=f"leave out {flag}, or plan anew without --replay",
            )
    for flag, number in (
        ("--tokens", options.tokens),
        ("--prove", options.prove),
        ("--time-limit", options.time_limit),
        ("--micro-batches", getattr(options, "micro_batches", None)),
    ):
        if number is not None and not 0 < number < float("inf"):
            raise SettingError(
                f"{flag} is {number}",
                where=f"command line, {flag}",
                remedy="give a number above 0",
            )
    if options.verify and options.prove is not None:
        raise SettingError(
            "--verify and --prove are both given",
            where="command line",
            remedy="--prove verifies what it takes",
        )
    for flag, file in (("--save", options.save), ("--diff", options.diff)):
        if file is not None and len(targets) > 1:
            raise SettingError(
                f"{flag} is for one plan, and {len(targets)} are made",
                where=f"command line, {flag}",
                remedy="name one topology; --json keeps all plans",
            )
    if options.diff is not None:
        _read(options.diff)
    for file in (options.save, options.html, options.json):
        if file is not None and (
            file.is_dir()
            or not os.access(file if file.exists() else file.parent, os.W_OK)
        ):
            raise SettingError(
                "the file can't be written",
                where=file,
                remedy="name a file in a folder that exists and that you may write to",
            )


def _platform(options: argparse.Namespace, targets: Sequence[Topology]) -> None:
    """Planning for chips by name needs no device: JAX shall not look for any, nor take
    the accelerators that are there.
    """
    compiles = options.verify or options.prove is not None
    if not targets or (
        compiles and any(t.platform not in ("cpu", "tpu") for t in targets)
    ):
        return
    if not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cpu")
    if compiles:
        ask_for_devices(
            max(
                (t.devices for t in targets if t.platform == "cpu"),
                default=None,
            )
        )


# ---- trace and plan ----


def _traced(recipe: Recipe) -> Trace:
    """The recipe traced on the shapes of its own data; without data the parameters
    alone.
    """
    data = recipe.train
    if data is None:
        if is_linen(recipe.model):
            raise SettingError(
                "the recipe has no data to take shapes from, which a Linen model needs",
                where="Recipe.train",
                remedy="give the settings with which the recipe has data",
            )
        return trace(recipe, None, None)
    if not isinstance(data, grain.MapDataset | grain.IterDataset):
        data = from_any(data)
    count = (
        None if isinstance(data, grain.MapDataset | grain.IterDataset) else len(data)
    )
    return trace(recipe, *sample(data), samples=count)


def _planned(
    traced: Trace,
    target: Topology,
    options: argparse.Namespace,
    replayed: Plan | None,
) -> Result:
    asked = {
        "mesh": options.mesh,
        "pins": dict(options.pin) if options.pin else None,
        "remat": options.remat,
        "micro_batches": getattr(options, "micro_batches", None),
    }
    asked |= {"time_limit": options.time_limit}
    asked = {name: value for name, value in asked.items() if value is not None} | {
        "objective": options.objective
    }
    start = time.perf_counter()
    result = Result(
        target,
        replayed,
        None,
        0.0,
    )
    if replayed is not None:
        _matching(replayed, traced, options.replay)
    try:
        if options.prove is not None:
            # brings the programs and XLA's compilers along
            from lepton_jax.verify.comparison import prove

            result.plan, result.checks["prove"] = prove(
                traced, target, options.prove, **asked
            )
        elif replayed is None:
            result.plan = plan(traced, target, **asked)
    except PlanError as error:
        result.error = error
    result.seconds = time.perf_counter() - start
    if options.verify and result.plan is not None:
        from lepton_jax.verify.comparison import verify

        result.checks["verify"] = [
            verify(
                traced,
                result.plan,
                target,
            )
        ]
    return result


def _read(file: Path) -> Plan:
    try:
        return Plan.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"the plan can't be read: {getattr(error, 'strerror', None) or error}",
            where=file,
            remedy="name a file that --save, or a run, has written",
        ) from error
    except PlanError as error:
        raise PlanError(
            error.what,
            where=file,
            remedy="name a file that --save, or a run, has written",
        ) from error


def _matching(
    plan: Plan,
    traced: Trace,
    file: Path,
) -> None:
    """That a plan of a file is for these arrays."""
    there = {path: tuple(leaf.shape) for path, leaf in by_path(traced.state).items()}
    if traced.inputs is not None:
        batch = by_path({"inputs": traced.inputs, "targets": traced.targets})
        there |= {path: tuple(leaf.shape) for path, leaf in batch.items()}
    planned = {a.path: a.shape for a in (*plan.arrays, *plan.batch)}
    told = lambda shape: "absent" if shape is None else str(list(shape))
    differ = [
        f"{path} {told(planned.get(path))} in the plan, {told(there.get(path))} in the"
        " recipe"
        for path in (*there, *(p for p in planned if p not in there))
        if there.get(path) != planned.get(path)
    ]
    if differ:
        raise PlanError(
            f"the plan is not for this recipe: {len(differ)} arrays differ, e.g."
            f" {'; '.join(differ[:3])}",
            where=file,
            remedy=(
                "give the recipe the settings that it was planned with, or plan anew"
            ),
        )


# ---- what is printed and written ----


def _tell(
    arguments: list[str],
    options: argparse.Namespace,
    results: list[Result],
    seconds: float,
) -> int:
    plans = [r.plan for r in results if r.plan is not None]
    compared = (
        _compared(options, results)
        if len(results) > 1 or (options.tokens and plans)
        else None
    )
    if options.json is not None:
        _write(
            options.json,
            json.dumps(
                _record(arguments, options, results, seconds, compared),
                indent=1,
            )
            + "\n",
        )
    errors = [r.error for r in results if r.error is not None]
    if errors and len({e.what for e in errors}) == 1 and not plans:
        raise errors[0]
    if len(results) == 1:
        print(plans[0])
    if compared is not None:
        print("\n" * (len(results) == 1) + str(compared))
    for result in results:
        for check in itertools.chain(*result.checks.values()):
            print(f"\n{check}")
    if options.diff is not None:
        difference = _read(options.diff).diff(plans[0])
        print(
            f"\n{difference}"
            if difference
            else f"\nnothing differs from {options.diff}"
        )
    if options.save is not None:
        _write(options.save, plans[0].to_json() + "\n")
    if options.html is not None:
        from lepton_jax.planner.show.html import page

        title = (
            f"{Path(_recipe_file(arguments) or '').stem} on"
            f" {', '.join(r.topology.name for r in results)}"
        )
        elements = [] if compared is None else [compared._repr_html_()]
        _write(
            options.html,
            page(
                title,
                *elements,
                *(made._repr_html_() for made in plans),
            ),
        )
    searched = sum(r.seconds for r in results)
    print(
        f"\ntraced in {duration(seconds)}, {'checked' if options.replay else 'planned'}"
        f" in {duration(searched)}; the process took {duration(_age())} and"
        f" {_peak_bytes() / MEGA:,.0f} MiB in all"
    )
    refused = any(
        not check.fits
        for result in results
        for check in result.checks.get("verify", ())
    )
    return 2 if refused or not plans else 0


def _compared(options: argparse.Namespace, results: list[Result]) -> Frontier:
    plans = [r.plan for r in results if r.plan is not None]
    per_step, unit = units(plans[0]) if plans else (1, "samples")
    outcomes: list[tuple[Plan | PlanError, Topology]] = []
    for r in results:
        outcome = r.plan or r.error
        assert outcome is not None
        outcomes.append((outcome, r.topology))
    return frontier(outcomes, options.tokens or TOKENS, per_step, unit)


def _record(
    arguments: list[str],
    options: argparse.Namespace,
    results: list[Result],
    seconds: float,
    compared: Frontier | None,
) -> dict[str, Any]:
    return {
        "command": ["tools/plan.py", *arguments],
        "objective": options.objective,
        "seconds": {
            "trace": seconds,
            "search": sum(r.seconds for r in results),
            "process": _age(),
        },
        "peak_rss_bytes": _peak_bytes(),
        "plans": [_entry(r) for r in results],
        "frontier": None if compared is None else asdict(compared),
    }


def _entry(result: Result) -> dict[str, Any]:
    on = result.topology
    made = result.plan
    entry: dict[str, Any] = {
        "topology": on.name,
        "devices": on.devices,
        "chips": on.chips,
        "price_per_hour": on.price_per_hour,
        "search_seconds": result.seconds,
    }
    if made is None:
        assert result.error is not None
        return entry | {
            "error": {
                "what": result.error.what,
                "where": result.error.where,
                "remedy": result.error.remedy,
            }
        }
    count, unit = units(made)
    entry["predicted"] = {
        "step_seconds": made.step_seconds,
        "seconds": made.seconds,
        "peak_bytes": made.peak,
        "memory_bytes": made.memory,
        "bytes_per_device": made.bytes_per_device,
        "flops": made.flops,
        "price_per_step": made.price_per_step,
        "unit": unit,
        "units_per_step": count,
        "units_per_second": count / made.step_seconds if made.step_seconds else None,
    }
    entry["plan"] = asdict(made)
    return entry | {
        name: [check.to_dict() for check in checks]
        for name, checks in result.checks.items()
    }


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingError(
            f"the file can't be written: {error.strerror}",
            where=file,
            remedy="mend that and plan again",
        ) from error


def _peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _age() -> float:
    """Seconds since this process began, imports included."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf(
            "SC_CLK_TCK"
        )
    # not Linux: what this thread and its imports have used
    except (OSError, AttributeError):
        return time.process_time()
