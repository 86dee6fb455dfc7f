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

from lepton_jax.errors import RecipeError, SettingError, nearest, pointing_at_user
from lepton_jax.recipe import Recipe

ARGS = re.compile(r"\n\s*Args:\s*\n(.*?)(?:\n\s*\n|\Z)", re.DOTALL)


def load(path: Path) -> Callable[..., Recipe]:
    """The function `recipe` of a recipe file.

    Raises:
      RecipeError: no such file, it does not import, or has no function `recipe` of
        keyword settings.
    """
    if not path.is_file():
        siblings = (
            [p.name for p in path.parent.glob("[!_]*.py")]
            if path.parent.is_dir()
            else []
        )
        raise RecipeError(
            f"there is no recipe file {str(path)!r}{nearest(path.name, siblings)}",
            where=path.parent.resolve(),
            remedy="name a Python file with a function `recipe`",
        )
    spec = importlib.util.spec_from_file_location(f"lepton_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(
            f"{path.name} is no Python file",
            where=path,
            remedy="name a file that ends in .py",
        )
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickling of classes defined in the file look it up there
    sys.modules[spec.name] = module
    with pointing_at_user(
        f"importing {path.name}", "mend the recipe file", where=path, kind=RecipeError
    ):
        spec.loader.exec_module(module)
    function = getattr(module, "recipe", None)
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        functions = [
            name for name, value in vars(module).items() if inspect.isfunction(value)
        ]
        fault = (
            f"the file has no function `recipe`{nearest('recipe', functions)}"
            if function is None
            else f"`recipe` is {function!r}, not a plain function"
        )
        raise RecipeError(
            fault,
            where=path,
            remedy="write `def recipe(setting: type = default, ...) -> Recipe:` in it",
        )
    for name, parameter in inspect.signature(function).parameters.items():
        fault = (
            "has no name of its own"
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            else (
                "can't be given by name"
                if parameter.kind is parameter.POSITIONAL_ONLY
                else "has no default"
                if parameter.default is parameter.empty
                else ""
            )
        )
        if fault:
            raise RecipeError(
                f"the setting `{str(parameter).partition(':')[0]}` {fault}",
                where=place(function),
                remedy=(
                    "give every setting of the recipe a name, a type and a default:"
                    f" {name}: int = 1"
                ),
            )
    return function


def call(function: Callable[..., Recipe], settings: dict[str, Any]) -> Recipe:
    """The recipe for these settings.

    Raises:
      LeptonError: what the recipe raises, or its own error at its own line.
    """
    with pointing_at_user(
        "the recipe",
        "mend the recipe or its settings",
        where=place(function),
        kind=RecipeError,
    ):
        recipe = function(**settings)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"recipe() returned a {type(recipe).__name__}",
            where=place(function),
            remedy="return a lepton_jax.Recipe",
        )
    return recipe


def place(function: Callable) -> str:
    """File and line of a function."""
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def story(function: Callable) -> str:
    """The docstring without its `Args:` section."""
    return ARGS.sub("", inspect.getdoc(function) or "").strip()


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are SettingErrors, and to which --batch_size
    is --batch-size.
    """

    def parse_known_args(
        self,
        args: Any = None,
        namespace: Any = None,
    ) -> Any:
        hyphens = lambda match: match[0].replace("_", "-")
        return super().parse_known_args(
            [re.sub(r"^--[^=]*", hyphens, arg) for arg in args or ()], namespace
        )

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument (--[\w-]+)\S*: (.*)", message, re.DOTALL)
        if not match:
            raise SettingError(
                message, where="command line", remedy=f"see {self.prog} --help"
            )
        flag, fault = match.groups()
        if fault.startswith("ignored explicit argument"):
            raise SettingError(
                f"{flag} takes no value",
                where=f"command line, {flag}",
                remedy=f"write {flag} or --no-{flag.removeprefix('--')}",
            )
        raise SettingError(
            f"{flag}: {fault}",
            where=f"command line, {flag}",
            remedy=f"correct the value; RECIPE.py --help says what {flag} takes",
        )


def add(parser: argparse.ArgumentParser, function: Callable[..., Recipe]) -> None:
    """Add an option for each of the recipe's settings, by its annotation, default and
    docstring.

    Raises:
      RecipeError: an annotation that no command line can express, or a name that the
        launcher has taken.
    """
    file = place(function)
    with pointing_at_user(
        "reading the annotations of recipe()",
        "import what they name at the top of the file",
        where=file,
        kind=RecipeError,
    ):
        hints = get_type_hints(function)
    group = parser.add_argument_group(
        f"settings of {Path(function.__code__.co_filename).name}"
    )
    described = descriptions(function)
    for name, parameter in inspect.signature(function).parameters.items():
        flag = f"--{name.replace('_', '-')}"
        kind, optional, choices = _kind(
            hints.get(name, type(parameter.default)),
            name,
            file,
        )
        negated = [f"--no-{flag.removeprefix('--')}"] if kind is bool else []
        taken = [
            each for each in [flag, *negated] if each in parser._option_string_actions
        ]
        if taken:
            raise RecipeError(
                f"the setting {name!r} would be {taken[0]}, which is an option already",
                where=file,
                remedy="give the setting another name",
            )
        text = (
            (described.get(name, "") + f" (default: {parameter.default})")
            .strip()
            .replace("%", "%%")
        )
        options: dict[str, Any] = {
            "dest": f"setting:{name}",
            "default": argparse.SUPPRESS,
            "help": text,
        }
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            group.add_argument(
                flag,
                type=reader(kind, optional, choices),
                metavar=(choices and "{" + ",".join(map(str, choices)) + "}")
                or kind.__name__.upper(),
                **options,
            )


def parse(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    names: list[str],
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The launcher's options, and the settings that were given.

    Raises:
      SettingError: an unknown option, with the nearest known; an ill-typed value.
    """
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [
            flag for flag in parser._option_string_actions if flag.startswith("--")
        ]
        name = unknown[0].partition("=")[0]
        raise SettingError(
            f"{name!r} is not known{nearest(name, known)}",
            where="command line",
            remedy=(
                "the settings are"
                f" {', '.join('--' + n.replace('_', '-') for n in names) or 'none'};"
                f" see {parser.prog} --help"
            ),
        )
    settings = {
        k.removeprefix("setting:"): v
        for k, v in vars(options).items()
        if k.startswith("setting:")
    }
    return options, settings


def descriptions(function: Callable) -> dict[str, str]:
    """Setting to its text, from the docstring's `Args:` section."""
    section = ARGS.search(inspect.getdoc(function) or "")
    found = {}
    name = None
    for line in section[1].splitlines() if section else []:
        match = re.match(r"\s*(\w+): (.*)", line)
        if match:
            name = match[1]
            found[name] = match[2].strip()
        elif name:
            found[name] += " " + line.strip()
    return found


def _kind(
    hint: Any,
    name: str,
    file: Any,
) -> tuple[type, bool, tuple | None]:
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        optional = len(inner) < len(get_args(hint))
        hint = inner[0] if len(inner) == 1 else hint
    choices = get_args(hint) if get_origin(hint) is Literal else None
    kind = type(choices[0]) if choices else hint
    if kind not in (int, float, str, bool, Path):
        fault = (
            "has no annotation"
            if hint is type(None)
            else f"is annotated {hint!r}, which a command line can't express"
        )
        raise RecipeError(
            f"the setting {name!r} {fault}",
            where=file,
            remedy=(
                "annotate it as int, float, str, bool, Path, a Literal, or one of these"
                " | None"
            ),
        )
    return kind, optional, choices


def reader(
    kind: type,
    optional: bool = False,
    choices: tuple | None = None,
) -> Callable[[str], Any]:
    """A setting's text to its value; argparse.ArgumentTypeError says what is wrong with
    the text.
    """

    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        for choice in choices or ():
            if text == str(choice):
                return choice
        try:
            value = kind(text)
        except ValueError:
            article = {int: "a whole number", float: "a number"}.get(
                kind, kind.__name__
            )
            raise argparse.ArgumentTypeError(f"{text!r} is not {article}") from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one of {', '.join(map(str, choices))}"
                f"{nearest(text, map(str, choices))}"
            )
        return value

    return read


def yes_or_no(text: str) -> bool:
    """The bool that JSON kept."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "True"
