"""Recipes as TOML files: reading them, and what the command line puts in their place."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from mambamic.errors import UsageError
from mambamic.preprocess import Preprocess
from mambamic.training.recipe import Recipe, Strengths

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).resolve().parent / "recipes"
DEFAULT = "microscopy"
_TABLES = ("augmentation", "input")
S = TypeVar("S", Recipe, Strengths, Preprocess)


def shipped() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def read_recipe(
    source: str | os.PathLike[str] = DEFAULT, changes: Mapping[str, Any] | None = None
) -> tuple[Recipe, Preprocess]:
    """Read a recipe.

    Args:
        source: The name of a shipped recipe, or a TOML file: settings of ``Recipe`` at the top,
            those of ``Strengths`` in ``[augmentation]``, those of ``Preprocess`` in ``[input]``.
            What it leaves out has the default.
        changes: Of the file's settings, by name.

    Raises:
        UsageError: There is no such recipe, or a key or a value makes no sense; names both.
    """
    path = _find(os.fspath(source))
    recipe, preprocess = _parse(path)
    given = dict(changes or {})
    strengths = _take(given, recipe.augmentation)
    recipe, preprocess = _take(given, recipe), _take(given, preprocess)
    assert not given, given
    return replace(recipe, augmentation=strengths), preprocess


def _find(source: str) -> Path:
    if source in shipped():
        return SHIPPED / f"{source}.toml"
    path = Path(source)
    if not path.is_file():
        raise UsageError(
            f"recipe {source!r}", f"one of {', '.join(shipped())}, or a TOML file", "check the name"
        )
    return path


def _parse(path: Path) -> tuple[Recipe, Preprocess]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read ({error})", "a recipe in TOML", "mend it, or name another"
        ) from error
    tables = {name: found.pop(name, {}) for name in _TABLES}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(
                f"{path}: {name} is {table!r}", f"a table, [{name}]", "write it as a table"
            )
    strengths = _build(Strengths, tables["augmentation"], path)
    recipe = replace(_build(Recipe, found, path), augmentation=strengths)
    return recipe, _build(Preprocess, tables["input"], path)


def _build(kind: type[S], table: Mapping[str, Any], path: Path) -> S:
    defaults = kind()
    known = [each.name for each in fields(kind) if each.name not in _TABLES]
    for name in table:
        if name not in known:
            raise UsageError(
                f"{path}: unknown key {name!r}", f"one of {', '.join(known)}", "correct the name"
            )
    values: dict[str, Any] = {
        name: _value(getattr(defaults, name), name, table[name], path) for name in table
    }
    try:
        return kind(**values)
    except UsageError as error:
        raise UsageError(f"{path}: {error.problem}", error.expected, error.remedy) from error


def _value(default: object, name: str, value: object, path: Path) -> object:
    """Return a value as the type that its setting has."""
    if isinstance(default, tuple):
        if isinstance(value, list) and len(value) == len(default) and all(map(_number, value)):
            return tuple(map(float, value))
        expected = f"{len(default)} numbers in brackets"
    elif isinstance(default, str):
        if isinstance(value, str):
            return value
        expected = "text in quotes"
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        expected = "a whole number"
    else:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        expected = "a number"
    raise UsageError(f"{path}: {name} is {value!r}", expected, "correct the value")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _take(given: dict[str, Any], settings: S) -> S:
    names = [each.name for each in fields(settings) if each.name in given]
    return replace(settings, **{name: given.pop(name) for name in names})
