"""Groups of axes that must keep the same channels: a union-find whose groups can be divided.

A reshape divides a group into factors, a product in row-major order; a concatenation makes a group of segments, one
behind the other. Both may be nested.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Factor(NamedTuple):
    """A part of an axis.

    Attributes:
      group: Group that it belongs to.
      size: Length.
    """

    group: int
    size: int


class Constant(NamedTuple):
    """A part of an axis along which the value is the same, because it was broadcast.

    Attributes:
      size: Length.
    """

    size: int


Part = Factor | Constant
# The parts in row-major order: an axis of length 1 has none, a flattened (H, W, C) has three.
Axis = tuple[Part, ...]


class Span(NamedTuple):
    """Where the channels of a group are on an axis: c at start + o * stride + c * inner + i, for all o and i.

    Attributes:
      start: Position of the first one.
      outer: Number of o.
      stride: Distance of two o.
      inner: Number of i, the neighbouring positions of one channel.
    """

    start: int = 0
    outer: int = 1
    stride: int = 0
    inner: int = 1

    def positions(self, channels: int) -> np.ndarray:
        """Positions on the axis, (channels, outer * inner)."""
        grid = np.add.outer(np.arange(self.outer) * self.stride, np.arange(self.inner)).reshape(-1)
        return self.start + np.add.outer(np.arange(channels) * self.inner, grid)

    def within(self, start: int, outer: int, stride: int, inner: int) -> Iterator["Span"]:
        """The spans on a larger axis, in which this one's axis begins at `start`, `outer` times, `inner` as coarse."""
        nested = Span(start + self.start * inner, self.outer, self.stride * inner, self.inner * inner)
        if outer == 1:
            yield nested
        elif nested.outer == 1:
            yield nested._replace(outer=outer, stride=stride)
        else:
            for i in range(outer):
                yield nested._replace(start=nested.start + i * stride)


WHOLE_AXIS = Span()  # the channels and nothing else

# What is known about the meaning of a group. Channels that a reshape divides may become pixels (pixel shuffling): they
# become features, whose meaning is what is found out about them later, and else channels.
PIXELS, CHANNELS, FEATURES = "pixels", "channels", "features"


def free(size: int) -> Axis:
    """An axis along which the value is the same, so that it goes with any group."""
    return (Constant(size),) if size > 1 else ()


def length(axis: Axis) -> int:
    """Length of an axis."""
    return math.prod(factor.size for factor in axis)


class AxisGroups:
    """The groups of one network, and the reasons why some of them stay whole."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._factors: dict[int, Axis] = {}
        self._segments: dict[int, tuple[Axis, ...]] = {}
        self._reasons: dict[int, dict[str, str]] = {}  # group -> kind of reason -> where it was first met
        self._meanings: dict[int, set[str]] = {}

    def new(self, size: int, kind: str | None = None, where: str = "", like: Axis = ()) -> Axis:
        """An axis in a group of its own with the meaning of `like`; it stays whole when a `kind` of reason is given."""
        if size == 1:
            return ()
        axis = (self._new_group(size),)
        if kind is not None:
            self.keep_whole(axis, kind, where)
        self.mark(axis, self.meanings(like))
        return axis

    def factors(self, axis: Axis) -> Axis:
        """The axis in terms of the groups as they are known now."""
        known: list[Part] = []
        for part in axis:
            if isinstance(part, Constant):
                known.append(part)
                continue
            root = self._root(part.group)
            known += self.factors(self._factors[root]) if root in self._factors else [Factor(root, part.size)]
        return tuple(known)

    def places(self, axis: Axis) -> Iterator[tuple[Factor, Span]]:
        """Every group on an axis that is not divided itself, and where it is; parts that are constant are left out."""
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
        """Groups on an axis that nothing speaks against pruning, each once."""
        return list(dict.fromkeys(part for part, _ in self.places(axis) if not self.reasons(part.group)))

    def is_product(self, axis: Axis) -> bool:
        """Whether two or more factors of the axis could be pruned."""
        return sum(bool(self.live((factor,))) for factor in self.factors(axis)) > 1

    def keep_whole(self, axis: Axis, kind: str, where: str = "") -> None:
        """Notes why no channel of the axis' groups can be removed."""
        for part, _ in self.places(axis):
            self._reasons.setdefault(part.group, {}).setdefault(kind, where)

    def reasons(self, group: int) -> dict[str, str]:
        """Why a group stays whole (kind -> where); empty if nothing speaks against pruning it."""
        return self._reasons.get(self._root(group), {})

    def mark(self, axis: Axis, meanings: Iterable[str]) -> None:
        """Notes what the axis' groups are: `PIXELS`, `CHANNELS` or `FEATURES`."""
        noted = frozenset(meanings)
        for part, _ in self.places(axis):
            self._meanings.setdefault(part.group, set()).update(noted)

    def meanings(self, axis: Axis) -> frozenset[str]:
        """Everything that was noted of the axis' groups."""
        return frozenset().union(*(self._meanings.get(part.group, ()) for part, _ in self.places(axis)))

    def flattened(self, axis: Axis) -> Iterator[tuple[int, tuple[tuple[int, bool | None], ...]]]:
        """Where an axis has both pixels and channels: (start, parts in row-major order).

        A part is (length, whether it is pixels; None if that is not known); neighbours of one kind are one part.
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
        """An axis of the given ones, one behind the other."""
        if all(isinstance(part, Constant) for axis in axes for part in self.factors(axis)):
            return free(sum(map(length, axes)))
        whole = self._new_group(sum(map(length, axes)))
        self._segments[whole.group] = tuple(axes)
        return (whole,)

    def join(self, left: Axis, right: Axis) -> Axis:
        """Makes two axes of one length keep the same channels, dividing groups where their factors differ."""
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
        """Axes of a row-major reshape."""
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
        """Axes of a reshape that no factors can describe."""
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
        """Divides a part into (size, rest), and its whole group with it."""
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
        """(size, rest) of a concatenation: every segment is divided into units of `rest` channels."""
        if any(length(segment) % rest for segment in segments):
            kind = "a reshape divides it otherwise than its concatenation"
            for segment in segments:
                self.keep_whole(segment, kind)
            mixed = sum(segments, ())
            return self.new(size, kind, like=mixed) + self.new(rest, kind, like=mixed)
        divided = [self.reshape((segment,), (length(segment) // rest, rest)) for segment in segments]
        heads, tails = zip(*divided, strict=True)
        tail = functools.reduce(self.join, tails)
        if len(tail) > 1:  # a factor has one group
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
        """Joins two concatenations segment by segment; their boundaries must be the same."""
        pairs = [self._flat_segments(factor.group) for factor in (a, b)]
        boundaries = [list(itertools.accumulate(map(length, segments))) for segments in pairs]
        if boundaries[0] == boundaries[1]:
            self._segments[a.group] = tuple(itertools.starmap(self.join, zip(*pairs, strict=True)))
        else:
            for factor in (a, b):
                self.keep_whole((factor,), "two concatenations with other boundaries meet")
        del self._segments[b.group]

    def _flat_segments(self, group: int) -> list[Axis]:
        """The segments of a group, those of nested concatenations too."""
        flat: list[Axis] = []
        for segment in self._segments[group]:
            factors = self.factors(segment)
            only = factors[0] if len(factors) == 1 else None
            if isinstance(only, Factor) and only.group in self._segments:
                flat += self._flat_segments(only.group)
            else:
                flat.append(factors)
        return flat
