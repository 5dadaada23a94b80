"""What the options of several verbs have in common. Nothing heavy is imported."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fdscale import UserError
from fdscale.signals import INTERRUPTED

RAW = argparse.RawDescriptionHelpFormatter
MOST = 1e12  # of a size or of seconds: more than anybody has, and in bytes still a number


def verb(group: argparse._SubParsersAction, name: str, target: str, text: str, example: str) -> argparse.ArgumentParser:
    """A verb that runs `target` (module:function, imported when it runs)."""
    description = text[0].upper() + text[1:] + "."
    epilog = f"example:\n  {example}"
    sub = group.add_parser(name, help=text, description=description, epilog=epilog, formatter_class=RAW)
    sub.set_defaults(target=target)
    return sub


def settings(sub: argparse.ArgumentParser) -> None:
    """--set."""
    setting = "override a key of the recipe, for example optim.lr=2e-4"
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)


def recipe(sub: argparse.ArgumentParser) -> None:
    """A recipe, and --set."""
    sub.add_argument("recipe", help="name of a shipped recipe (see `fdscale recipes`) or a YAML file")
    settings(sub)


def exit_code(work: Callable[[], object]) -> int:
    """Do the work of a `python -m fdscale.…`; where it fails, a line says why. Returns the process's exit code."""
    try:
        work()
    except UserError as error:
        print(f"fdscale: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fdscale: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def only_with(arguments: dict[str, Any]) -> None:
    """Fill in what a verb's `only_with` names, (option, {options of it: their defaults}). Raises UserError where one of
    them is given, and the option they belong to is not."""
    option, defaults = arguments.pop("only_with", ("", {}))
    for name, default in defaults.items():
        if arguments[name] is None:
            arguments[name] = default
        elif arguments[option] is None:
            raise UserError(f"--{name} is of --{option}, which is not given: give both, or leave --{name} out")


def whole(low: int) -> Callable[[str], int]:
    """A whole number of at least `low`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {low}")
        return value

    return number


def positive(text: str) -> float:
    """A size or a time: above 0, and finite in any unit."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0 and at most {MOST:g}")
    return value


def new_file(text: str) -> Path:
    """A file that can be written once there is something to write: asked for before an hour is spent on it."""
    path = Path(text)
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: expected a file in a directory that exists")
    return path
