"""The chip catalogue: the figures that planning needs, each with its source.

`catalogue.toml` holds the chips that Lepton knows; `read_chips` reads more from a file
of the same form.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lepton_jax.errors import PlanError, nearest

DTYPES = ("bfloat16", "float16", "float32", "int8", "float8")
PLATFORMS = ("tpu", "cuda", "cpu")
# No figure of a chip is as large as this, so a larger number is a slip (assumption).
MOST = 1e30


@dataclass(frozen=True)
class Chip:
    """One JAX device, or on the platform "cpu" the machine that virtual devices share.

    Attributes:
      name: its name in a topology's name.
      platform: JAX's name of its platform: "tpu", "cuda" or "cpu".
      peaks: dense matmul peak by dtype, FLOP/s; see `peak`.
      memory: bytes of device memory that a program can use.
      bandwidth: bandwidth of device memory, bytes/s.
      kinds: the `device_kind` strings that JAX reports for it.
      aliases: its other names in a topology's name.
      devices_per_chip: JAX devices that one physical chip shows.
      matmul_fraction: best share of the peak that a large matmul reaches.
      memory_fraction: share of the memory bandwidth that is reached.
      op_seconds: seconds that an operation costs in addition to its work.
      tile: multiple to which rows and columns of a matmul's output are padded.
      tile_depth: multiple to which its contracted dim is padded.
      torus: dims of the links' torus (TPU: 2 or 3); 0 where devices are joined by
        switches or memory.
      wrap_size: of a 2-D torus a dim wraps if this divides it; a 3-D torus wraps in
        each dim if this divides all of them.
      node: chips of one host; where NVLink joins them, of one NVLink domain.
      link_bandwidth: bytes/s one way, of one torus link, of one device into NVLink, or
        of shared memory as a whole.
      link_fraction: share of it that a large collective reaches.
      link_latency: seconds per hop or step.
      call_latency: seconds per collective, whatever its size.
      ramp_seconds: seconds that a large collective loses until the links are full.
      core_bandwidth: bytes/s one way between the devices of one chip.
      network_bandwidth: bytes/s per device one way between nodes (TPU: slices).
      network_fraction: share of it that a large collective reaches.
      network_latency: seconds per step between nodes.
      host_bandwidth: bytes/s per device one way between host and device.
      host_memory: bytes per device of the host's memory; 0 where it is not known.
      price: list price on demand, US dollars per chip-hour; None where none was found.
      sources: for each field (for peaks: "peaks.bfloat16") the title, address and date
        read, or "assumption: ...".
    """

    name: str
    platform: str
    peaks: Mapping[str, float] = field(hash=False)
    memory: float
    bandwidth: float
    kinds: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    devices_per_chip: int = 1
    matmul_fraction: float = 0.8
    memory_fraction: float = 0.9
    op_seconds: float = 2e-6
    tile: int = 128
    tile_depth: int = 128
    torus: int = 0
    wrap_size: int = 1
    node: int = 8
    link_bandwidth: float = 50e9
    link_fraction: float = 1.0
    link_latency: float = 1e-6
    call_latency: float = 1e-5
    ramp_seconds: float = 0.0
    core_bandwidth: float = 600e9
    network_bandwidth: float = 6.25e9
    network_fraction: float = 0.85
    network_latency: float = 5e-6
    host_bandwidth: float = 16e9
    host_memory: float = 0.0
    price: float | None = None
    sources: Mapping[str, str] = field(
        default_factory=dict,
        repr=False,
        hash=False,
    )

    @property
    def bf16_flops(self) -> float:
        """Dense bfloat16 matmul peak, FLOP/s."""
        return self.peaks["bfloat16"]

    def peak(self, dtype: Any = "bfloat16") -> float:
        """Return the dense matmul peak for operands of `dtype`, FLOP/s.

        The products have JAX's default precision. A dtype that the chip has no units
        for counts as the next wider one that it has: float8, int8 and float16 as
        bfloat16, and anything wider than float32 as float32.
        """
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        if name in self.peaks:
            return self.peaks[name]
        if name.startswith("float8"):
            name = "float8"
        elif name.endswith(("int8", "int4")):
            name = "int8"
        narrow = name in ("bfloat16", "float16", "float8", "int8")
        wider = "bfloat16" if narrow else "float32"
        return self.peaks.get(name) or self.peaks.get(wider) or self.bf16_flops

    def __str__(self) -> str:
        """Return a line per figure: its name, value and source."""
        figures: dict[str, Any] = {
            f"peaks.{dtype}": peak for dtype, peak in self.peaks.items()
        }
        for item in fields(self):
            if item.name not in ("name", "peaks", "sources"):
                figures[item.name] = getattr(self, item.name)
        rows = {
            key: _shown(value)
            for key, value in figures.items()
            if key in self.sources or key == "price"
        }
        width = max(
            (len(text) for text in rows.values()),
            default=0,
        )
        lines = [self.name]
        for key, text in rows.items():
            source = self.sources.get(key, "")
            lines.append(f"  {key:<17} {text:<{width}}  {source}".rstrip())
        return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_REQUIRED = ("platform", "peaks", "memory", "bandwidth", "link_bandwidth")
_COUNTS = ("devices_per_chip", "tile", "tile_depth", "torus", "wrap_size", "node")
_TEXTS = ("kinds", "aliases")
_MAY_BE_ZERO = (
    "op_seconds",
    "link_latency",
    "call_latency",
    "ramp_seconds",
    "network_latency",
    "host_memory",
    "torus",
    "price",
)
# Fields of one product and not of its kind: an entry `like` another chip has neither
# its names nor its price.
_OWN = ("kinds", "aliases", "price")
_KEYS = [f.name for f in fields(Chip) if f.name not in ("name", "sources")]


def read_chips(path: str | Path) -> dict[str, Chip]:
    """Return the chips of a TOML file by name: a table for each, with `Chip`'s fields.

    A figure is a bare number or `{ value = 3.5, source = "our contract" }`. With `like
    = "h200"` the fields left out are those of another chip of the file (further up) or
    of the catalogue, but for its names and its price. Required without `like`:
    platform, peaks.bfloat16, memory, bandwidth, link_bandwidth, and torus on a TPU.

    Raises:
      PlanError: there is no such file, it is no TOML, or a field is missing, unknown,
        ill-typed or out of range.
    """
    return _read(Path(path), CHIPS)


def _read(
    path: Path,
    known: Mapping[str, Chip],
) -> dict[str, Chip]:
    tables = _toml(path)
    cited = tables.pop("sources", {})
    cited = cited if isinstance(cited, dict) else {}
    chips: dict[str, Chip] = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or not re.fullmatch(r"[\w-]+", name):
            raise PlanError(
                f"{name!r} is no table of a chip",
                where=path,
                remedy=(
                    'write [name], of letters, digits, "-" and "_", and its fields'
                    " below"
                ),
            )
        reader = _Table(path, name, cited)
        chips[name.lower()] = reader.chip(table, {**known, **chips})
    return chips


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"the chips can't be read: {error.strerror}",
            where=path,
            remedy="name a file that exists",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(
            f"the chips are no TOML: {error}",
            where=path,
            remedy="fix the line; a table begins with [name], a field is name = value",
        ) from error


@dataclass
class _Table:
    """Reads one chip's table.

    Attributes:
      path, name: the place of the table, for errors.
      cited: full citations by the short names that sources use.
    """

    path: Path
    name: str
    cited: dict[str, str]

    def error(
        self,
        key: str,
        what: str,
        remedy: str,
    ) -> PlanError:
        where = f"{self.path}, [{self.name}] {key}".rstrip()
        return PlanError(what, where=where, remedy=remedy)

    def chip(
        self,
        table: dict[str, Any],
        known: Mapping[str, Chip],
    ) -> Chip:
        table = dict(table)
        like = "like" in table
        base = self._base(table.pop("like"), known) if like else None
        for key in table:
            if key not in _KEYS:
                raise self.error(
                    key,
                    f"a chip has no field {key!r}{nearest(key, _KEYS)}",
                    f"it has like, {', '.join(_KEYS)}",
                )

        sources: dict[str, str] = {}
        values: dict[str, Any] = {}
        for key, entry in table.items():
            if key == "peaks":
                values[key] = self.peaks(entry, sources)
            else:
                values[key] = self.figure(key, entry, sources)
        if base is not None:
            return self._like(base, values, sources)
        self._require(values)
        return Chip(
            name=self.name.lower(),
            sources=sources,
            **values,
        )

    def _base(
        self,
        name: Any,
        known: Mapping[str, Chip],
    ) -> Chip:
        if isinstance(name, str) and name.lower() in known:
            return known[name.lower()]
        near = nearest(name, known) if isinstance(name, str) else ""
        raise self.error(
            "like", f"{name!r} is no chip{near}", f"name one of {', '.join(known)}"
        )

    def _require(self, values: dict[str, Any]) -> None:
        required = list(_REQUIRED)
        if values.get("platform") == "tpu":
            required.append("torus")
        for key in required:
            shown = "peaks.bfloat16" if key == "peaks" else key
            if key not in values or (
                key == "peaks" and "bfloat16" not in values["peaks"]
            ):
                raise self.error(
                    shown,
                    f"chip {self.name!r} has no {shown}",
                    f'give {shown}, or start from a chip: like = "h200"',
                )

    def _like(
        self,
        base: Chip,
        values: dict[str, Any],
        sources: dict[str, str],
    ) -> Chip:
        inherited = {key: text for key, text in base.sources.items() if key not in _OWN}
        own: dict[str, Any] = {
            "kinds": (),
            "aliases": (),
            "price": None,
        }
        fresh = own | values
        fresh["peaks"] = {**base.peaks, **values.get("peaks", {})}
        name = self.name.lower()
        return replace(
            base,
            name=name,
            sources=inherited | sources,
            **fresh,
        )

    def peaks(
        self,
        entry: Any,
        sources: dict[str, str],
    ) -> dict[str, float]:
        """Return the peaks by dtype; their sources go to `sources`."""
        if not isinstance(entry, dict):
            raise self.error(
                "peaks",
                f"peaks is {entry!r}, not a table by dtype",
                "write peaks.bfloat16 = 989e12",
            )
        for dtype in entry:
            if dtype not in DTYPES:
                raise self.error(
                    f"peaks.{dtype}",
                    f"{dtype!r} is no dtype of peaks{nearest(dtype, DTYPES)}",
                    f"it has {', '.join(DTYPES)}",
                )
        return {
            dtype: self.figure(f"peaks.{dtype}", value, sources)
            for dtype, value in entry.items()
        }

    def figure(
        self,
        key: str,
        entry: Any,
        sources: dict[str, str],
    ) -> Any:
        """Return the value of a field; its source goes to `sources`."""
        source = str(self.path)
        if isinstance(entry, dict):
            for part in entry:
                if part not in ("value", "source"):
                    raise self.error(
                        key,
                        f"a figure has no {part!r}",
                        'write { value = ..., source = "..." }',
                    )
            if "value" not in entry or not isinstance(entry.get("source", ""), str):
                raise self.error(
                    key,
                    "a figure needs a value, and its source is text",
                    'write { value = ..., source = "..." }',
                )
            source = self._cite(entry.get("source", source))
            entry = entry["value"]
        if key not in ("platform", "aliases"):
            sources[key] = source
        return self._checked(key, entry)

    def _cite(self, text: str) -> str:
        name, _, remark = text.partition(":")
        if name not in self.cited:
            return text
        return f"{self.cited[name]};{remark}" if remark else str(self.cited[name])

    def _checked(
        self,
        key: str,
        value: Any,
    ) -> Any:
        if key == "platform":
            return self._checked_platform(value)
        if key in _TEXTS:
            return self._checked_texts(key, value)

        count = key in _COUNTS
        kinds = int if count else int | float
        what = "a whole number" if count else "a number"
        # NaN isn't below the limit either.
        number = isinstance(value, kinds) and not isinstance(value, bool)
        if not number or not abs(value) < MOST:
            raise self.error(key, f"{key} is {value!r}, not {what}", f"give {what}")
        if value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
            raise self.error(key, f"{key} is {value}", "give a number above zero")
        if key.endswith("_fraction") and value > 1:
            raise self.error(
                key,
                f"{key} is {value}, more than the whole",
                "give a share between 0 and 1",
            )
        return value if count else float(value)

    def _checked_platform(self, value: Any) -> str:
        if value in PLATFORMS:
            return value
        what = f"{value!r} is no platform"
        raise self.error("platform", what, f"one of {', '.join(PLATFORMS)}")

    def _checked_texts(
        self,
        key: str,
        value: Any,
    ) -> tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return tuple(value)
        what = f"{key} is {value!r}, not a list of texts"
        raise self.error(key, what, f'write {key} = ["..."]')


CHIPS: dict[str, Chip] = _read(Path(__file__).with_name("catalogue.toml"), {})
