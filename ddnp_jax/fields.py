"""Self-validating dataclasses: fields have a type (the annotation) and limits (next to the default).

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Trainer:
        epochs: int = number(10, least=1)
        schedule: str = choice("step", "step", "cosine")

    trainer = filled(Trainer(), {"epochs": 20}, "base.")
    check_limits(trainer, "base.")

`several` holds any of some names. `filled` raises for unknown names and wrong types, `check_limits` for values beyond
the limits. `built` makes a dataclass from the values of a file.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

_KEY = "allowed"  # of a field's metadata


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Limits of a number, or of every one of several."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    bits: int | None = None
    about: str = ""

    def refusal(self, value: Any) -> str:
        """What the value must be; '' where it is that."""
        several = isinstance(value, tuple)
        if all(map(self._holds, value if several else (value,))):
            return ""
        where = " in every entry" if several else ""
        return f"must be {self._range(value)}{where}" + (f": {self.about}." if self.about else ".")

    def _holds(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (self.bits is None or value < 2**self.bits)
        )

    def _range(self, value: Any) -> str:
        if self.bits is not None and value >= 2**self.bits:
            return f"below 2**{self.bits}"
        low, high = (self.least, self.above), (self.most, self.below)
        if high == (None, None):
            return f"above {self.above}" if self.least is None else f"at least {self.least}"
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        opened, closed = ("(" if self.least is None else "["), (")" if self.most is None else "]")
        return f"in {opened}{_given(low)}, {_given(high)}{closed}"


@dataclasses.dataclass(frozen=True)
class _Choices:
    """The values of a choice."""

    known: tuple[str, ...]

    def refusal(self, value: Any) -> str:
        """What the value must be; '' where it is that."""
        return "" if value in self.known else f"is unknown; use one of {', '.join(map(repr, self.known))}."


@dataclasses.dataclass(frozen=True)
class _Several:
    """Any of some names, joined by commas."""

    known: tuple[str, ...]

    def refusal(self, value: Any) -> str:
        """What the value must be; '' where it is that."""
        unknown = [name for name in listed(value) if name not in self.known]
        shown = ", ".join(map(repr, self.known))
        return f"names {unknown[0]!r}, which is unknown; join any of {shown} by commas." if unknown else ""


def listed(value: str) -> tuple[str, ...]:
    """The names in the value of a field that `several` made, each once."""
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


def advice(name: str, known: Collection[str]) -> str:
    """What to use instead of a name that is unknown: the closest of the known names, or else one of all."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}."


def _given(limits: Iterable[float | None]) -> float | None:
    return next((limit for limit in limits if limit is not None), None)


def number(
    default: T,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    bits: int | None = None,
    about: str = "",
) -> T:
    """A field that holds a number, or a tuple of numbers that all have the same limits.

    Args:
      default: Its value where none is given.
      least: The smallest value.
      above: What every value is above.
      most: The largest value.
      below: What every value is below.
      bits: How many bits a whole number must fit into.
      about: What the number is, for the message about one that it cannot be.
    """
    limits = _Limits(least, above, most, below, bits, about)
    return dataclasses.field(default=default, metadata={_KEY: limits})


def choice(default: str, *known: str) -> str:
    """A field that holds one of a few names."""
    return dataclasses.field(default=default, metadata={_KEY: _Choices(known)})


def several(*known: str) -> str:
    """A field that holds any of a few names, joined by commas; none by default. `listed` takes them apart."""
    return dataclasses.field(default="", metadata={_KEY: _Several(known)})


def names(section: Any) -> tuple[str, ...]:
    """The names of the fields of a dataclass, or of an instance."""
    return tuple(field.name for field in dataclasses.fields(section))


def check_limits(section: Any, prefix: str = "", like: type | None = None) -> None:
    """Checks that the values of a dataclass, and of nested ones, are within the limits of their fields.

    Args:
      section: An instance of a dataclass.
      prefix: What stands before a field's name in a message: "base." for the fields of the section `base`.
      like: The dataclass whose limits count; None for the section's own. Fields that it does not have are free.

    Raises:
      ValueError: The field, its value and what it may be are named.
    """
    for field in dataclasses.fields(like or section):
        if not hasattr(section, field.name):
            continue
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_limits(value, f"{name}.")
            continue
        refusal = field.metadata[_KEY].refusal(value) if _KEY in field.metadata else ""
        if refusal or not _is_finite(value):
            raise ValueError(f"{name}={value!r} {refusal or 'must be finite.'}")


def _is_finite(value: Any) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(each) for each in values if isinstance(each, float))


def filled(section: T, values: Mapping[str, Any], prefix: str = "") -> T:
    """A dataclass with other values, which must be of the types of their fields.

    Whole numbers are taken for floating-point ones, lists and arrays for tuples, and mappings for dataclasses.

    Args:
      section: An instance, which keeps what `values` does not name.
      values: Values by the names of their fields.
      prefix: As in `check_limits`.

    Raises:
      ValueError: A name is no field, or a value is not of its field's type.
    """
    kinds = _kinds(type(section))
    if unknown := [name for name in values if name not in kinds]:
        raise ValueError(f"{prefix}{unknown[0]} is not a field of the configuration; {advice(unknown[0], kinds)}")
    taken = {name: _taken(kinds[name], value, getattr(section, name), prefix + name) for name, value in values.items()}
    return dataclasses.replace(typing.cast(Any, section), **taken)


def _kinds(section: Any) -> dict[str, Any]:
    """The types of a dataclass's fields by name."""
    hints = typing.get_type_hints(section)
    return {name: hints[name] for name in names(section)}


def _taken(kind: Any, value: Any, default: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if dataclasses.is_dataclass(value):
            value = {each: getattr(value, each) for each in names(value)}
        if isinstance(value, Mapping):
            return filled(default, value, f"{name}.")
        raise ValueError(f"{name}={value!r} must be a section, with the fields {', '.join(_kinds(kind))}.")
    try:
        return _converted(kind, value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be {_described(kind)}.") from None


def built(kind: type[T], values: Any, prefix: str = "") -> T:
    """A dataclass from the values of a JSON file, and the dataclasses that it holds from the mappings there.

    Args:
      kind: The dataclass.
      values: Values by the names of its fields, without default all of them; other names are not read.
      prefix: As in `check_limits`.

    Raises:
      ValueError: A value is missing, or not of its field's type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.removesuffix('.') or 'the whole'} must be values by name")
    taken = {}
    for field in dataclasses.fields(typing.cast(Any, kind)):
        if field.name in values:
            taken[field.name] = _built_value(_kinds(kind)[field.name], values[field.name], prefix + field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{field.name} is missing")
    return kind(**taken)


def _built_value(kind: Any, value: Any, name: str) -> Any:
    if isinstance(kind, types.UnionType):  # of a type and None
        return None if value is None else _built_value(typing.get_args(kind)[0], value, name)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return built(typing.cast(type, kind), value, f"{name}.")
    if typing.get_origin(kind) is tuple and dataclasses.is_dataclass(of := typing.get_args(kind)[0]):
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list")
        return tuple(built(typing.cast(type, of), each, f"{name}[{i}].") for i, each in enumerate(value))
    try:
        converted = _converted(kind, value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be {_described(kind)}") from None
    if isinstance(converted, dict):
        return {key: _built_value(typing.get_args(kind)[1], each, f"{name}.{key}") for key, each in converted.items()}
    return converted


def _converted(kind: Any, value: Any) -> Any:
    """The value as a type of plain Python; raises TypeError where it is of another."""
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple | np.ndarray):
        return tuple(_converted(typing.get_args(kind)[0], each) for each in value)
    is_bool = isinstance(value, bool | np.bool_)
    if kind is bool and is_bool:
        return bool(value)
    if kind is int and isinstance(value, Integral) and not is_bool:
        return int(value)
    if kind is float and isinstance(value, Real) and not is_bool:
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    if typing.get_origin(kind) is Mapping and isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "texts" if typing.get_args(kind)[0] is str else "numbers"
    if typing.get_origin(kind) is Mapping:
        return "values by name"
    return {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[kind]
