"""A recipe's signature as a command line."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from lepton_jax.errors import RecipeError, SettingError, nearest
from lepton_jax.module import pointing_at_user
from lepton_jax.recipe import Recipe


def load(path: Path) -> Callable[..., Recipe]:
    """The function `recipe` of a recipe file.

    Raises:
      RecipeError: no such file, it does not import, or has no function `recipe` of keyword settings.
    """
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise RecipeError(f"there is no recipe file {str(path)!r}{nearest(path.name, siblings)}", where=path.parent.resolve(),
                          remedy="name a Python file with a function `recipe`")
    spec = importlib.util.spec_from_file_location(f"lepton_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path.name} is no Python file", where=path, remedy="name a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling of classes defined in the file look it up there
    try:
        with pointing_at_user(f"importing {path.name}", "mend the recipe file"):
            spec.loader.exec_module(module)
    except SyntaxError as error:  # pragma: no cover - an Exception, turned into a ModelError above
        raise RecipeError(str(error), where=path, remedy="mend the recipe file") from error
    function = getattr(module, "recipe", None)
    if not inspect.isfunction(function):
        raise RecipeError("the file has no function `recipe`", where=path,
                          remedy="write `def recipe(setting: type = default, ...) -> Recipe:` in it")
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise RecipeError(f"the setting {name!r} has no default", where=f"{path}: recipe()",
                              remedy="give every setting of the recipe a type and a default")
    return function


def call(function: Callable[..., Recipe], settings: dict[str, Any]) -> Recipe:
    """The recipe for these settings.

    Raises:
      LeptonError: what the recipe raises, or its own error at its own line.
    """
    with pointing_at_user("the recipe", "mend the recipe or its settings"):
        recipe = function(**settings)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe() returned a {type(recipe).__name__}", where=inspect.getsourcefile(function),
                          remedy="return a lepton_jax.Recipe")
    return recipe


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are SettingErrors."""

    def error(self, message: str) -> NoReturn:
        raise SettingError(message, where="command line", remedy=f"see {self.prog} --help")


def add(parser: argparse.ArgumentParser, function: Callable[..., Recipe]) -> None:
    """Add an option for each of the recipe's settings, by its annotation, default and docstring.

    Raises:
      RecipeError: an annotation that no command line can express, or a name that the launcher has taken.
    """
    file = inspect.getsourcefile(function)
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise RecipeError(f"an annotation of recipe() can't be resolved: {error}", where=file,
                          remedy="import the name at the top of the file") from error
    group = parser.add_argument_group(f"settings of {Path(str(file)).name}")
    described = descriptions(function)
    for name, parameter in inspect.signature(function).parameters.items():
        flags = list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))
        if any(flag in parser._option_string_actions for flag in flags):
            raise RecipeError(f"the setting {name!r} has the name of one of the launcher's options", where=file,
                              remedy="give the setting another name")
        kind, optional, choices = _kind(hints.get(name, type(parameter.default)), name, file)
        text = (described.get(name, "") + f" (default: {parameter.default})").strip().replace("%", "%%")
        options: dict[str, Any] = {"dest": f"setting:{name}", "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
        else:
            group.add_argument(*flags, type=_reader(kind, optional, choices), metavar=(choices and
                               "{" + ",".join(map(str, choices)) + "}") or kind.__name__.upper(), **options)


def parse(parser: argparse.ArgumentParser, arguments: list[str], names: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The launcher's options, and the settings that were given.

    Raises:
      SettingError: an unknown option, with the nearest known; an ill-typed value.
    """
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        name = unknown[0].partition("=")[0]
        raise SettingError(f"{name!r} is not known{nearest(name, known)}", where="command line",
                           remedy=f"the settings are {', '.join('--' + n.replace('_', '-') for n in names) or 'none'}; "
                                  f"see {parser.prog} --help")
    settings = {k.removeprefix("setting:"): v for k, v in vars(options).items() if k.startswith("setting:")}
    return options, settings


def descriptions(function: Callable) -> dict[str, str]:
    """Setting to its text, from the docstring's `Args:` section."""
    section = re.search(r"\n\s*Args:\s*\n(.*?)(?:\n\s*\n|\Z)", inspect.getdoc(function) or "", re.DOTALL)
    found, name = {}, None
    for line in section[1].splitlines() if section else []:
        match = re.match(r"\s*(\w+): (.*)", line)
        if match:
            name = match[1]
            found[name] = match[2].strip()
        elif name:
            found[name] += " " + line.strip()
    return found


def _kind(hint: Any, name: str, file: Any) -> tuple[type, bool, tuple | None]:
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        optional = len(inner) < len(get_args(hint))
        hint = inner[0] if len(inner) == 1 else hint
    choices = get_args(hint) if get_origin(hint) is Literal else None
    kind = type(choices[0]) if choices else hint
    if kind not in (int, float, str, bool, Path):
        raise RecipeError(f"the setting {name!r} is annotated {hint!r}, which a command line can't express", where=file,
                          remedy="annotate it as int, float, str, bool, Path, a Literal, or one of these | None")
    return kind, optional, choices


def _reader(kind: type, optional: bool, choices: tuple | None) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        try:
            value = kind(text)
        except ValueError:
            article = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
            raise argparse.ArgumentTypeError(f"{text!r} is not {article}") from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, choices))}"
                                             f"{nearest(text, map(str, choices))}")
        return value

    return read
