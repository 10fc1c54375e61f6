"""Follows channel axes through the jaxpr of a network: which axes keep the same channels, and which layers end them."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from ddnp_jax.topology.axis_groups import Axis, AxisGroups, free, length

CALL_TAG = "ddnp_jax.call."  # checkpoint_name of a module's first argument, followed by the number of the call

CALLS = (
    "closed_call",
    "core_call",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "remat",
    "remat2",
)
PRODUCTS = ("mul", "div")
ELEMENTWISE = """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh div eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or
    pow rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor"""

Axes = tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known about an array.

    Attributes:
      axes: its axes.
      sources: numbers of the layers (0 is the network's input) whose activations flow into it, since the last layer;
        empty for what depends on parameters and constants alone.
      leaf: the leaf of the variables that it is, up to data type and layout, or None.
      calls: the module calls whose first argument it is, up to operations that move or drop values or add zeros.
      zero: whether it is the constant 0.
    """

    axes: Axes
    sources: frozenset[int] = frozenset()
    leaf: int | None = None
    calls: frozenset[int] = frozenset()
    zero: bool = False


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A convolution or matrix product of an activation with parameters.

    Attributes:
      where: the module in which it happens.
      leaf: the kernel, or None where the kernel is computed from parameters.
      kernel_shape: shape of the kernel.
      groups: feature groups of a convolution.
      positions: multiply-accumulates per image and kernel entry.
      inputs: the kernel's input channels; () for a depthwise convolution.
      outputs: the kernel's output channels.
      calls: as of `Value`, of the activation.
    """

    where: str
    leaf: int | None
    kernel_shape: tuple[int, ...]
    groups: int
    positions: int
    inputs: Axis
    outputs: Axis
    calls: frozenset[int]

    @property
    def depthwise(self) -> bool:
        """Whether every channel stays by itself, so that the layer does not end its group."""
        return self.groups > 1 and not self.inputs


class Follower:
    """Interprets a jaxpr over `Value` instead of arrays.

    Attributes:
      groups: all axis groups.
      layers: the contractions, in the order of the forward pass.
      call_inputs: axes of the first argument of each module call that was met, by the call's number.
      other_uses: calls whose first argument is read by something else than a contraction with the module's own kernel.
    """

    def __init__(self, batch: int, residual: bool, owners: list[tuple[str, ...]], calls: list[Any]) -> None:
        """Prepares.

        Args:
          batch: images in the traced batch.
          residual: whether additions of different layers' activations may be gated.
          owners: module path of each leaf of the variables.
          calls: (module path, shape of the first argument) of each module call.
        """
        self.groups = AxisGroups()
        self.layers: list[Contraction] = []
        self.call_inputs: dict[int, Axes] = {}
        self.other_uses: set[int] = set()
        self._batch, self._residual, self._owners, self._calls = batch, residual, owners, calls
        self._sources = 1

    def run(self, jaxpr: core.Jaxpr, consts: list[Value], values: list[Value], where: str = "") -> list[Value]:
        """Follows `values` through a jaxpr and returns what is known about its results."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

        def read(atom: Any) -> Value:
            return self.constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            place = str(eqn.source_info.name_stack) or where
            results = self._follow(eqn, [read(atom) for atom in eqn.invars], place)
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _follow(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        name = eqn.primitive.name
        if name in CALLS:
            closed = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
            return self._enter(closed, values, where)
        if name == "cond" and eqn.params.get("branches_platforms"):  # `platform_dependent`: all branches are the same
            return self._enter(eqn.params["branches"][-1], values[1:], where)  # function; the last is the default
        if name in MOVES and (name != "pad" or values[1].zero):
            return [self._move(eqn, values[0], where)]
        if name in CONTRACTIONS and sum(not value.sources for value in values) == 1:
            return [self._contract(eqn, values, where)]
        for value in values:
            self.other_uses |= value.calls
        return OPERATIONS.get(name, Follower._unknown)(self, eqn, values, where)

    def _enter(self, closed: Any, values: list[Value], where: str) -> list[Value]:
        inner, consts = (closed.jaxpr, closed.consts) if isinstance(closed, core.ClosedJaxpr) else (closed, ())
        return self.run(inner, [self.constant(c) for c in consts], values, where)

    def constant(self, array: Any) -> Value:
        """An array that is fixed in the network's code: its axes cannot shrink."""
        axes = tuple(self.groups.new(n, "a constant array of fixed size") for n in np.shape(array))
        return Value(axes, zero=not axes and not np.any(array))

    def _iota(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        axes = [free(n) for n in eqn.outvars[0].aval.shape]
        i = eqn.params["dimension"]
        axes[i] = self.groups.new(length(axes[i]), "a constant array of fixed size", where)
        return [Value(tuple(axes))]

    # Operations that move or drop values, or add zeros: a channel that is zero stays zero and by itself.

    def _move(self, eqn: core.JaxprEqn, value: Value, where: str) -> Value:
        axes = MOVES[eqn.primitive.name](self, eqn, value.axes, where)
        calls, tag = value.calls, str(eqn.params.get("name", ""))
        if tag.startswith(CALL_TAG):
            call = int(tag.removeprefix(CALL_TAG))
            # Under a vmap the module's argument has another shape than what the jaxpr shows.
            if self._calls[call][1] == eqn.outvars[0].aval.shape:
                self.call_inputs[call] = axes
                calls |= {call}
        leaf = value.leaf if eqn.primitive.name in ORDERS else None
        return Value(axes, value.sources, leaf, calls, value.zero)

    def _stay(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        return axes

    def _transpose(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        return tuple(axes[i] for i in eqn.params["permutation"])

    def _reshape(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        order = eqn.params["dimensions"] or range(len(axes))
        return self.groups.reshape(tuple(axes[i] for i in order), eqn.outvars[0].aval.shape)

    def _squeeze(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        return tuple(axis for i, axis in enumerate(axes) if i not in eqn.params["dimensions"])

    def _broadcast(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        sources = dict(zip(eqn.params["broadcast_dimensions"], axes, strict=True))
        return tuple(sources.get(i) or free(n) for i, n in enumerate(eqn.outvars[0].aval.shape))

    def _reverse(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        for i in eqn.params["dimensions"]:
            self.groups.keep_whole(axes[i], "its order is reversed", where)
        return axes

    def _slice(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        shape = eqn.outvars[0].aval.shape
        changed = [i for i, (a, b) in enumerate(zip(eqn.invars[0].aval.shape, shape, strict=True)) if a != b]
        return self._resize(axes, changed, shape, "a slice takes a part of it", where)

    def _pad(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        changed = [i for i, config in enumerate(eqn.params["padding_config"]) if any(config)]
        return self._resize(axes, changed, eqn.outvars[0].aval.shape, "padding adds channels", where)

    def _resize(self, axes: Axes, changed: Iterable[int], shape: tuple[int, ...], kind: str, where: str) -> Axes:
        """Axes of which the `changed` ones have new positions, which no channel axis may have."""
        resized = list(axes)
        for i in changed:
            self.groups.keep_whole(axes[i], kind, where)
            resized[i] = self.groups.new(shape[i], kind, where)
        return tuple(resized)

    # Convolutions and matrix products with parameters.

    def _contract(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> Value:
        side = 0 if not values[0].sources else 1  # of the kernel
        x, kernel = values[1 - side], values[side]
        axes, inputs, outputs, groups = CONTRACTIONS[eqn.primitive.name](self, eqn, side, x, kernel, where)
        if kernel.leaf is None:
            for axis in (inputs, outputs):
                self.groups.keep_whole(axis, "its kernel is computed, not a parameter as it is stored", where)
        shape = eqn.invars[side].aval.shape
        positions = self._positions(eqn, side)
        layer = Contraction(where, kernel.leaf, shape, groups, positions, inputs, outputs, x.calls)
        own = None if kernel.leaf is None or layer.depthwise else self._owners[kernel.leaf]
        self.other_uses |= {call for call in x.calls if self._calls[call][0] != own} | kernel.calls
        self.layers.append(layer)
        return Value(axes, self._new_source())

    def _positions(self, eqn: core.JaxprEqn, side: int) -> int:
        """Multiply-accumulates per image and kernel entry."""
        kernel, numbers = eqn.invars[side].aval.shape, eqn.params["dimension_numbers"]
        if eqn.primitive.name == "conv_general_dilated":
            summed = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        else:
            summed = math.prod(kernel[i] for i in numbers[0][side])
        return math.prod(eqn.outvars[0].aval.shape) * summed // (self._batch * math.prod(kernel))

    def _convolution(
        self, eqn: core.JaxprEqn, side: int, x: Value, kernel: Value, where: str
    ) -> tuple[Axes, Axis, Axis, int]:
        """Axes of a convolution's result, the kernel's input and output axis, and the groups."""
        numbers, groups, shape = (
            eqn.params["dimension_numbers"],
            eqn.params["feature_group_count"],
            eqn.outvars[0].aval.shape,
        )
        if side == 0 or eqn.params["batch_group_count"] != 1:
            raise ValueError(
                f"a convolution of {where} has its kernel on the left or groups in the batch; not supported."
            )
        batch, features, *space = (x.axes[i] for i in numbers.lhs_spec)
        outputs, inputs, *window = (kernel.axes[i] for i in numbers.rhs_spec)
        for axis in (*space, *window):
            self.groups.keep_whole(axis, "it is a spatial axis of a convolution", where)
        if groups == 1:
            self.groups.join(inputs, features)
        elif inputs == ():  # depthwise: input channel c makes the output channels c * multiplier + i
            multiplier = self.groups.new(length(outputs) // groups, "it is a channel multiplier", where)
            self.groups.join(outputs, features + multiplier)
        else:
            for axis in (features, inputs, outputs):
                self.groups.keep_whole(axis, "a grouped convolution", where)
        axes = [self.groups.new(n, "it is a spatial axis", where) for n in shape]
        axes[numbers.out_spec[0]], axes[numbers.out_spec[1]] = batch, outputs
        return tuple(axes), inputs, outputs, groups

    def _product(
        self, eqn: core.JaxprEqn, side: int, x: Value, kernel: Value, where: str
    ) -> tuple[Axes, Axis, Axis, int]:
        """As `_convolution`, of a matrix product with the kernel on either side."""
        contracting, batch = eqn.params["dimension_numbers"]
        for each in (contracting, batch):
            for i, j in zip(each[1 - side], each[side], strict=True):
                self.groups.join(x.axes[i], kernel.axes[j])
        rest = {
            k: tuple(axis for i, axis in enumerate(value.axes) if i not in (*contracting[k], *batch[k]))
            for k, value in ((1 - side, x), (side, kernel))
        }
        axes = tuple(x.axes[i] for i in batch[1 - side]) + rest[0] + rest[1]
        if len(kernel.axes) == 2 and len(rest[side]) == 1 and not batch[side]:
            return axes, kernel.axes[contracting[side][0]], rest[side][0], 1
        for axis in kernel.axes:
            self.groups.keep_whole(axis, "its kernel has more than an input and an output axis", where)
        return axes, sum((kernel.axes[i] for i in contracting[side]), ()), sum(rest[side], ()), 1

    # Operations that read values.

    def _elementwise(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        axes = tuple(
            functools.reduce(self.groups.join, (v.axes[i] for v in values if v.axes and v.axes[i]), free(n))
            for i, n in enumerate(eqn.outvars[0].aval.shape)
        )
        if eqn.primitive.name not in PRODUCTS:
            self._combine(values, axes, where)
        return [Value(axes, _sources(values))]

    def _combine(self, values: list[Value], axes: Axes, where: str) -> None:
        """Notes an addition, or another combination that is no product, of different layers' activations."""
        if not self._residual and len({value.sources for value in values if value.sources}) > 1:
            for axis in axes:
                self.groups.keep_whole(axis, "a residual addition", where)

    def _reduce(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        (value,), reduced = values, eqn.params["axes"]
        for i in reduced:
            self.groups.keep_whole(value.axes[i], f"`{eqn.primitive.name}` mixes its channels", where)
        return [Value(tuple(axis for i, axis in enumerate(value.axes) if i not in reduced), value.sources)]

    def _window(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        params = eqn.params
        if len(eqn.outvars) != 1:
            return self._unknown(eqn, values, where)
        window = zip(params["window_dimensions"], params["window_strides"], params["padding"], strict=True)
        changed = [i for i, (size, stride, pad) in enumerate(window) if (size, stride, tuple(pad)) != (1, 1, (0, 0))]
        axes = self._resize(values[0].axes, changed, eqn.outvars[0].aval.shape, "pooling mixes its channels", where)
        return [Value(axes, values[0].sources)]

    def _pad_value(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        return [Value(self._pad(eqn, values[0].axes, where), _sources(values))]

    def _concatenate(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        dimension, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
        parts = [self._resize(v.axes, [dimension], shape, "a concatenation", where) for v in values]
        axes = tuple(functools.reduce(self.groups.join, each) for each in zip(*parts, strict=True))
        self._combine(values, axes, where)
        return [Value(axes, _sources(values))]

    def _split(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        changed = [eqn.params["axis"]]
        return [
            Value(self._resize(values[0].axes, changed, part.aval.shape, "a split", where), values[0].sources)
            for part in eqn.outvars
        ]

    def _unknown(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        name = eqn.primitive.name
        if any(inner.primitive.name in CONTRACTIONS for inner in _equations(eqn)):
            raise ValueError(f"the layers inside `{name}` ({where}) cannot be counted; unroll this loop or branch.")
        kind = f"the operation `{name}`, which the tracer does not know"
        if name in CONTRACTIONS:
            kind = f"`{name}` of two activations or of two parameters"
        for axis in (axis for value in values for axis in value.axes):
            self.groups.keep_whole(axis, kind, where)
        sources = self._new_source() if _sources(values) else frozenset()
        return [Value(tuple(self.groups.new(n, kind, where) for n in out.aval.shape), sources) for out in eqn.outvars]

    def _new_source(self) -> frozenset[int]:
        self._sources += 1
        return frozenset((self._sources,))


def _sources(values: list[Value]) -> frozenset[int]:
    return frozenset().union(*(value.sources for value in values))


def _equations(eqn: core.JaxprEqn) -> Iterator[core.JaxprEqn]:
    """All equations inside the jaxprs that are an equation's parameters."""
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(inner):
            for each in inner.eqns:
                yield each
                yield from _equations(each)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


# Results' axes from the first operand's.
MOVES = {
    "broadcast_in_dim": Follower._broadcast,
    "convert_element_type": Follower._stay,
    "copy": Follower._stay,
    "copy_p": Follower._stay,
    "name": Follower._stay,
    "pad": Follower._pad,
    "reduce_precision": Follower._stay,
    "reshape": Follower._reshape,
    "rev": Follower._reverse,
    "sharding_constraint": Follower._stay,
    "slice": Follower._slice,
    "squeeze": Follower._squeeze,
    "stop_gradient": Follower._stay,
    "transpose": Follower._transpose,
}
ORDERS = (
    "convert_element_type",
    "copy",
    "copy_p",
    "name",
    "reduce_precision",
    "rev",
    "transpose",
)  # a kernel remains itself
CONTRACTIONS = {"conv_general_dilated": Follower._convolution, "dot_general": Follower._product}
OPERATIONS = dict.fromkeys(ELEMENTWISE.split(), Follower._elementwise) | {
    "argmax": Follower._reduce,
    "argmin": Follower._reduce,
    "concatenate": Follower._concatenate,
    "iota": Follower._iota,
    "pad": Follower._pad_value,
    "reduce_and": Follower._reduce,
    "reduce_max": Follower._reduce,
    "reduce_min": Follower._reduce,
    "reduce_or": Follower._reduce,
    "reduce_prod": Follower._reduce,
    "reduce_sum": Follower._reduce,
    "reduce_window": Follower._window,
    "reduce_window_max": Follower._window,
    "reduce_window_min": Follower._window,
    "reduce_window_sum": Follower._window,
    "split": Follower._split,
}
