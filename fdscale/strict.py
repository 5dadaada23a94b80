"""Plain data, as YAML gives it, into frozen dataclasses; whatever does not fit is an error that says what to do."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any

import yaml

from fdscale import UserError


def option(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] | None = None,
    neutral: bool = False,
) -> Any:
    """A documented dataclass field with bounds (inclusive; for tuples they hold for each element)."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices, "neutral": neutral}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


MOST_VALUES = 100_000  # in one YAML text, aliases unfolded


class StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys silently; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Plain data from YAML. Raises ValueError, also for aliases that would unfold without end."""
    try:
        tree = yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    left = [tree]
    for _ in range(MOST_VALUES):
        if not left:
            return tree
        value = left.pop()
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    raise ValueError(f"more than {MOST_VALUES} values")


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" where one of the names is close, else nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    return typing.get_type_hints(kind)


def section(kind: type, tree: Any, prefix: str, where: str) -> Any:
    """A dataclass from a mapping. prefix: dotted path so far, with its dot; where: file or option, for messages."""
    if not isinstance(tree, dict):
        raise UserError(
            f"{where}: {prefix.rstrip('.') or 'the recipe'} must be a mapping of keys to values, got {_show(tree)}"
        )
    hints, values = hints_of(kind), {}
    for key, value in tree.items():
        if key not in hints:
            raise UserError(
                f"{where}: unknown key {prefix}{key}{nearest(str(key), hints)}; known here: {', '.join(hints)}"
            )
        values[key] = value_of(kind, key, hints[key], value, prefix, where)
    return kind(**values)


def value_of(kind: type, key: str, hint: Any, value: Any, prefix: str, where: str) -> Any:
    """One field's value, converted to its type and checked against its bounds."""
    if dataclasses.is_dataclass(hint):
        return section(typing.cast(type, hint), value, f"{prefix}{key}.", where)
    named = typing.get_args(hint)[-1] if typing.get_origin(hint) is dict else None
    if dataclasses.is_dataclass(named):  # sections by name
        if not isinstance(value, dict):
            raise UserError(f"{where}: {prefix}{key} must be a mapping of names to sections, got {_show(value)}")
        of = typing.cast(type, named)
        return {name: section(of, tree, f"{prefix}{key}.{name}.", where) for name, tree in value.items()}
    metadata = next(f.metadata for f in dataclasses.fields(kind) if f.name == key)
    converted, ok = _convert(value, hint)
    if not ok:
        raise UserError(f"{where}: {prefix}{key} must be {_expected(hint)} ({metadata['doc']}), got {_show(value)}")
    _check_bounds(converted, metadata, f"{where}: {prefix}{key}")
    return converted


def _convert(value: Any, hint: Any) -> tuple[Any, bool]:
    """The value as the hinted type, and whether that was possible.

    YAML reads 1e-3 as text, so numeric text is a number.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for one in args:
            converted, ok = _convert(value, one)
            if ok:
                return converted, True
        return value, False
    if hint is type(None):
        return None, value is None
    if origin is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else [value] if args[-1] is Ellipsis else None
        if items is None or (args[-1] is not Ellipsis and len(items) != len(args)) or not items:
            return value, False
        pairs = [_convert(item, args[0]) for item in items]
        return tuple(item for item, _ in pairs), all(ok for _, ok in pairs)
    if origin is dict:
        return value, isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if hint is float:
        try:
            return float(value), isinstance(value, (int, float, str)) and not isinstance(value, bool)
        except (TypeError, ValueError, OverflowError):
            return value, False
    return value, type(value) is hint


def _check_bounds(value: Any, metadata: Mapping[str, Any], where: str) -> None:
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    for item in value if isinstance(value, tuple) else (value,):
        if choices is not None and item not in choices:
            raise UserError(
                f"{where} must be one of {', '.join(str(c) for c in choices if c is not None)}, got "
                f"{_show(item)}{nearest(str(item), map(str, choices))}"
            )
        if isinstance(item, float) and math.isinf(item):
            raise UserError(f"{where} must be finite, got {item} ({metadata['doc']})")
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            # NaN compares false with everything, so the test is written as "not inside".
            if low is not None and not item >= low:
                raise UserError(f"{where} must be at least {low:g}, got {item} ({metadata['doc']})")
            if high is not None and not item <= high:
                raise UserError(f"{where} must be at most {high:g}, got {item} ({metadata['doc']})")


def _expected(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(one) for one in args)
    if origin is tuple:
        inner = _expected(args[0]).split(" ", 1)[-1]
        return f"a list of {inner}s" if args[-1] is Ellipsis else f"a list of {len(args)} {inner}s"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, "a mapping")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
