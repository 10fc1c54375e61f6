"""Groups of axes that must keep the same channels: a union-find whose groups can be divided by reshapes."""

import math
from typing import NamedTuple


class Factor(NamedTuple):
    """A part of an axis, in row-major order with the axis' other parts.

    Attributes:
      group: the group that it belongs to, or None where the value is the same all along it (it was broadcast).
      size: its length.
    """

    group: int | None
    size: int


Axis = tuple[Factor, ...]  # an axis of length 1 has no factors, a flattened (H, W, C) has three


def free(size: int) -> Axis:
    """An axis along which the value is the same, so that it goes with any group."""
    return (Factor(None, size),) if size > 1 else ()


def length(axis: Axis) -> int:
    """Length of an axis."""
    return math.prod(factor.size for factor in axis)


class AxisGroups:
    """The groups of one network, and the reasons why some of them stay whole."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._parts: dict[int, Axis] = {}
        self._reasons: dict[int, dict[str, str]] = {}  # group -> kind of reason -> where it was first met

    def new(self, size: int, kind: str | None = None, where: str = "") -> Axis:
        """An axis in a group of its own, which stays whole when a `kind` of reason is given."""
        if size == 1:
            return ()
        self._parent.append(len(self._parent))
        axis = (Factor(self._parent[-1], size),)
        if kind is not None:
            self.keep_whole(axis, kind, where)
        return axis

    def factors(self, axis: Axis) -> Axis:
        """The axis in terms of the groups as they are known now."""
        known: list[Factor] = []
        for factor in axis:
            root = factor.group if factor.group is None else self._root(factor.group)
            known += self.factors(self._parts[root]) if root in self._parts else [Factor(root, factor.size)]
        return tuple(known)

    def keep_whole(self, axis: Axis, kind: str, where: str = "") -> None:
        """Notes why no channel of the axis' groups can be removed."""
        for factor in self.factors(axis):
            if factor.group is not None:
                self._reasons.setdefault(factor.group, {}).setdefault(kind, where)

    def reasons(self, group: int) -> dict[str, str]:
        """Why a group stays whole (kind -> where); empty if nothing speaks against pruning it."""
        return self._reasons.get(self._root(group), {})

    def join(self, left: Axis, right: Axis) -> Axis:
        """Makes two axes of one length keep the same channels, dividing groups where their factors differ."""
        if length(left) != length(right):
            raise AssertionError(f"axes of {length(left)} and {length(right)} channels were joined")
        joined: list[Factor] = []
        lefts, rights = list(reversed(left)), list(reversed(right))
        while lefts:
            a, b = self._pop(lefts), self._pop(rights)
            size = min(a.size, b.size)
            if a.size % size or b.size % size:
                rest = (*joined, a, b, *lefts, *rights)
                self.keep_whole(rest, "its channels are divided in two ways")
                return self.new(length(left), "its channels are divided in two ways")
            (a, *a_rest), (b, *b_rest) = self._split(a, size), self._split(b, size)
            lefts += a_rest
            rights += b_rest
            joined.append(self._merge(a, b))
        return tuple(joined)

    def reshape(self, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> tuple[Axis, ...]:
        """Axes of a row-major reshape."""
        rest = [factor for axis in reversed(axes) for factor in reversed(axis)]
        reshaped = []
        for size in shape:
            axis: list[Factor] = []
            missing = size
            while missing > 1:
                factor = self._pop(rest)
                part = min(missing, factor.size)
                if missing % part or factor.size % part:
                    for old in axes:
                        self.keep_whole(old, "a reshape mixes its channels with another axis")
                    return tuple(self.new(n, "a reshape mixes its channels with another axis") for n in shape)
                head, *tail = self._split(factor, part)
                rest += tail
                axis.append(head)
                missing //= part
            reshaped.append(tuple(axis))
        return tuple(reshaped)

    def _root(self, group: int) -> int:
        while self._parent[group] != group:
            self._parent[group] = group = self._parent[self._parent[group]]
        return group

    def _pop(self, stack: list[Factor]) -> Factor:
        first, *others = self.factors((stack.pop(),))
        stack.extend(reversed(others))
        return first

    def _split(self, factor: Factor, size: int) -> Axis:
        """Divides a factor into (size, rest), and its whole group with it."""
        if factor.size == size:
            return (factor,)
        if factor.group is None:
            return Factor(None, size), Factor(None, factor.size // size)
        parts = self.new(size) + self.new(factor.size // size)
        for kind, where in self.reasons(factor.group).items():
            self.keep_whole(parts, kind, where)
        self._parts[factor.group] = parts
        return parts

    def _merge(self, a: Factor, b: Factor) -> Factor:
        if a.group is None or b.group is None:
            return b if a.group is None else a
        if a.group != b.group:
            self._parent[b.group] = a.group
            for kind, where in self._reasons.pop(b.group, {}).items():
                self._reasons.setdefault(a.group, {}).setdefault(kind, where)
        return a
