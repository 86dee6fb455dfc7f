"""A recipe's signature as a command line.

The keyword arguments of the function `recipe` are its settings, their annotations the
types, their defaults the defaults, and the section `Args:` of the docstring the help:
`def recipe(width: int = 32)` becomes `--width INT`. The same holds for the function
`preparation` of a specification of prepared data.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from lepton_jax.errors import (
    LeptonError,
    RecipeError,
    SettingError,
    nearest,
    pointing_at_user,
)
from lepton_jax.launch.options import reader
from lepton_jax.recipe import Recipe

ARGS = re.compile(r"\n\s*Args:\s*\n(.*?)(?:\n\s*\n|\Z)", re.DOTALL)


# ---- the recipe ----


def load(path: Path, name: str = "recipe") -> Callable[..., Any]:
    """Return the function `recipe` of a recipe file.

    Args:
      path: the file.
      name: of the function: "recipe", or "preparation".

    Raises:
      RecipeError: there is no such file, it does not import, or it has no function of
        this name with keyword settings.
    """
    module = _module(path, name)
    function = getattr(module, name, None)
    if function is None:
        members = vars(module).items()
        names = [key for key, value in members if inspect.isfunction(value)]
        hint = nearest(name, names)
        raise _no_function(path, name, f"the file has no function `{name}`{hint}")
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        fault = f"`{name}` is {function!r}, not a plain function"
        raise _no_function(path, name, fault)
    for parameter in inspect.signature(function).parameters.values():
        _check_setting(parameter, function)
    return function


def _module(path: Path, name: str) -> types.ModuleType:
    """Import the file of a function."""
    if not path.is_file():
        siblings = (
            [p.name for p in path.parent.glob("[!_]*.py")]
            if path.parent.is_dir()
            else []
        )
        raise RecipeError(
            f"there is no {name} file {str(path)!r}{nearest(path.name, siblings)}",
            where=path.parent.resolve(),
            remedy=f"name a Python file with a function `{name}`",
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
        f"importing {path.name}", f"fix the {name} file", where=path, kind=RecipeError
    ):
        spec.loader.exec_module(module)
    return module


def _no_function(path: Path, name: str, fault: str) -> RecipeError:
    kind = name.capitalize()
    return RecipeError(
        fault,
        where=path,
        remedy=f"write `def {name}(setting: type = default, ...) -> {kind}:` in it",
    )


def _check_setting(parameter: inspect.Parameter, function: Callable) -> None:
    """Raise RecipeError if a command line can't give a value to the parameter."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        fault = "has no name of its own"
    elif parameter.kind is parameter.POSITIONAL_ONLY:
        fault = "can't be given by name"
    elif parameter.default is parameter.empty:
        fault = "has no default"
    else:
        return
    raise RecipeError(
        f"the setting `{str(parameter).partition(':')[0]}` {fault}",
        where=place(function),
        remedy=(
            "give every setting of the recipe a name, a type and a default:"
            f" {parameter.name}: int = 1"
        ),
    )


def call(function: Callable[..., Recipe], settings: dict[str, Any]) -> Recipe:
    """Return the recipe for these settings.

    Raises:
      LeptonError: the recipe raised it, or failed with an error at its own line.
    """
    with pointing_at_user(
        "the recipe",
        "fix the recipe or its settings",
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
    """Return "file:line" of a function."""
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def story(function: Callable) -> str:
    """Return the docstring without its `Args:` section."""
    return ARGS.sub("", inspect.getdoc(function) or "").strip()


def descriptions(function: Callable) -> dict[str, str]:
    """Return the text for each setting in the docstring's `Args:` section."""
    section = ARGS.search(inspect.getdoc(function) or "")
    if section is None:
        return {}

    texts: dict[str, str] = {}
    name = None
    for line in section[1].splitlines():
        match = re.match(r"\s*(\w+): (.*)", line)
        if match:
            name = match[1]
            texts[name] = match[2].strip()
        elif name:
            texts[name] += " " + line.strip()
    return texts


# ---- its command line ----


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises SettingErrors.

    It takes --batch_size as --batch-size.
    """

    def parse_known_args(
        self,
        args: Any = None,
        namespace: Any = None,
    ) -> Any:
        """Parse what is known, with hyphens for underscores in names of options."""
        words = [re.sub(r"^--[^=]*", _hyphenated, word) for word in args or ()]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a SettingError.

        argparse gives nothing but a text, so that the text tells what is wrong.
        """
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


def typed(arguments: list[str] | None) -> list[str]:
    """Return a command's arguments; None: those that the process was started with."""
    if arguments is None:
        return sys.argv[1:]
    return arguments


def _hyphenated(match: re.Match) -> str:
    return match[0].replace("_", "-")


def program(command: str) -> str:
    """Return the words by which a person has started a command.

    They are `lepton launch`, `python -m lepton_jax launch` or, for tools/launch.py and
    where nothing is known, `launch.py`.
    """
    script = Path(sys.argv[0])
    if script.name == "lepton":
        return f"lepton {command}"
    if script.parts[-2:] == ("lepton_jax", "__main__.py"):
        return f"python -m lepton_jax {command}"
    return f"{command}.py"


def add(parser: argparse.ArgumentParser, function: Callable[..., Recipe]) -> None:
    """Add an option to a parser for each setting of a recipe.

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

    recipe_name = Path(function.__code__.co_filename).name
    group = parser.add_argument_group(f"settings of {recipe_name}")
    texts = descriptions(function)
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        hint = hints.get(name, type(default))
        kind, optional, choices = _kind(hint, name, file)
        _check_free(parser, name, kind, file)

        text = f"{texts.get(name, '')} (default: {default})".strip()
        options: dict[str, Any] = {
            "dest": f"setting:{name}",
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = reader(kind, optional, choices)
            options["metavar"] = kind.__name__.upper()
            if choices:
                options["metavar"] = "{" + ",".join(map(str, choices)) + "}"
        group.add_argument(_flag(name), **options)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_free(
    parser: argparse.ArgumentParser, name: str, kind: type, file: str
) -> None:
    """Raise RecipeError if the launcher has an option of this name already."""
    flags = [_flag(name)]
    if kind is bool:
        flags.append(f"--no-{_flag(name).removeprefix('--')}")
    for flag in flags:
        if flag in parser._option_string_actions:
            raise RecipeError(
                f"the setting {name!r} would be {flag}, which is an option already",
                where=file,
                remedy="give the setting another name",
            )


def _kind(
    hint: Any,
    name: str,
    file: Any,
) -> tuple[type, bool, tuple | None]:
    """Return the type of a setting, whether it may be None, and its choices."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        inner = [kind for kind in get_args(hint) if kind is not type(None)]
        optional = len(inner) < len(get_args(hint))
        hint = inner[0] if len(inner) == 1 else hint

    choices = get_args(hint) if get_origin(hint) is Literal else None
    kind = type(choices[0]) if choices else hint
    if kind in (int, float, str, bool, Path):
        return kind, optional, choices

    fault = f"is annotated {hint!r}, which a command line can't express"
    if hint is type(None):
        fault = "has no annotation"
    raise RecipeError(
        f"the setting {name!r} {fault}",
        where=file,
        remedy=(
            "annotate it as int, float, str, bool, Path, a Literal, or one of these"
            " | None"
        ),
    )


def parse(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    names: list[str],
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the launcher's options, and the settings that were given.

    Args:
      parser: with options for all settings, see `add`.
      arguments: of the command line.
      names: of all settings.

    Raises:
      SettingError: an unknown option, with the nearest known; an ill-typed value.
    """
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for flag in parser._option_string_actions if flag[:2] == "--"]
        name = unknown[0].partition("=")[0]
        settings = ", ".join(_flag(name) for name in names)
        raise SettingError(
            f"{name!r} is not known{nearest(name, flags)}",
            where="command line",
            remedy=(f"the settings are {settings or 'none'}; see {parser.prog} --help"),
        )
    prefix = "setting:"
    given = {
        key.removeprefix(prefix): value
        for key, value in vars(options).items()
        if key.startswith(prefix)
    }
    return options, given


def yes_or_no(text: str) -> bool:
    """Return the bool that JSON has kept as a text."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "True"


def print_failure(error: LeptonError, **status: Any) -> None:
    """Print an error as one JSON object, for --json.

    Args:
      error: the error.
      status: fields that say that the command has failed; they come first.
    """
    fields = {
        "error": error.what,
        "where": error.where,
        "remedy": error.remedy,
    }
    print(json.dumps(status | fields))
