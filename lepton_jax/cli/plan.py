"""The `plan` tool: what a step would cost, before an array exists, on any hardware.

python tools/plan.py RECIPE.py --on v5p:4x4x4
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lepton_jax.cli import settings
from lepton_jax.data import Arrays, sample, settled
from lepton_jax.errors import LeptonError, PlanError, SettingError
from lepton_jax.hardware import Topology, here, read_chips, topology
from lepton_jax.launch.joining import ask_for_devices
from lepton_jax.planner import Plan, Trace, plan, trace
from lepton_jax.planner.patience import LIMIT_SECONDS
from lepton_jax.planner.plans import CONTEXTS, OBJECTIVES
from lepton_jax.planner.program.remat import POLICIES
from lepton_jax.planner.show.frontier import Frontier, frontier
from lepton_jax.planner.show.html import page
from lepton_jax.planner.show.rows import units
from lepton_jax.planner.show.words import duration
from lepton_jax.planner.xla import flags
from lepton_jax.recipe import Recipe
from lepton_jax.step.module import is_linen

# tokens, or samples, for which topologies are compared if nothing else is asked for
TOKENS = 1e9
DESCRIPTION = (
    "Plan a recipe for any hardware: how it would lie there, why, and what memory, time"
    " and money a step would take."
)
# options that decide a plan, which one that is replayed has already
REPLAY_HAS = (
    "mesh",
    "pin",
    "remat",
    "micro_batches",
    "stages",
    "prove",
    "time_limit",
    "context",
    "xla",
)
MIB = 2**20
# exit codes of a shell: a mistake of the user's or nothing that fits; Ctrl-C
MISTAKE = 2
INTERRUPTED = 130


@dataclass
class Result:
    """The outcome of planning for one topology.

    Attributes:
      plan: None if there is none.
      error: why there is no plan, and what would fit; None if there is one.
      seconds: time of planning.
      checks: XLA's verdicts, by the option that asked for them.
    """

    topology: Topology
    plan: Plan | None = None
    error: PlanError | None = None
    seconds: float = 0.0
    checks: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Session:
    """All that one command line gave: what is shown and written.

    Attributes:
      arguments: as given.
      options: parsed.
      trace_seconds: time of tracing the recipe.
    """

    arguments: list[str]
    options: argparse.Namespace
    results: list[Result]
    trace_seconds: float

    @property
    def plans(self) -> list[Plan]:
        """Plans of the topologies on which there is one."""
        return [result.plan for result in self.results if result.plan is not None]

    @property
    def search_seconds(self) -> float:
        """Time of planning for all topologies."""
        return sum(result.seconds for result in self.results)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit code: 0; 2 for an error of the user's or where nothing fits; 130 after
      Ctrl-C.
    """
    arguments = settings.typed(arguments)
    _replace_unknown_characters()
    try:
        code = look(arguments)
        sys.stdout.flush()
        return code
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    # as with `| head`; what Python flushes at its end goes nowhere
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _replace_unknown_characters() -> None:
    """Print "?" on a terminal that does not have the bars' characters."""
    encoding = sys.stdout.encoding or ""
    is_utf8 = encoding.lower().replace("-", "") == "utf8"
    if hasattr(sys.stdout, "reconfigure") and not is_utf8:
        sys.stdout.reconfigure(errors="replace")


def look(arguments: list[str]) -> int:
    """Parse, trace, plan and show; return the exit code.

    Raises:
      LeptonError: a mistake that the user can fix.
    """
    file = _recipe_file(arguments)
    wants_help = bool({"-h", "--help"} & set(arguments))
    function = None if file is None else settings.load(Path(file))
    own: list[str] = []
    if function is not None:
        own += inspect.signature(function).parameters
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
    _choose_platform(options, targets)

    clock = time.perf_counter()
    traced = _traced(settings.call(function, given))
    seconds = time.perf_counter() - clock
    if not targets:
        live, _ = here()
        targets = [live]
    results = [_planned(traced, target, options, replayed) for target in targets]
    return _show(Session(arguments, options, results, seconds))


# ---- the command line ----


def _parser(micro_batches: bool) -> settings.Parser:
    """Return the parser.

    Args:
      micro_batches: whether there is an option for them, since the recipe has none.
    """
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
    _add_targets(add)
    _add_pins(add, micro_batches)
    _add_checks(add)
    _add_files(add)
    return parser


def _add_targets(add: Callable[..., Any]) -> None:
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


def _add_pins(
    add: Callable[..., Any],
    micro_batches: bool,
) -> None:
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
        type=settings.reader(str),
        metavar="|".join(POLICIES),
        help=(
            "rematerialization (default: the mildest that fits), or 'keep' with what is"
            " kept, and 'offload' with what goes to the host, as a plan shows it"
        ),
    )
    if micro_batches:
        add(
            "--micro-batches",
            type=settings.reader(int),
            metavar="N",
            help="parts in which a batch passes through the model",
        )
    add(
        "--stages",
        type=_stages,
        metavar="S[xM[xC]]",
        help=(
            "of a pipeline for a stack of equal layers, with M micro-batches in flight"
            " and C chunks of layers on each stage, e.g. 4, 4x16 or 4x16x2; 1: none"
            " (default: only where it is faster, or nothing else fits)"
        ),
    )
    add(
        "--context",
        type=settings.reader(str, choices=CONTEXTS),
        metavar="|".join(CONTEXTS),
        help=(
            "how attention meets a sequence that is split over devices: they exchange"
            " parts of it for heads, or keys and values go around (default: the faster)"
        ),
    )
    add(
        "--xla",
        type=flags.parsed,
        metavar="NAME=VALUE,...",
        help=(
            "XLA's flags for the compiled step, or none (default: those with which"
            " collectives run beside products, by backend; XLA_FLAGS wins)"
        ),
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


def _add_checks(add: Callable[..., Any]) -> None:
    add(
        "--tokens",
        type=settings.reader(float),
        metavar="N",
        help=(
            "compare the topologies for this number of tokens, or of samples "
            "where there are no tokens (default: 1e9 where there are several)"
        ),
    )
    add(
        "--verify",
        action="store_true",
        help=(
            "compile the planned step for the topology and show XLA's account next"
            " to the plan"
        ),
    )
    add(
        "--prove",
        type=settings.reader(int),
        metavar="K",
        help=(
            "let XLA place the arrays of the K best plans; its own figures of their"
            " memory decide among them, and are kept in the user's cache folder"
        ),
    )
    add(
        "--whole",
        action="store_true",
        help=(
            "with --verify or --prove: compile to the end instead of stopping XLA once"
            " it has placed the arrays"
        ),
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


def _add_files(add: Callable[..., Any]) -> None:
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


def _recipe_file(arguments: list[str]) -> str | None:
    """Return the recipe's file: the first argument, else the first that ends in .py."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    for argument in arguments:
        if argument.endswith(".py") and not argument.startswith("-"):
            return argument
    return None


def _mesh(text: str) -> dict[str, int]:
    """Return the mesh of `fsdp=8,tensor=4`."""
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        is_size = size.isdigit() and int(size) >= 1
        if not name.isidentifier() or not is_size:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not of the form axis=size, as in fsdp=8,tensor=4"
            )
        if name in mesh:
            raise argparse.ArgumentTypeError(f"the axis {name!r} is given twice")
        mesh[name] = int(size)
    return mesh


def _stages(text: str) -> tuple[int, ...]:
    """Return stages, micro-batches in flight and chunks of `4x16x2`."""
    numbers = text.split("x")
    if len(numbers) > 3 or not all(n.isdigit() and int(n) >= 1 for n in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form stages, stagesxparts or stagesxpartsxchunks,"
            " as in 4, 4x16 or 4x16x2"
        )
    return tuple(int(number) for number in numbers)


def _pin(text: str) -> tuple[str, PartitionSpec]:
    """Return the pattern and the spec of `**/embedding=tensor,None`."""
    pattern, equals, spec = (word.strip() for word in text.rpartition("="))
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form pattern=spec, as in"
            " '**/embedding=tensor,None'"
        )
    entries = spec.split(",") if spec else []
    return pattern, PartitionSpec(*(_dim(entry, text) for entry in entries))


def _dim(
    entry: str,
    text: str,
) -> tuple[str, ...] | str | None:
    """Return the mesh axes of one dim of the pin `text`."""
    axes = tuple(axis.strip() for axis in entry.split("+"))
    if axes in (("None",), ("-",)):
        return None
    for axis in axes:
        if not axis.isidentifier():
            raise argparse.ArgumentTypeError(
                f"{axis!r} in {text!r} is no mesh axis; write axes dim by dim, as in"
                " tensor,None or fsdp+expert"
            )
    return axes if len(axes) > 1 else axes[0]


def _targets(options: argparse.Namespace) -> tuple[Plan | None, list[Topology]]:
    """Return the plan to replay, if any, and the topologies.

    No topologies stand for the live devices, which nothing here may start yet.
    """
    chips = None if options.chips is None else read_chips(options.chips)
    replayed = None if options.replay is None else Plan.load(options.replay)
    named = [] if options.on is None else _named(options.on)
    targets = {name: topology(name, chips) for name in named}
    if replayed is not None:
        for name, target in targets.items():
            if target.name != replayed.topology:
                raise PlanError(
                    f"the plan is for {replayed.topology}, not for {name}",
                    where=options.replay,
                    remedy="leave out --on, or plan anew without --replay",
                )
        targets = {"replayed": topology(replayed.topology, chips)}

    # one topology may have several names, as in v5e:2x2 and V5E:2x2
    different = {target.name: target for target in targets.values()}
    return replayed, list(different.values())


def _named(text: str) -> list[str]:
    """Return the names in `v5e:2x2, h200:8`."""
    words = [word.strip() for word in text.split(",")]
    names = [word for word in words if word]
    if not names:
        raise SettingError(
            "--on names no topology",
            where="command line, --on",
            remedy='name one, e.g. "h200:8"',
        )
    return names


# ---- checks, before minutes are spent ----


def _check(
    options: argparse.Namespace,
    targets: Sequence[Topology],
) -> None:
    """Find contradictions, numbers out of range and files that can't be written."""
    _check_replay(options)
    _check_numbers(options)
    if options.verify and options.prove is not None:
        raise SettingError(
            "--verify and --prove are both given",
            where="command line",
            remedy="--prove verifies what it takes",
        )
    if options.whole and not options.verify and options.prove is None:
        raise SettingError(
            "--whole is given, and nothing is compiled",
            where="command line",
            remedy="give --verify or --prove K as well",
        )
    of_one_plan = {"--save": options.save, "--diff": options.diff}
    for flag, file in of_one_plan.items():
        if file is not None and len(targets) > 1:
            raise SettingError(
                f"{flag} is for one plan, and {len(targets)} are made",
                where=f"command line, {flag}",
                remedy="name one topology; --json keeps all plans",
            )
    if options.diff is not None:
        Plan.load(options.diff)
    for file in (options.save, options.html, options.json):
        if file is not None:
            _check_writable(file)


def _check_replay(options: argparse.Namespace) -> None:
    """Find options that can't change a plan that is replayed."""
    if options.replay is None:
        return
    for name in REPLAY_HAS:
        if getattr(options, name, None) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise SettingError(
                f"{flag} can't change a plan that is replayed",
                where=f"command line, {flag}",
                remedy=f"leave out {flag}, or plan anew without --replay",
            )


def _check_numbers(options: argparse.Namespace) -> None:
    for name in ("tokens", "prove", "time_limit", "micro_batches"):
        number = getattr(options, name, None)
        if number is not None and not 0 < number < float("inf"):
            flag = f"--{name.replace('_', '-')}"
            raise SettingError(
                f"{flag} is {number}",
                where=f"command line, {flag}",
                remedy="give a number above 0",
            )


def _check_writable(file: Path) -> None:
    place = file if file.exists() else file.parent
    is_writable = os.access(place, os.W_OK)
    if file.is_dir() or not is_writable:
        raise SettingError(
            "the file can't be written",
            where=file,
            remedy="name a file in a folder that exists and that you may write to",
        )


def _choose_platform(
    options: argparse.Namespace,
    targets: Sequence[Topology],
) -> None:
    """Let JAX see only CPUs where no device is needed.

    Planning for chips by name needs none, so JAX must neither look for accelerators nor
    take those that are there. Compiling needs them, except for TPUs, which libtpu
    describes, and for CPUs, which can be virtual.
    """
    compiles = options.verify or options.prove is not None
    platforms = {target.platform for target in targets}
    on_live_chips = bool(platforms - {"cpu", "tpu"})
    if not targets or (compiles and on_live_chips):
        return
    if not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cpu")
    if compiles:
        cpus = [target.devices for target in targets if target.platform == "cpu"]
        ask_for_devices(max(cpus, default=None))


# ---- trace and plan ----


def _traced(recipe: Recipe) -> Trace:
    """Trace the recipe on the shapes of its own data.

    Without data the trace covers the parameters alone.
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
    data = settled(data)
    samples = len(data) if isinstance(data, Arrays) else None
    return trace(
        recipe,
        *sample(data),
        samples=samples,
    )


def _planned(
    traced: Trace,
    target: Topology,
    options: argparse.Namespace,
    replayed: Plan | None,
) -> Result:
    """Plan for one topology, or take the plan that is replayed."""
    result = Result(target, replayed)
    asked = _asked(options)
    start = time.perf_counter()
    if replayed is not None:
        replayed.check(traced, where=options.replay)
    try:
        if options.prove is not None:
            # brings the programs and XLA's compilers along
            from lepton_jax.verify.comparison import prove
            from lepton_jax.verify.probing import users_folder

            result.plan, checks = prove(
                traced,
                target,
                options.prove,
                whole=options.whole,
                cache=users_folder(),
                **asked,
            )
            result.checks["prove"] = list(checks)
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
                whole=options.whole,
            )
        ]
    return result


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `plan` that the command line gives."""
    asked = {
        "objective": options.objective,
        "mesh": options.mesh,
        "pins": dict(options.pin) if options.pin else None,
        "remat": options.remat,
        "micro_batches": getattr(options, "micro_batches", None),
        "stages": options.stages,
        "time_limit": options.time_limit,
        "context": options.context,
        "flags": options.xla,
    }
    return {name: value for name, value in asked.items() if value is not None}


# ---- what is printed and written ----


def _show(session: Session) -> int:
    """Print and write what was planned; return the exit code."""
    options = session.options
    results = session.results
    plans = session.plans
    compared = None
    if len(results) > 1 or (options.tokens and plans):
        compared = _compared(session)
    if options.json is not None:
        record = _record(session, compared)
        _write(options.json, json.dumps(record, indent=1) + "\n")

    errors = [result.error for result in results if result.error is not None]
    is_one_error = len({error.what for error in errors}) == 1
    if is_one_error and not plans:
        raise errors[0]

    _print(session, compared)
    if options.save is not None:
        _write(options.save, plans[0].to_json() + "\n")
    if options.html is not None:
        _write(options.html, _page(session, compared))
    _print_times(session)

    verdicts = []
    for result in results:
        verdicts += result.checks.get("verify", [])
    is_refused = any(not (verdict.fits and verdict.agrees) for verdict in verdicts)
    return MISTAKE if is_refused or not plans else 0


def _print(session: Session, compared: Frontier | None) -> None:
    """Print the plan or the comparison, XLA's verdicts, and what differs."""
    options = session.options
    is_single = len(session.results) == 1
    if is_single:
        print(session.plans[0])
    if compared is not None:
        print(f"\n{compared}" if is_single else compared)
    for result in session.results:
        for check in itertools.chain(*result.checks.values()):
            print(f"\n{check}")
    if options.diff is not None:
        other = Plan.load(options.diff)
        difference = other.diff(session.plans[0])
        print(f"\n{difference or f'nothing differs from {options.diff}'}")


def _print_times(session: Session) -> None:
    verb = "checked" if session.options.replay else "planned"
    print(
        f"\ntraced in {duration(session.trace_seconds)}, {verb}"
        f" in {duration(session.search_seconds)}; the process took {duration(_age())}"
        f" and {_peak_bytes() / MIB:,.0f} MiB in all"
    )


def _page(session: Session, compared: Frontier | None) -> str:
    """Return a page of the comparison, if there is one, and all plans."""
    recipe = Path(_recipe_file(session.arguments) or "").stem
    names = [result.topology.name for result in session.results]
    targets = ", ".join(names)
    elements = [] if compared is None else [compared._repr_html_()]
    elements += [plan._repr_html_() for plan in session.plans]
    return page(f"{recipe} on {targets}", *elements)


def _compared(session: Session) -> Frontier:
    """Compare the topologies, those without a plan by their errors."""
    outcomes: list[tuple[Plan | PlanError, Topology]] = []
    for result in session.results:
        outcome = result.plan or result.error
        assert outcome is not None
        outcomes.append((outcome, result.topology))

    tokens = session.options.tokens or TOKENS
    plans = session.plans
    per_step, unit = units(plans[0]) if plans else (1, "samples")
    return frontier(outcomes, tokens, per_step, unit)


def _record(
    session: Session,
    compared: Frontier | None,
) -> dict[str, Any]:
    """Return what --json writes."""
    return {
        "command": ["tools/plan.py", *session.arguments],
        "objective": session.options.objective,
        "seconds": {
            "trace": session.trace_seconds,
            "search": session.search_seconds,
            "process": _age(),
        },
        "peak_rss_bytes": _peak_bytes(),
        "plans": [_entry(result) for result in session.results],
        "frontier": None if compared is None else asdict(compared),
    }


def _entry(result: Result) -> dict[str, Any]:
    """Return what --json writes of one topology."""
    entry: dict[str, Any] = {
        "topology": result.topology.name,
        "devices": result.topology.devices,
        "chips": result.topology.chips,
        "price_per_hour": result.topology.price_per_hour,
        "search_seconds": result.seconds,
    }
    if result.plan is None:
        assert result.error is not None
        entry["error"] = {
            "what": result.error.what,
            "where": result.error.where,
            "remedy": result.error.remedy,
        }
        return entry

    entry["predicted"] = _predicted(result.plan)
    entry["plan"] = asdict(result.plan)
    for name, checks in result.checks.items():
        entry[name] = [check.to_dict() for check in checks]
    return entry


def _predicted(plan: Plan) -> dict[str, Any]:
    """Return the predictions that are not entries of the plan itself, and those too."""
    count, unit = units(plan)
    rate = count / plan.step_seconds if plan.step_seconds else None
    return {
        "step_seconds": plan.step_seconds,
        "seconds": plan.seconds,
        "peak_bytes": plan.peak,
        "memory_bytes": plan.memory,
        "bytes_per_device": plan.bytes_per_device,
        "flops": plan.flops,
        "price_per_step": plan.price_per_step,
        "unit": unit,
        "units_per_step": count,
        "units_per_second": rate,
    }


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingError(
            f"the file can't be written: {error.strerror}",
            where=file,
            remedy="fix that and plan again",
        ) from error


# ---- what the process took ----


def _peak_bytes() -> int:
    """Return the most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _age() -> float:
    """Return the seconds since this process began, imports included."""
    try:
        # fields behind the process's name, which may hold spaces (proc(5))
        text = Path("/proc/self/stat").read_text()
        fields = text.rpartition(")")[2].split()
        ticks = int(fields[19])
        start = ticks / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - start
    # not Linux: what this thread and its imports have used
    except (OSError, AttributeError):
        return time.process_time()
