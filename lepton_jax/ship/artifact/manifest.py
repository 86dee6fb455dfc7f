"""The manifest of an artifact, as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, date, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from lepton_jax.ship.artifact.signature import Column, Tensor

NAME = "manifest.json"
FORMAT = 1  # of an artifact; a later one may not be readable here
# JAX opens a program for six months after it was written, if it is a later JAX:
# https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
DAYS = 180
LIBRARIES = ("lepton-jax", "jax", "jaxlib", "flax", "numpy")


@dataclass(frozen=True)
class Manifest:
    """Facts about an artifact, as `manifest.json` holds them.

    Attributes:
      name: of the model.
      version: of the model; "1" unless somebody says otherwise.
      made: "when" (ISO 8601), "expires" (a date), "versions" of libraries, "platforms".
      inputs: of the program.
      outputs: of the program.
      columns: of raw rows; () where the model takes arrays alone.
      labels: the target's classes by their numbers; () for other targets.
      metrics: of the model on held-out rows, by name.
      recipe: "file", "settings", "model" (its class), "precision", "name", "run".
      step: updates that the weights have seen.
      limits: whole numbers that the inputs may hold; fields of `data.Limit`.
      meeting: the reason why a prediction depends on its batch, such as the place where
        samples meet: then rows of several people must not share one; None: it does not.
      draws: whether the model draws random numbers for each place in a batch, so that a
        batch of the recipe's size may be filled up.
      batch_size: of the recipe; where samples meet, that of a prediction.
      sizes: batch sizes that there is a program for; (): any.
      notes: what could not be had, and why.
      files: SHA-256 of each file, by its path.
      format: of the artifact.
    """

    name: str
    version: str
    made: dict[str, Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    columns: tuple[Column, ...] = ()
    labels: tuple[Any, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    limits: tuple[dict[str, Any], ...] = ()
    meeting: str | None = None
    draws: bool = False
    batch_size: int = 1
    sizes: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def signature(self) -> dict[str, Any]:
        """Inputs, outputs and columns as plain data."""
        whole = asdict(self)
        return {name: whole[name] for name in ("inputs", "outputs", "columns")}

    @property
    def expires(self) -> date:
        """The day after which a later JAX may refuse to open the program."""
        return date.fromisoformat(self.made["expires"])

    def expiry(self) -> str:
        """Return with what the program opens, and until when, as a sentence."""
        made_with = self.made["versions"].get(
            "jax",
            "an unknown version",
        )
        return (
            f"made with jax {made_with} on {self.made['when'][:10]}; it opens with"
            f" that version at any time, and with later ones until"
            f" {self.expires.isoformat()} at least. With an older one, or later,"
            " export it again from the checkpoint and the recipe: lepton export RUN"
        )

    def to_json(self) -> str:
        """Return the manifest as text for `from_json`."""
        return (
            json.dumps(
                asdict(self),
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Return the manifest that `to_json` wrote.

        Raises:
          ValueError, KeyError, TypeError: the text is no manifest.
        """
        content = json.loads(text)
        known = {part.name for part in fields(cls)}
        given = {name: value for name, value in content.items() if name in known}
        for name, kind in PARTS.items():
            given[name] = tuple(
                map(
                    kind.from_fields,
                    given[name],
                )
            )
        for name in ("labels", "limits", "sizes", "notes"):
            given[name] = tuple(
                given.get(
                    name,
                    (),
                )
            )
        return cls(**given)


PARTS: Mapping[str, Any] = {
    "inputs": Tensor,
    "outputs": Tensor,
    "columns": Column,
}


def made_now(platforms: tuple[str, ...]) -> dict[str, Any]:
    """Return the field `made` of an artifact that is made now.

    Args:
      platforms: that its program runs on.
    """
    now = datetime.now(UTC)
    return {
        "when": now.isoformat(timespec="seconds"),
        "expires": (now + timedelta(days=DAYS)).date().isoformat(),
        "versions": versions(),
        "platforms": list(platforms),
        "made_on": jax.default_backend(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a program depends on."""
    known = {}
    for library in LIBRARIES:
        try:
            known[library] = version(library)
        except PackageNotFoundError:
            continue
    return known
