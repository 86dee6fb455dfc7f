"""A configuration whose keys are taken one by one; what nobody took is an error.

Example: a family takes the keys that it knows, and a misspelt one is left over.

>>> keys = Keys({"hidden_size": 64, "rms_norm_epz": 1e-6}, "config.json")
>>> keys.count("hidden_size")
64
>>> keys.number("rms_norm_eps", 1e-6)
1e-06
>>> keys.left()
['rms_norm_epz']
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lepton_jax.errors import ModelError, nearest

REQUIRED = object()  # in place of a default


class Keys:
    """The keys of a configuration, or of a dict in it.

    Args:
      content: the configuration.
      where: the file, for messages.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        where: object,
    ):
        self.content = content
        self.where = where
        self._taken: set[str] = set()

    def take(
        self,
        name: str,
        default: Any = REQUIRED,
    ) -> Any:
        """Return a value, which may be null.

        Raises:
          ModelError: it is needed and is not there.
        """
        self._taken.add(name)
        if name in self.content:
            return self.content[name]
        if default is REQUIRED:
            raise self.fault(
                f"there is no {name}{nearest(name, self.left())}",
                f"add {name}, as the model was trained with it",
            )
        return default

    def count(
        self,
        name: str,
        default: Any = REQUIRED,
    ) -> int:
        """Return a whole number from 1 on; null is the default."""
        value = self._or_default(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fault(
                f"{name} is {value!r}",
                "a whole number from 1 on is needed",
            )
        return value

    def number(
        self,
        name: str,
        default: Any = REQUIRED,
    ) -> float:
        """Return a number above 0; null is the default."""
        value = self._or_default(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < float("inf"):
            raise self.fault(f"{name} is {value!r}", "a number above 0 is needed")
        return float(value)

    def flag(
        self,
        name: str,
        default: bool,
    ) -> bool:
        """Return a boolean; null is the default."""
        value = self._or_default(name, default)
        if not isinstance(value, bool):
            raise self.fault(f"{name} is {value!r}", "true or false is needed")
        return value

    def word(
        self,
        name: str,
        default: str,
        known: Collection[str],
    ) -> str:
        """Return one of the known words; null is the default."""
        value = self._or_default(name, default)
        if value not in known:
            hint = nearest(str(value), known)
            raise self.fault(
                f"{name} is {value!r}{hint}",
                f"this reads {', '.join(sorted(known))}",
            )
        return value

    def optional(self, name: str, default: float | None) -> float | None:
        """Return a number above 0, or None for null."""
        if self.take(name, default) is None:
            return None
        return self.number(name, default)

    def must_be(
        self,
        name: str,
        *values: Any,
    ) -> None:
        """Check that a key, if it is there, has one of the values that are read."""
        value = self.take(name, values[0])
        if value not in values:
            raise self.fault(
                f"{name} is {value!r}",
                f"this reads models where it is {values[0]!r}",
            )

    def pass_over(self, names: Iterable[str]) -> None:
        """Take keys that say nothing about what the model computes."""
        self._taken.update(names)

    def left(self) -> list[str]:
        """Return the keys that nobody has taken."""
        return [name for name in self.content if name not in self._taken]

    def known(self) -> list[str]:
        """Return the keys that somebody has asked for."""
        return sorted(self._taken)

    def fault(
        self,
        what: str,
        remedy: str,
    ) -> ModelError:
        """Return an error that names the file."""
        return ModelError(what, where=self.where, remedy=remedy)

    def _or_default(self, name: str, default: Any) -> Any:
        value = self.take(name, default)
        return default if value is None and default is not REQUIRED else value
