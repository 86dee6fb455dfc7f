"""The chip catalogue: what planning needs to know of a chip, each figure with its
source.

`catalogue.toml` holds the chips known here; `read_chips` reads more from a file of the
same form.
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


@dataclass(frozen=True)
class Chip:
    """One JAX device; on the platform "cpu", the machine that all its virtual devices
    share.

    Attributes:
      name: as in a topology's name.
      platform: JAX's name of it: "tpu", "cuda" or "cpu".
      peaks: dense matmul peak by dtype, FLOP/s; see `peak`.
      memory: bytes of device memory that a program can use.
      bandwidth: of device memory, bytes/s.
      kinds: the `device_kind` strings that JAX reports for it.
      aliases: other names of it in a topology's name.
      devices_per_chip: JAX devices that one physical chip shows.
      matmul_fraction: best share of the peak that a large matmul reaches.
      memory_fraction: share of the memory bandwidth that is reached.
      op_seconds: what an operation costs beside its work.
      tile: rows and columns to which a matmul's output is padded.
      tile_depth: to what its contracted dim is padded.
      torus: dims of the links' torus (TPU: 2 or 3); 0 where devices are joined by
        switches or memory.
      wrap_size: of a 2-D torus a dim wraps if this divides it; a 3-D torus wraps in
        each dim if this divides all of them.
      node: chips of one host; where NVLink joins them, of one NVLink domain.
      link_bandwidth: one way, bytes/s: of one torus link, of one device into NVLink, or
        of shared memory as a whole.
      link_fraction: share of it that a large collective reaches.
      link_latency: seconds per hop or step.
      call_latency: seconds per collective, whatever its size.
      ramp_seconds: what a large collective loses until the links are full.
      core_bandwidth: between the devices of one chip, one way, bytes/s.
      network_bandwidth: between nodes (TPU: slices), one way, bytes/s per device.
      network_fraction: share of it that a large collective reaches.
      network_latency: seconds per step between nodes.
      host_bandwidth: between host and device, one way, bytes/s per device.
      price: list price on demand, US dollars per chip-hour; None where none was found.
      sources: field (of peaks: "peaks.bfloat16") to title, address and date read, or
        "assumption: ...".
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
        """Dense matmul peak for operands of `dtype` at JAX's default precision, FLOP/s.

        A dtype that the chip has no units for counts as the next wider one that it has:
        float8, int8 and float16 as bfloat16, and whatever is wider than float32 as
        float32.
        """
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        found = self.peaks.get(name)
        if found is None:
            name = (
                "float8"
                if name.startswith("float8")
                else "int8"
                if name.endswith(("int8", "int4"))
                else name
            )
            wide = name not in ("bfloat16", "float16", "float8", "int8")
            found = (
                self.peaks.get(name)
                or self.peaks.get("float32" if wide else "bfloat16")
                or self.bf16_flops
            )
        return found

    def __str__(self) -> str:
        """A line per figure: value, source."""
        shown = {f"peaks.{dtype}": peak for dtype, peak in self.peaks.items()}
        shown |= {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("name", "peaks", "sources")
        }
        rows = [
            (
                key,
                (
                    "unknown"
                    if value is None
                    else f"{value:.4g}"
                    if isinstance(value, float)
                    else str(value)
                ),
            )
            for key, value in shown.items()
            if key in self.sources or key == "price"
        ]
        wide = max(
            (len(value) for _, value in rows),
            default=0,
        )
        return "\n".join(
            [
                self.name,
                *(
                    f"  {key:<17} {value:<{wide}}  {self.sources.get(key, '')}".rstrip()
                    for key, value in rows
                ),
            ]
        )


_REQUIRED = ("platform", "peaks", "memory", "bandwidth", "link_bandwidth")
_COUNTS = ("devices_per_chip", "tile", "tile_depth", "torus", "wrap_size", "node")
_TEXTS = ("kinds", "aliases")
_MAY_BE_ZERO = (
    "op_seconds",
    "link_latency",
    "call_latency",
    "ramp_seconds",
    "network_latency",
    "torus",
    "price",
)
# what belongs to a product, not to its kind: an own entry `like` another doesn't answer
# to its names nor cost the same
_OWN = ("kinds", "aliases", "price")
_KEYS = [f.name for f in fields(Chip) if f.name not in ("name", "sources")]


def read_chips(path: str | Path) -> dict[str, Chip]:
    """Chips of a TOML file, by name: a table for each, with the fields of `Chip`.

    A figure is a bare number or `{ value = 3.5, source = "our contract" }`. With `like
    = "h200"` the fields left out are those of another chip of the file (further up) or
    of the catalogue, but for its names and its price. Required without `like`:
    platform, peaks.bfloat16, memory, bandwidth, link_bandwidth, and torus on a TPU.

    Raises:
      PlanError: no such file, no TOML, or a field that is missing, unknown, ill-typed
        or out of range.
    """
    return _read(Path(path), CHIPS)


def _read(path: Path, known: Mapping[str, Chip]) -> dict[str, Chip]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"the chips can't be read: {error.strerror}",
            where=path,
            remedy="name a file that is there",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(
            f"the chips are no TOML: {error}",
            where=path,
            remedy="mend the line; a table begins with [name], a field is name = value",
        ) from error
    cited = tables.pop("sources", {})
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
        chips[name.lower()] = _Table(
            path, name, cited if isinstance(cited, dict) else {}
        ).chip(table, {**known, **chips})
    return chips


@dataclass
class _Table:
    """Reads one chip's table; knows where it stands, for the errors."""

    path: Path
    name: str
    cited: dict[str, str]

    def error(
        self,
        key: str,
        what: str,
        remedy: str,
    ) -> PlanError:
        return PlanError(
            what, where=f"{self.path}, [{self.name}] {key}".rstrip(), remedy=remedy
        )

    def chip(
        self,
        table: dict[str, Any],
        known: Mapping[str, Chip],
    ) -> Chip:
        table, base = dict(table), table.get("like")
        if "like" in table:
            table.pop("like")
            if not isinstance(base, str) or base.lower() not in known:
                near = nearest(base, known) if isinstance(base, str) else ""
                raise self.error(
                    "like",
                    f"{base!r} is no chip{near}",
                    f"name one of {', '.join(known)}",
                )
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
            values[key] = (
                self.peaks(entry, sources)
                if key == "peaks"
                else self.one(key, entry, sources)
            )
        if base is not None:
            return self._like(
                known[base.lower()],
                values,
                sources,
            )
        for key in (
            *_REQUIRED,
            *(("torus",) if values.get("platform") == "tpu" else ()),
        ):
            if key not in values or (
                key == "peaks" and "bfloat16" not in values["peaks"]
            ):
                key = "peaks.bfloat16" if key == "peaks" else key
                raise self.error(
                    key,
                    f"chip {self.name!r} has no {key}",
                    f'give {key}, or start from a chip: like = "h200"',
                )
        return Chip(
            name=self.name.lower(),
            sources=sources,
            **values,
        )

    def _like(
        self,
        base: Chip,
        values: dict[str, Any],
        sources: dict[str, str],
    ) -> Chip:
        inherited = {key: text for key, text in base.sources.items() if key not in _OWN}
        fresh: dict[str, Any] = (
            dict.fromkeys(("kinds", "aliases"), ()) | {"price": None} | values
        )
        fresh["peaks"] = {**base.peaks, **values.get("peaks", {})}
        return replace(
            base,
            name=self.name.lower(),
            sources=inherited | sources,
            **fresh,
        )

    def peaks(
        self,
        entry: Any,
        sources: dict[str, str],
    ) -> dict[str, float]:
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
            dtype: self.one(f"peaks.{dtype}", value, sources)
            for dtype, value in entry.items()
        }

    def one(
        self,
        key: str,
        entry: Any,
        sources: dict[str, str],
    ) -> Any:
        """The value of a field; its source goes to `sources`."""
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
            if value not in PLATFORMS:
                raise self.error(
                    key, f"{value!r} is no platform", f"one of {', '.join(PLATFORMS)}"
                )
            return value
        if key in _TEXTS:
            if not isinstance(value, list) or not all(
                isinstance(text, str) for text in value
            ):
                raise self.error(
                    key,
                    f"{key} is {value!r}, not a list of texts",
                    f'write {key} = ["..."]',
                )
            return tuple(value)
        kinds, what = (
            (int, "a whole number") if key in _COUNTS else (int | float, "a number")
        )
        # NaN, too, is not below
        if (
            isinstance(value, bool)
            or not isinstance(value, kinds)
            or not abs(value) < 1e30
        ):
            raise self.error(key, f"{key} is {value!r}, not {what}", f"give {what}")
        if value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
            raise self.error(key, f"{key} is {value}", "give a number above zero")
        if key.endswith("_fraction") and value > 1:
            raise self.error(
                key,
                f"{key} is {value}, more than the whole",
                "give a share between 0 and 1",
            )
        return value if key in _COUNTS else float(value)


CHIPS: dict[str, Chip] = _read(Path(__file__).with_name("catalogue.toml"), {})
