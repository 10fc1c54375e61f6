"""Groups of axes that must keep the same channels: a union-find structure whose groups can be divided.

A reshape divides a group into factors, whose product in row-major order it is. A concatenation creates a group from
consecutive segments. Both may be nested.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Factor(NamedTuple):
    """A factor of an axis.

    Attributes:
      group: Group that the factor belongs to.
      size: Length.
    """

    group: int
    size: int


class Constant(NamedTuple):
    """A factor of an axis along which the array is constant, because it was broadcast.

    Attributes:
      size: Length.
    """

    size: int


Part = Factor | Constant
# The factors in row-major order: an axis of length 1 has none, a flattened (H, W, C) has three.
Axis = tuple[Part, ...]


class Span(NamedTuple):
    """Positions of a group's channels on an axis.

    Channel c is at start + o * stride + c * inner + i, for all o in 0..outer - 1 and all i in 0..inner - 1.

    Attributes:
      start: Position of the first channel.
      outer: Number of repetitions of the channels.
      stride: Distance between two repetitions.
      inner: Number of adjacent positions per channel.
    """

    start: int = 0
    outer: int = 1
    stride: int = 0
    inner: int = 1

    def positions(self, channels: int) -> np.ndarray:
        """Positions of every channel on the axis, (channels, outer * inner)."""
        grid = np.add.outer(np.arange(self.outer) * self.stride, np.arange(self.inner)).reshape(-1)
        return self.start + np.add.outer(np.arange(channels) * self.inner, grid)

    def within(self, start: int, outer: int, stride: int, inner: int) -> Iterator["Span"]:
        """Spans of the same channels on a larger axis that contains this axis.

        Args:
          start: Position at which this axis begins on the larger one.
          outer: How often this axis is repeated.
          stride: Distance between two repetitions.
          inner: Number of adjacent positions of the larger axis per position of this axis.
        """
        nested = Span(start + self.start * inner, self.outer, self.stride * inner, self.inner * inner)
        if outer == 1:
            yield nested
        elif nested.outer == 1:
            yield nested._replace(outer=outer, stride=stride)
        else:
            for i in range(outer):
                yield nested._replace(start=nested.start + i * stride)


WHOLE_AXIS = Span()  # the axis holds only the channels, one position each

# What is known about the meaning of a group. When a reshape divides channels, some of them may become pixels (pixel
# shuffling). The divided channels are therefore marked as features: they count as pixels if they are marked so later,
# and as channels otherwise.
PIXELS, CHANNELS, FEATURES = "pixels", "channels", "features"


def free(size: int) -> Axis:
    """An axis along which the array is constant, so that it can be joined with any group."""
    return (Constant(size),) if size > 1 else ()


def length(axis: Axis) -> int:
    """Length of an axis."""
    return math.prod(factor.size for factor in axis)


class AxisGroups:
    """The groups of one network, and the reasons why the channels of some of them cannot be removed."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._factors: dict[int, Axis] = {}
        self._segments: dict[int, tuple[Axis, ...]] = {}
        self._reasons: dict[int, dict[str, str]] = {}  # group -> kind of reason -> where it was first met
        self._meanings: dict[int, set[str]] = {}

    def new(self, size: int, kind: str | None = None, where: str = "", like: Axis = ()) -> Axis:
        """Creates an axis with a new group.

        Args:
          size: Length of the axis.
          kind: The reason why its channels cannot be removed; None if they can.
          where: Name of the module in which the reason occurs.
          like: Axis whose meanings the new axis takes over.
        """
        if size == 1:
            return ()
        axis = (self._new_group(size),)
        if kind is not None:
            self.keep_whole(axis, kind, where)
        self.mark(axis, self.meanings(like))
        return axis

    def factors(self, axis: Axis) -> Axis:
        """The factors of the axis after all divisions and unions of groups so far."""
        known: list[Part] = []
        for part in axis:
            if isinstance(part, Constant):
                known.append(part)
                continue
            root = self._root(part.group)
            known += self.factors(self._factors[root]) if root in self._factors else [Factor(root, part.size)]
        return tuple(known)

    def places(self, axis: Axis) -> Iterator[tuple[Factor, Span]]:
        """Yields every undivided group on an axis with its span; constant factors are left out."""
        factors = self.factors(axis)
        for i, factor in enumerate(factors):
            if isinstance(factor, Constant):
                continue
            outer, inner = length(factors[:i]), length(factors[i + 1 :])
            stride = factor.size * inner
            start = 0
            for segment in self._segments.get(factor.group, ()):
                for part, span in self.places(segment):
                    for nested in span.within(start * inner, outer, stride, inner):
                        yield part, nested
                start += length(segment)
            if factor.group not in self._segments:
                yield factor, Span(0, outer, stride if outer > 1 else 0, inner)

    def live(self, axis: Axis) -> list[Factor]:
        """Groups on an axis that can be pruned as far as is known, each once."""
        return list(dict.fromkeys(part for part, _ in self.places(axis) if not self.reasons(part.group)))

    def is_product(self, axis: Axis) -> bool:
        """Whether two or more factors of the axis could be pruned."""
        return sum(bool(self.live((factor,))) for factor in self.factors(axis)) > 1

    def keep_whole(self, axis: Axis, kind: str, where: str = "") -> None:
        """Records why no channel of the axis' groups can be removed."""
        for part, _ in self.places(axis):
            self._reasons.setdefault(part.group, {}).setdefault(kind, where)

    def reasons(self, group: int) -> dict[str, str]:
        """Reasons why the channels of a group cannot be removed (kind -> where); empty if they can."""
        return self._reasons.get(self._root(group), {})

    def mark(self, axis: Axis, meanings: Iterable[str]) -> None:
        """Records meanings of the axis' groups: `PIXELS`, `CHANNELS` or `FEATURES`."""
        noted = frozenset(meanings)
        for part, _ in self.places(axis):
            self._meanings.setdefault(part.group, set()).update(noted)

    def meanings(self, axis: Axis) -> frozenset[str]:
        """All meanings that were recorded for the axis' groups."""
        return frozenset().union(*(self._meanings.get(part.group, ()) for part, _ in self.places(axis)))

    def flattened(self, axis: Axis) -> Iterator[tuple[int, tuple[tuple[int, bool | None], ...]]]:
        """Yields the places where an axis holds both pixels and channels: (start, parts in row-major order).

        A part is (length, whether it is pixels; None if unknown). Adjacent factors of the same kind form one part.
        """
        factors = self.factors(axis)
        only = factors[0] if len(factors) == 1 else None
        if isinstance(only, Factor):
            start = 0
            for segment in self._segments.get(only.group, ()):
                for inner, parts in self.flattened(segment):
                    yield start + inner, parts
                start += length(segment)
            return
        kinds = itertools.groupby(factors, lambda factor: self._is_pixels((factor,)))
        parts = tuple((length(tuple(group)), kind) for kind, group in kinds)
        if len(parts) > 1:
            yield 0, parts

    def _is_pixels(self, axis: Axis) -> bool | None:
        meanings = self.meanings(axis)
        if PIXELS in meanings:
            return None if CHANNELS in meanings else True
        return False if meanings else None

    def concatenate(self, axes: Sequence[Axis]) -> Axis:
        """Concatenates axes to one axis."""
        if all(isinstance(part, Constant) for axis in axes for part in self.factors(axis)):
            return free(sum(map(length, axes)))
        whole = self._new_group(sum(map(length, axes)))
        self._segments[whole.group] = tuple(axes)
        return (whole,)

    def join(self, left: Axis, right: Axis) -> Axis:
        """Unites the groups of two axes of equal length, dividing groups if the axes' factors differ."""
        if length(left) != length(right):
            raise AssertionError(f"axes of {length(left)} and {length(right)} channels were joined")
        joined: list[Part] = []
        lefts, rights = list(reversed(left)), list(reversed(right))
        while lefts:
            a, b = self._pop(lefts), self._pop(rights)
            size = min(a.size, b.size)
            if a.size % size or b.size % size:
                rest = (*joined, a, b, *lefts, *rights)
                self.keep_whole(rest, "its channels are divided in two ways")
                return self.new(length(left), "its channels are divided in two ways", like=rest)
            (a, *a_rest), (b, *b_rest) = self._divide(a, size), self._divide(b, size)
            lefts += a_rest
            rights += b_rest
            joined.append(self._merge(a, b))
        return tuple(joined)

    def reshape(self, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> tuple[Axis, ...]:
        """Returns the axes of an array after a row-major reshape."""
        rest = [factor for axis in reversed(axes) for factor in reversed(axis)]
        reshaped = []
        for size in shape:
            axis: list[Part] = []
            missing = size
            while missing > 1:
                factor = self._pop(rest)
                part = min(missing, factor.size)
                if missing % part or factor.size % part:
                    return self._mixed(axes, shape)
                head, *tail = self._divide(factor, part)
                rest += tail
                axis.append(head)
                missing //= part
            reshaped.append(tuple(axis))
        return tuple(reshaped)

    def _mixed(self, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> tuple[Axis, ...]:
        """Returns the axes after a reshape that factors cannot describe; none of their channels can be removed."""
        kind = "a reshape mixes its channels with another axis"
        for old in axes:
            self.keep_whole(old, kind)
        return tuple(self.new(n, kind, like=sum(axes, ())) for n in shape)

    def _new_group(self, size: int) -> Factor:
        self._parent.append(len(self._parent))
        return Factor(self._parent[-1], size)

    def _root(self, group: int) -> int:
        while self._parent[group] != group:
            self._parent[group] = group = self._parent[self._parent[group]]
        return group

    def _pop(self, stack: list[Part]) -> Part:
        first, *others = self.factors((stack.pop(),))
        stack.extend(reversed(others))
        return first

    def _divide(self, factor: Part, size: int) -> Axis:
        """Divides a factor, and with it its group, into two factors of lengths `size` and `factor.size // size`."""
        if factor.size == size:
            return (factor,)
        rest = factor.size // size
        if isinstance(factor, Constant):
            return Constant(size), Constant(rest)
        if factor.group in self._segments:
            parts = self._divide_segments(self._segments.pop(factor.group), size, rest)
        else:
            parts = self.new(size) + self.new(rest)
            for kind, where in self.reasons(factor.group).items():
                self.keep_whole(parts, kind, where)
            weaker = {CHANNELS: FEATURES}
            self.mark(parts, (weaker.get(each, each) for each in self.meanings((factor,))))
        self._factors[factor.group] = parts
        return parts

    def _divide_segments(self, segments: tuple[Axis, ...], size: int, rest: int) -> Axis:
        """Divides a concatenation into (size, rest): every segment is divided into units of `rest` channels."""
        if any(length(segment) % rest for segment in segments):
            kind = "a reshape divides it across the boundaries of its concatenation"
            for segment in segments:
                self.keep_whole(segment, kind)
            mixed = sum(segments, ())
            return self.new(size, kind, like=mixed) + self.new(rest, kind, like=mixed)
        divided = [self.reshape((segment,), (length(segment) // rest, rest)) for segment in segments]
        heads, tails = zip(*divided, strict=True)
        tail = functools.reduce(self.join, tails)
        if len(tail) > 1:  # a single factor is required, but it has several groups
            self.keep_whole(tail, "a reshape divides it twice")
            tail = self.new(rest, "a reshape divides it twice", like=tail)
        return self.concatenate(heads) + tail

    def _merge(self, a: Part, b: Part) -> Part:
        if isinstance(a, Constant):
            return b
        if isinstance(b, Constant):
            return a
        if a.group == b.group:
            return a
        if b.group in self._segments and a.group not in self._segments:
            a, b = b, a
        if b.group in self._segments:
            self._merge_segments(a, b)
        else:
            for kind, where in self._reasons.pop(b.group, {}).items():
                self.keep_whole((a,), kind, where)
            self.mark((a,), self._meanings.pop(b.group, ()))
        self._parent[b.group] = a.group
        return a

    def _merge_segments(self, a: Factor, b: Factor) -> None:
        """Joins two concatenations segment by segment; if their boundaries differ, no channel can be removed."""
        pairs = [self._flat_segments(factor.group) for factor in (a, b)]
        boundaries = [list(itertools.accumulate(map(length, segments))) for segments in pairs]
        if boundaries[0] == boundaries[1]:
            self._segments[a.group] = tuple(itertools.starmap(self.join, zip(*pairs, strict=True)))
        else:
            for factor in (a, b):
                self.keep_whole((factor,), "it joins two concatenations with different boundaries")
        del self._segments[b.group]

    def _flat_segments(self, group: int) -> list[Axis]:
        """The segments of a group, with nested concatenations replaced by their own segments."""
        flat: list[Axis] = []
        for segment in self._segments[group]:
            factors = self.factors(segment)
            only = factors[0] if len(factors) == 1 else None
            if isinstance(only, Factor) and only.group in self._segments:
                flat += self._flat_segments(only.group)
            else:
                flat.append(factors)
        return flat
