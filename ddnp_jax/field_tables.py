"""All fields of a configuration with their defaults and meanings, as Markdown: `docs/fields.md`."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from ddnp_jax import methods
from ddnp_jax.config import Config

_INTRODUCTION = """\
# Fields of a configuration

On the command line of an experiment, the field `p` of the section `budget` is set by `--config.budget.p=0.4`. In
Python, a section is a class of `ddnp_jax.config`, and the fields of a method are arguments of `SearchConfig.of` and of
`prune`. These are the defaults of the library; the configurations in `configs/` set others. `python -m ddnp_jax fields`
prints this page.
"""
_ENTRY = re.compile(r"  (\w+): (.*)")  # further lines of an entry have a larger indent


def page() -> str:
    """Returns all fields as one page of Markdown."""
    config = Config()
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    nested = {name: value for name, value in sections.items() if dataclasses.is_dataclass(value)}
    parts = [_INTRODUCTION, _section("The configuration itself", config, leave_out=tuple(nested))]
    parts += [_section(f"`{name}`", value, leave_out=("fields",)) for name, value in nested.items()]
    parts += [_section(f"`search`, {_named(names)}", methods.find(names[0]).fields()) for names in _alike()]
    return "\n".join(parts)


def _alike() -> list[list[str]]:
    """The names of the methods, grouped by what their fields and defaults are."""
    groups: dict[Any, list[str]] = {}
    for name in methods.METHODS:
        groups.setdefault(str(methods.find(name).fields()), []).append(name)
    return list(groups.values())


def _named(names: list[str]) -> str:
    return ("method " if len(names) == 1 else "methods ") + ", ".join(f"`{name}`" for name in names)


def _section(title: str, values: Any, leave_out: tuple[str, ...] = ()) -> str:
    rows = [f"| `{name}` | `{default!r}` | {meaning} |" for name, default, meaning in _rows(values, leave_out)]
    return "\n".join([f"## {title}", "", "| field | default | |", "|---|---|---|", *rows, ""])


def _rows(values: Any, leave_out: tuple[str, ...]) -> Iterator[tuple[str, Any, str]]:
    """(name, default, meaning) of every field; those of an optimizer one by one."""
    meanings = _meanings(type(values))
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if field.name in leave_out:
            continue
        if not dataclasses.is_dataclass(value):
            yield field.name, value, meanings[field.name]
            continue
        for name, default, meaning in _rows(value, ()):
            yield f"{field.name}.{name}", default, f"{meanings[field.name]} {meaning}"


def _meanings(kind: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say of each attribute."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        name = ""
        for line in inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")[2].splitlines():
            if entry := _ENTRY.match(line):
                name, found[entry[1]] = entry[1], entry[2]
            elif name:
                found[name] += " " + line.strip()
    return found
