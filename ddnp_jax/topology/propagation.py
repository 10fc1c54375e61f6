"""Propagates axes through the program of a network, to find which axes must keep the same channels.

The program is evaluated on instances of `Value`, which describe arrays, instead of on arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ddnp_jax.topology import jaxprs
from ddnp_jax.topology.axis_groups import CHANNELS, FEATURES, PIXELS, Axis, AxisGroups, free, length

PRODUCTS = ("mul", "div")
ELEMENTWISE = """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh div eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or
    pow rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor"""

RESIDUAL = "a residual addition"  # the reason why channels stay unpruned unless `trace` is told otherwise
BY_PLATFORM = "it has another form on each platform"  # the reason why no mask can be applied inside a layer

Axes = tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known about an array.

    Attributes:
      axes: Its axes.
      sources: Numbers of the layers whose activations it is computed from without another layer in between; 0 is the
        network's input. Empty if it depends only on variables and constants.
      learned: Whether it depends on the network's variables.
      leaf: Number of the leaf of the variables that it is equal to, or computed from element by element; None if there
        is no such leaf.
      zero: Whether it is the constant 0.
    """

    axes: Axes
    sources: frozenset[int] = frozenset()
    learned: bool = False
    leaf: int | None = None
    zero: bool = False


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A layer: a convolution or matrix product of an activation with something learned.

    Attributes:
      where: Name of the module that computes it.
      number: Its number among all contractions of the program.
      leaf: `Value.leaf` of the kernel.
      kernel_shape: Shape of the kernel.
      groups: Feature groups of a convolution.
      positions: Multiply-accumulates per image and kernel entry.
      inputs: Axis of the kernel's input channels; in a grouped convolution, of those of one group.
      outputs: Axis of the kernel's output channels.
      operand: Index of the operand that is the activation, 0 or 1.
      read_axis: Number of the activation's axis that is contracted; None if several are.
      read: The activation's axis that is contracted; empty if several are.
      unmaskable: The reason why the activation cannot be multiplied by a mask; None if it can.
    """

    where: str
    number: int
    leaf: int | None
    kernel_shape: tuple[int, ...]
    groups: int
    positions: int
    inputs: Axis
    outputs: Axis
    operand: int
    read_axis: int | None
    read: Axis
    unmaskable: str | None

    @property
    def depthwise(self) -> bool:
        """Whether the convolution is depthwise: every output channel depends on a single input channel."""
        return self.groups > 1 and not self.inputs


@dataclasses.dataclass(frozen=True)
class _Contracted:
    """The axes of a convolution or matrix product.

    Attributes:
      axes: Axes of the result.
      inputs: As in `Contraction`.
      outputs: As in `Contraction`.
      groups: As in `Contraction`.
      read_axis: As in `Contraction`.
    """

    axes: Axes
    inputs: Axis
    outputs: Axis
    groups: int
    read_axis: int | None


class Propagation:
    """One evaluation of a program on instances of `Value`.

    Attributes:
      groups: All axis groups.
      layers: The layers, in the order of the forward pass.
    """

    def __init__(self, batch: int, residual: bool) -> None:
        """Creates an evaluation.

        Args:
          batch: Number of images in the traced batch.
          residual: Whether channels that are added to those of other layers may be removed.
        """
        self.groups = AxisGroups()
        self.layers: list[Contraction] = []
        self._batch, self._residual = batch, residual
        self._sources = 1
        self._contractions = 0
        self._unmaskable: str | None = None

    def run(self, jaxpr: core.Jaxpr, consts: Iterable[Value], values: Iterable[Value], where: str = "") -> list[Value]:
        """Propagates `values` through a program and returns what is known about its results."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

        def read(atom: Any) -> Value:
            return self.constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            place = str(eqn.source_info.name_stack) or where
            results = self._propagate(eqn, [read(atom) for atom in eqn.invars], place)
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _propagate(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        name = eqn.primitive.name
        if (program := jaxprs.program_of(eqn)) is not None:
            own_derivative = name in jaxprs.DIFFERENTIATED
            return self._enter(program, values, where, "it is in a function with its own derivative", own_derivative)
        if (branch := jaxprs.default_branch_of(eqn)) is not None:
            return self._enter(branch, values[1:], where, BY_PLATFORM, True)
        if name in MOVES and (name != "pad" or values[1].zero):
            return [self._move(eqn, values[0], where)]
        if name in jaxprs.CONTRACTIONS:
            self._contractions += 1
            if sum(not value.sources for value in values) == 1:
                return [self._contract(eqn, values, where)]
        return OPERATIONS.get(name, Propagation._unknown)(self, eqn, values, where)

    def _enter(self, program: Any, values: list[Value], where: str, unmaskable: str, closed: bool) -> list[Value]:
        """Runs an inner program; inside a `closed` one no mask can be applied, for the reason `unmaskable`."""
        before = self._unmaskable
        self._unmaskable = before or (unmaskable if closed else None)
        jaxpr, consts = program
        results = self.run(jaxpr, [self.constant(c) for c in consts], values, where)
        self._unmaskable = before
        return results

    def constant(self, array: Any) -> Value:
        """Describes an array that is fixed in the network's code: its axes cannot be shortened."""
        shape = np.shape(array)
        axes = tuple(self.groups.new(n, "a constant array of fixed size") for n in shape)
        is_number = not jnp.issubdtype(jnp.result_type(array), jax.dtypes.prng_key)
        return Value(axes, zero=not shape and is_number and not np.any(np.asarray(array)))

    def _iota(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        axes = [free(n) for n in jaxprs.shape_of(eqn.outvars[0])]
        i = eqn.params["dimension"]
        axes[i] = self.groups.new(length(axes[i]), "a constant array of fixed size", where)
        return [Value(tuple(axes))]

    # Operations that move, copy or drop values, or add zeros. They do not mix channels, and keep zero channels zero.

    def _move(self, eqn: core.JaxprEqn, value: Value, where: str) -> Value:
        axes = MOVES[eqn.primitive.name](self, eqn, value.axes, where)
        leaf = value.leaf if eqn.primitive.name in ORDERS else None
        return dataclasses.replace(value, axes=axes, leaf=leaf)

    def _stay(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        return axes

    def _transpose(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        return tuple(axes[i] for i in eqn.params["permutation"])

    def _reshape(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        order = eqn.params["dimensions"] or range(len(axes))
        return self.groups.reshape(tuple(axes[i] for i in order), jaxprs.shape_of(eqn.outvars[0]))

    def _squeeze(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        return tuple(axis for i, axis in enumerate(axes) if i not in eqn.params["dimensions"])

    def _broadcast(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        sources = dict(zip(eqn.params["broadcast_dimensions"], axes, strict=True))
        return tuple(sources.get(i) or free(n) for i, n in enumerate(jaxprs.shape_of(eqn.outvars[0])))

    def _reverse(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        for i in eqn.params["dimensions"]:
            self.groups.keep_whole(axes[i], "its order is reversed", where)
        return axes

    def _slice(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        shape = jaxprs.shape_of(eqn.outvars[0])
        changed = [i for i, (a, b) in enumerate(zip(jaxprs.shape_of(eqn.invars[0]), shape, strict=True)) if a != b]
        return self._resize(axes, changed, shape, "a slice takes a part of it", where)

    def _pad(self, eqn: core.JaxprEqn, axes: Axes, where: str) -> Axes:
        changed = [i for i, config in enumerate(eqn.params["padding_config"]) if any(config)]
        return self._resize(axes, changed, jaxprs.shape_of(eqn.outvars[0]), "padding adds channels", where)

    def _resize(self, axes: Axes, changed: Iterable[int], shape: tuple[int, ...], kind: str, where: str) -> Axes:
        """Returns axes with new lengths for the `changed` ones; the channels on these can no longer be removed."""
        resized = list(axes)
        for i in changed:
            self.groups.keep_whole(axes[i], kind, where)
            resized[i] = self.groups.new(shape[i], kind, where, like=axes[i])
        return tuple(resized)

    # Convolutions and matrix products with parameters, or with constants.

    def _contract(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> Value:
        side = 0 if not values[0].sources else 1  # of the kernel
        x, kernel = values[1 - side], values[side]
        rule = self._convolution if eqn.primitive.name == "conv_general_dilated" else self._product
        result = rule(eqn, side, x, kernel, where)
        if not kernel.learned:  # a fixed filter, or a resizing of the image, and not a layer
            self.groups.keep_whole(result.inputs, "a product with a constant mixes its channels", where)
            self.groups.mark(result.outputs, self.groups.meanings(result.inputs))
            return Value(result.axes, x.sources, x.learned)
        self.groups.mark(result.outputs, (FEATURES,))
        read = () if result.read_axis is None else x.axes[result.read_axis]
        shape = jaxprs.shape_of(eqn.invars[side])
        self.layers.append(
            Contraction(
                where,
                self._contractions - 1,
                kernel.leaf,
                shape,
                result.groups,
                self._positions(eqn, side),
                result.inputs,
                result.outputs,
                1 - side,
                result.read_axis,
                read,
                self._unmaskable,
            )
        )
        return Value(result.axes, self._new_source(), learned=True)

    def _positions(self, eqn: core.JaxprEqn, side: int) -> int:
        """How often the kernel is applied per image."""
        x, kernel = jaxprs.shape_of(eqn.invars[1 - side]), jaxprs.shape_of(eqn.invars[side])
        outputs, numbers = jaxprs.shape_of(eqn.outvars[0]), eqn.params["dimension_numbers"]
        if eqn.primitive.name != "conv_general_dilated":
            contracted = math.prod(kernel[i] for i in numbers[0][side])
            return math.prod(outputs) * contracted // (self._batch * math.prod(kernel))
        if any(dilation > 1 for dilation in eqn.params["lhs_dilation"]):  # transposed: once per input position
            return math.prod(x) // (self._batch * x[numbers.lhs_spec[1]])
        return math.prod(outputs) // (self._batch * outputs[numbers.out_spec[1]])

    def _convolution(self, eqn: core.JaxprEqn, side: int, x: Value, kernel: Value, where: str) -> _Contracted:
        numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
        if side == 0 or eqn.params["batch_group_count"] != 1:
            raise ValueError(
                f"a convolution of {where} has its kernel as left operand or batch groups, which is not supported."
            )
        batch, features, *space = (x.axes[i] for i in numbers.lhs_spec)
        outputs, inputs, *window = (kernel.axes[i] for i in numbers.rhs_spec)
        for axis in (*space, *window):
            self.groups.keep_whole(axis, "it is a spatial axis of a convolution", where)
            self.groups.mark(axis, (PIXELS,))
        if groups == 1:
            inputs = self.groups.join(inputs, features)
        else:
            inputs, outputs = self._grouped(features, inputs, outputs, groups, where)
        axes = [self.groups.new(n, "it is a spatial axis", where) for n in jaxprs.shape_of(eqn.outvars[0])]
        for axis in axes:
            self.groups.mark(axis, (PIXELS,))
        for axis in (features, outputs):
            self.groups.mark(axis, (CHANNELS,))
        axes[numbers.out_spec[0]], axes[numbers.out_spec[1]] = batch, outputs
        return _Contracted(tuple(axes), inputs, outputs, groups, numbers.lhs_spec[1])

    def _grouped(self, features: Axis, inputs: Axis, outputs: Axis, groups: int, where: str) -> tuple[Axis, Axis]:
        """Input and output axis of a grouped convolution; only whole groups of channels can be removed."""
        group, own = self.groups.reshape((features,), (groups, length(inputs)))
        kind = "it is inside of the groups of a grouped convolution"
        inputs = self.groups.join(inputs, own)
        multiplier = self.groups.new(length(outputs) // groups, kind, where)
        self.groups.keep_whole(inputs, kind, where)
        return inputs, self.groups.join(outputs, group + multiplier)

    def _product(self, eqn: core.JaxprEqn, side: int, x: Value, kernel: Value, where: str) -> _Contracted:
        """A matrix product with the kernel on either side."""
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
            return _Contracted(axes, kernel.axes[contracting[side][0]], rest[side][0], 1, contracting[1 - side][0])
        if kernel.learned:
            for axis in kernel.axes:
                self.groups.keep_whole(axis, "its kernel has more than an input and an output axis", where)
        return _Contracted(axes, sum((kernel.axes[i] for i in contracting[side]), ()), sum(rest[side], ()), 1, None)

    # Operations that compute new values.

    def _elementwise(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        shape = jaxprs.shape_of(eqn.outvars[0])
        axes = tuple(
            functools.reduce(self.groups.join, (v.axes[i] for v in values if v.axes and v.axes[i]), free(n))
            for i, n in enumerate(shape)
        )
        if eqn.primitive.name not in PRODUCTS:
            self._combine(values, axes, where)
        sources, leaves = _sources(values), {value.leaf for value in values if value.leaf is not None}
        leaf = leaves.pop() if len(leaves) == 1 and not sources else None
        return [Value(axes, sources, _learned(values), leaf)]

    def _combine(self, values: list[Value], axes: Axes, where: str) -> None:
        """Keeps all channels if activations of different layers are added or combined otherwise than by a product."""
        if not self._residual and len({value.sources for value in values if value.sources}) > 1:
            for axis in axes:
                self.groups.keep_whole(axis, RESIDUAL, where)

    def _reduce(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        (value,), reduced = values, eqn.params["axes"]
        of = "" if value.sources or not value.learned else " of a parameter, as in weight standardization,"
        for i in reduced:
            self.groups.keep_whole(value.axes[i], f"`{eqn.primitive.name}`{of} mixes its channels", where)
        axes = tuple(axis for i, axis in enumerate(value.axes) if i not in reduced)
        return [Value(axes, value.sources, value.learned)]

    def _window(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        params = eqn.params
        if len(eqn.outvars) != 1:
            return self._unknown(eqn, values, where)
        window = zip(params["window_dimensions"], params["window_strides"], params["padding"], strict=True)
        changed = [i for i, (size, stride, pad) in enumerate(window) if (size, stride, tuple(pad)) != (1, 1, (0, 0))]
        axes = self._resize(
            values[0].axes, changed, jaxprs.shape_of(eqn.outvars[0]), "pooling mixes its channels", where
        )
        return [Value(axes, values[0].sources, values[0].learned)]

    def _pad_value(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        return [Value(self._pad(eqn, values[0].axes, where), _sources(values), _learned(values))]

    def _gather(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        """Takes some positions of some axes; the axes that are taken whole do not change."""
        value, numbers, sizes = values[0], eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        kind = "a gather takes some of its positions"
        axes = [self.groups.new(n, kind, where) for n in jaxprs.shape_of(eqn.outvars[0])]
        for i, j in zip((i for i in range(len(sizes)) if i not in dropped), numbers.offset_dims, strict=True):
            if sizes[i] == jaxprs.shape_of(eqn.invars[0])[i]:
                axes[j] = value.axes[i]
        for axis in set(value.axes) - set(axes):
            self.groups.keep_whole(axis, kind, where)
        for axis in values[1].axes:
            self.groups.keep_whole(axis, "it says which positions a gather takes", where)
        return [Value(tuple(axes), _sources(values), _learned(values))]

    def _concatenate(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        dimension = eqn.params["dimension"]
        along = self.groups.concatenate([value.axes[dimension] for value in values])
        others = zip(*(value.axes for value in values), strict=True)
        axes = tuple(
            along if i == dimension else functools.reduce(self.groups.join, each) for i, each in enumerate(others)
        )
        self._combine(values, axes[:dimension] + axes[dimension + 1 :], where)
        return [Value(axes, _sources(values), _learned(values))]

    def _split(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        value, changed = values[0], [eqn.params["axis"]]
        return [
            dataclasses.replace(
                value, axes=self._resize(value.axes, changed, jaxprs.shape_of(part), "a split", where), leaf=None
            )
            for part in eqn.outvars
        ]

    def _barrier(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        return values

    def _unknown(self, eqn: core.JaxprEqn, values: list[Value], where: str) -> list[Value]:
        name = eqn.primitive.name
        if jaxprs.holds_contractions(eqn):
            raise ValueError(f"the layers inside `{name}` ({where}) cannot be counted; unroll this loop or branch.")
        kind = f"the operation `{name}`, which the tracer does not know"
        if name in jaxprs.CONTRACTIONS:
            kind = f"`{name}` of two activations or of two parameters"
        for axis in (axis for value in values for axis in value.axes):
            self.groups.keep_whole(axis, kind, where)
        sources = self._new_source() if _sources(values) else frozenset()
        learned = _learned(values)
        return [Value(self._unknown_axes(eqn, values, out, kind, where), sources, learned) for out in eqn.outvars]

    def _unknown_axes(self, eqn: core.JaxprEqn, values: list[Value], out: Any, kind: str, where: str) -> Axes:
        """New axes with the meanings of those of all operands of the same shape, as for a sort or a cumulative sum."""
        shape = jaxprs.shape_of(out)
        alike = [value.axes for value, atom in zip(values, eqn.invars, strict=True) if jaxprs.shape_of(atom) == shape]
        return tuple(
            self.groups.new(n, kind, where, like=sum((axes[i] for axes in alike), ())) for i, n in enumerate(shape)
        )

    def _new_source(self) -> frozenset[int]:
        self._sources += 1
        return frozenset((self._sources,))


def _sources(values: list[Value]) -> frozenset[int]:
    return frozenset().union(*(value.sources for value in values))


def _learned(values: list[Value]) -> bool:
    return any(value.learned for value in values)


Rule = Callable[[Propagation, core.JaxprEqn, list[Value], str], list[Value]]

# Operations whose result has the axes of the first operand, in another arrangement.
MOVES: dict[str, Callable[[Propagation, core.JaxprEqn, Axes, str], Axes]] = {
    "broadcast_in_dim": Propagation._broadcast,
    "convert_element_type": Propagation._stay,
    "copy": Propagation._stay,
    "copy_p": Propagation._stay,
    "name": Propagation._stay,
    "pad": Propagation._pad,
    "reduce_precision": Propagation._stay,
    "reshape": Propagation._reshape,
    "rev": Propagation._reverse,
    "sharding_constraint": Propagation._stay,
    "slice": Propagation._slice,
    "squeeze": Propagation._squeeze,
    "stop_gradient": Propagation._stay,
    "transpose": Propagation._transpose,
}
# Operations after which a kernel still counts as the same leaf of the variables.
ORDERS = ("convert_element_type", "copy", "copy_p", "name", "reduce_precision", "rev", "transpose")
OPERATIONS: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE.split(), Propagation._elementwise),
    "argmax": Propagation._reduce,
    "argmin": Propagation._reduce,
    "concatenate": Propagation._concatenate,
    "gather": Propagation._gather,
    "iota": Propagation._iota,
    "optimization_barrier": Propagation._barrier,
    "pad": Propagation._pad_value,
    "reduce_and": Propagation._reduce,
    "reduce_max": Propagation._reduce,
    "reduce_min": Propagation._reduce,
    "reduce_or": Propagation._reduce,
    "reduce_prod": Propagation._reduce,
    "reduce_sum": Propagation._reduce,
    "reduce_window": Propagation._window,
    "reduce_window_max": Propagation._window,
    "reduce_window_min": Propagation._window,
    "reduce_window_sum": Propagation._window,
    "split": Propagation._split,
}
