"""Dataclasses whose fields say what they may be: the type by the annotation, the limits beside the default.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Trainer:
        epochs: int = number(10, least=1)
        schedule: str = choice("step", "step", "cosine")

    trainer = filled(Trainer(), {"epochs": 20}, "base.")
    check_limits(trainer, "base.")

`filled` refuses unknown names and wrong types, `check_limits` what is beyond the limits.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable, Mapping
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
    return typing.cast(T, dataclasses.field(default=default, metadata={_KEY: limits}))


def choice(default: str, *known: str) -> str:
    """A field that holds one of a few names."""
    return typing.cast(str, dataclasses.field(default=default, metadata={_KEY: _Choices(known)}))


def names(section: Any) -> tuple[str, ...]:
    """The names of the fields of a dataclass, or of an instance."""
    return tuple(field.name for field in dataclasses.fields(section))


def check_limits(section: Any, prefix: str = "", like: type | None = None) -> None:
    """Refuses values beyond the limits of their fields, in a dataclass and in those that it holds.

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
        raise ValueError(f"{prefix}{unknown[0]} is no field of the configuration; there are {', '.join(kinds)}.")
    taken = {name: _taken(kinds[name], value, getattr(section, name), prefix + name) for name, value in values.items()}
    return dataclasses.replace(typing.cast(Any, section), **taken)


@functools.cache
def _kinds(section: type) -> dict[str, Any]:
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


def _converted(kind: Any, value: Any) -> Any:
    """The value as a type of plain Python; raises TypeError where it is of another."""
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple | np.ndarray):
        return tuple(_converted(typing.get_args(kind)[0], each) for each in value)
    if kind is bool and isinstance(value, bool | np.bool_):
        return bool(value)
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    if typing.get_origin(kind) is Mapping and isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "numbers" if typing.get_args(kind)[0] is float else "texts"
    if typing.get_origin(kind) is Mapping:
        return "values by name"
    return {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[kind]
