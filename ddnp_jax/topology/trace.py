"""What can be removed from a network: `trace` finds the gates and layers of any flax.linen model by itself.

Channels belong together when elementwise operations, batch norm, pooling or depthwise convolutions connect them;
convolutions and dense layers end one group of axes and start the next. A group becomes a gate only when everything
about it is understood; all others stay whole, and `Topology.describe` says why. Not visible to the tracer is a number
that the module's code computes from its own channel count (a scale of 1 / sqrt(C), say): `compact.verify` finds that.
"""

import dataclasses
import inspect
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ddnp_jax.topology.axis_groups import Axis, Factor, length
from ddnp_jax.topology.propagate import CALL_TAG, Contraction, Follower, Value

BATCH = 2  # of the traced images; nothing depends on it

ModulePath = tuple[str, ...]
LeafPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Slice:
    """An axis of a variable that holds a gate's channels: seen as (outer, channels, inner), the middle is sliced.

    Attributes:
      path: of the leaf, with its collection first, for example ("params", "conv1", "kernel").
      axis: the axis.
      outer: leading part of the axis.
      inner: trailing part of the axis.
    """

    path: LeafPath
    axis: int
    outer: int = 1
    inner: int = 1

    def indices(self, channels: int, kept: tuple[int, ...]) -> np.ndarray:
        """Positions on the axis that stay when `kept` of the gate's `channels` do."""
        axis = np.arange(self.outer * channels * self.inner).reshape(self.outer, channels, self.inner)
        return axis[:, list(kept)].reshape(-1)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A module that ends a gate: its first argument has the gate's channels on an axis (outer, channels, inner).

    Attributes:
      path: of the module.
      axis: of the module's first argument.
      outer: leading part of the axis.
      inner: trailing part of the axis.
    """

    path: ModulePath
    axis: int
    outer: int = 1
    inner: int = 1


@dataclasses.dataclass(frozen=True)
class Gate:
    """A place in the network where channels can be removed.

    Attributes:
      name: of its first producer, for example "layer1_0/conv1".
      channels: how many there are in the whole network.
      slices: the axes of all variables that hold these channels.
      readers: the modules whose input a mask multiplies, in the order of the forward pass.
      producers: the kernels whose output channels these are, in the order of the forward pass; without depthwise
        convolutions. A channel's L1 norm is the sum over all other axes of the kernel.
    """

    name: str
    channels: int
    slices: tuple[Slice, ...]
    readers: tuple[Reader, ...]
    producers: tuple[Slice, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or dense layer, once per use in the forward pass.

    Attributes:
      name: of the module, for example "layer1_0/conv1".
      path: of the kernel; empty where the kernel is computed from several parameters.
      kernel_shape: shape of the kernel; its product times `positions` are the multiply-accumulates per image.
      groups: feature groups of a convolution, else 1.
      positions: output positions, H * W for a convolution.
      outputs: output channels.
      in_gate: gate of the kernel's input axis, or None; a depthwise kernel has no such axis.
      out_gate: gate of the kernel's output axis, or None.
    """

    name: str
    path: LeafPath
    kernel_shape: tuple[int, ...]
    groups: int
    positions: int
    outputs: int
    in_gate: int | None
    out_gate: int | None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Gates and layers of a network; static, hashable, without arrays.

    Attributes:
      input_shape: of one image, without the batch.
      call_kwargs: keyword arguments of the evaluation-mode call that was traced.
      gates: in the order in which their producers come in the forward pass.
      layers: in the order of the forward pass.
      whole: (layers that produce the channels, why none of them can be removed) of all other groups.
      variables: path and shape of every leaf.
    """

    input_shape: tuple[int, ...]
    call_kwargs: tuple[tuple[str, Any], ...]
    gates: tuple[Gate, ...]
    layers: tuple[Layer, ...]
    whole: tuple[tuple[str, str], ...]
    variables: tuple[tuple[LeafPath, tuple[int, ...]], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each gate in the whole network."""
        return tuple(gate.channels for gate in self.gates)

    def check(self, variables: Any) -> None:
        """Refuses variables of another network.

        Raises:
          ValueError: names the first leaf that is missing, extra or misshapen.
        """
        found = {path: np.shape(leaf) for path, leaf in flax.traverse_util.flatten_dict(variables).items()}
        traced = dict(self.variables)
        for path in traced | found:
            own, wanted = found.get(path), traced.get(path)  # None: absent
            if own != wanted:
                raise ValueError(f"variable {'/'.join(path)} has shape {own}; the topology was traced with {wanted}.")

    def describe(self) -> str:
        """Gates, layers, and what stays whole and why, as text."""
        lines = [f"gates: {len(self.gates)}"]
        for i, gate in enumerate(self.gates):
            readers = ", ".join("/".join(reader.path) for reader in gate.readers)
            lines.append(f"  {i}  {gate.name}: {gate.channels} channels, read by {readers}")
        lines.append(f"layers: {len(self.layers)}")
        for layer in self.layers:
            ends = {"from": layer.in_gate, "to": layer.out_gate}
            gates = "".join(f", {end} gate {gate}" for end, gate in ends.items() if gate is not None)
            lines.append(f"  {layer.name}: kernel {layer.kernel_shape}, {layer.positions} positions{gates}")
        lines.append(f"stays whole: {len(self.whole)}")
        lines += [f"  {names}: {reason}" for names, reason in self.whole]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What stays.

    Attributes:
      kept: per gate, the sorted indices of the kept channels.
    """

    kept: tuple[tuple[int, ...], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Kept channels per gate."""
        return tuple(map(len, self.kept))

    def check(self, topology: Topology) -> None:
        """Checks that the selection fits a network.

        Raises:
          ValueError: for another number of gates, or indices that are none, not whole, unsorted or out of range.
        """
        if len(self.kept) != len(topology.gates):
            raise ValueError(f"the selection has {len(self.kept)} gates, the network {len(topology.gates)}.")
        for gate, kept in zip(topology.gates, self.kept, strict=True):
            if not kept:
                raise ValueError(f"gate {gate.name}: no channel is kept; keep at least one.")
            if any(a >= b for a, b in itertools.pairwise(kept)):
                raise ValueError(f"gate {gate.name}: kept channels must be ascending and different, got {kept}.")
            if kept[0] < 0 or kept[-1] >= gate.channels:
                raise ValueError(f"gate {gate.name}: kept channels must be in 0..{gate.channels - 1}, got {kept}.")

    def masks(self, topology: Topology) -> tuple[np.ndarray, ...]:
        """Float32 arrays (C_l,), one per gate: 1 for what stays, 0 for the rest."""
        self.check(topology)
        return tuple(
            np.isin(np.arange(gate.channels), kept).astype(np.float32)
            for gate, kept in zip(topology.gates, self.kept, strict=True)
        )

    def save(self, path: str | Path) -> None:
        """Writes the selection as JSON; the file is replaced at once or not at all."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps({"kept": self.kept}))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "Selection":
        """Reads what `save` wrote.

        Raises:
          ValueError: the file does not hold a selection.
        """
        try:
            kept = json.loads(Path(path).read_text())["kept"]
            if not all(type(c) is int for gate in kept for c in gate):
                raise TypeError("a channel is no integer")
            return cls(tuple(map(tuple, kept)))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold a selection ({error!r}); it needs a list of lists 'kept'."
            ) from error


def trace(model: nn.Module, input_shape: tuple[int, ...], *, residual: bool = False, **call_kwargs: Any) -> Topology:
    """Finds what can be removed from a network, without computing anything.

    Where the model has an attribute `widths` that holds whole numbers, it says by itself which channels can be fewer:
    a group becomes a gate only if `widths` sizes it, so that every gate can be cut with `model.clone(widths=...)`.

    Args:
      model: any flax.linen module that maps one array (N, *input_shape) to outputs.
      input_shape: of one image, for example (32, 32, 3).
      residual: whether groups whose activations from different layers are added may be gates too; then all that is
        understood is a gate, sized by `widths` or not.
      **call_kwargs: of the evaluation-mode call; `train=False` is passed by itself where `__call__` takes `train`.

    Returns:
      The topology. Whatever is not fully understood stays whole and is named there.

    Raises:
      ValueError: the network has layers inside a loop or branch, whose cost cannot be counted.
    """
    kwargs = evaluation_kwargs(model, call_kwargs)
    images = jax.ShapeDtypeStruct((BATCH, *input_shape), jnp.float32)
    leaves = variable_shapes(model, images, kwargs)
    calls: list[tuple[ModulePath, tuple[int, ...]]] = []

    def tag_input(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and args and isinstance(args[0], jax.Array):
            calls.append((context.module.path, args[0].shape))
            args = (checkpoint_name(args[0], f"{CALL_TAG}{len(calls) - 1}"), *args[1:])
        return next_fun(*args, **kwargs)

    def forward(leaf_values: list[jax.Array], x: jax.Array) -> Any:
        with nn.intercept_methods(tag_input):
            return model.apply(
                flax.traverse_util.unflatten_dict(dict(zip(leaves, leaf_values, strict=True))), x, **kwargs
            )

    closed = jax.make_jaxpr(forward)(list(leaves.values()), images)
    follower = Follower(BATCH, residual, [path[1:-1] for path in leaves], calls)
    groups = follower.groups
    parameters = [Value(tuple(groups.new(n) for n in leaf.shape), leaf=i) for i, leaf in enumerate(leaves.values())]
    x = Value(tuple(groups.new(n, "it is the network's input") for n in images.shape), frozenset((0,)))
    constants = [follower.constant(array) for array in closed.consts]
    for value in follower.run(closed.jaxpr, constants, [*parameters, x]):
        for axis in value.axes:
            groups.keep_whole(axis, "it is the network's output")
    leaf_axes = {path: value.axes for path, value in zip(leaves, parameters, strict=True)}
    sized = None if residual else _sized_axes(model, leaves, images, kwargs)
    gates, layers, whole = _Assembly(follower, calls, leaf_axes, sized).result()
    shapes = tuple((path, leaf.shape) for path, leaf in leaves.items())
    return Topology(tuple(input_shape), tuple(sorted(kwargs.items())), gates, layers, whole, shapes)


def evaluation_kwargs(model: nn.Module, call_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call in evaluation mode: `train=False` is added where `__call__` takes `train`."""
    takes_train = "train" in inspect.signature(type(model).__call__).parameters
    return ({"train": False} if takes_train else {}) | call_kwargs


def variable_shapes(model: nn.Module, images: jax.ShapeDtypeStruct, kwargs: dict[str, Any]) -> dict[LeafPath, Any]:
    """Path -> shape and data type of a model's variables; nothing is computed."""
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **kwargs), images)
    return {tuple(path): leaf for path, leaf in flax.traverse_util.flatten_dict(variables).items()}


def _sized_axes(
    model: nn.Module, leaves: dict[LeafPath, Any], images: jax.ShapeDtypeStruct, kwargs: dict[str, Any]
) -> set[tuple[LeafPath, int]] | None:
    """The (path, axis) that the model's own `widths` size, or None where it has no such whole numbers."""
    widths = getattr(model, "widths", None)
    numbers = jax.tree.leaves(widths)
    if not numbers or not all(type(number) is int for number in numbers):
        return None
    try:
        doubled = variable_shapes(model.clone(widths=jax.tree.map(lambda width: 2 * width, widths)), images, kwargs)
    except Exception as error:
        error.add_note("`trace` doubled the model's `widths`, to see which channels they size.")
        raise
    return {
        (path, axis)
        for path, leaf in leaves.items()
        for axis, (size, double) in enumerate(zip(leaf.shape, doubled.get(path, leaf).shape, strict=True))
        if size != double
    }


class _Assembly:
    """Makes gates and layers of what the follower found."""

    def __init__(
        self,
        follower: Follower,
        calls: list[tuple[ModulePath, tuple[int, ...]]],
        leaf_axes: dict[LeafPath, Any],
        sized: set[tuple[LeafPath, int]] | None,
    ) -> None:
        """Prepares.

        Args:
          follower: after its run.
          calls: (module path, shape of the first argument) of each module call.
          leaf_axes: of the variables.
          sized: (path, axis) of the variables that may shrink; None for all.
        """
        self.follower, self.groups, self.calls, self.leaf_axes = follower, follower.groups, calls, leaf_axes
        self.sized = sized
        self.paths = list(leaf_axes)

    def result(self) -> tuple[tuple[Gate, ...], tuple[Layer, ...], tuple[tuple[str, str], ...]]:
        """Gates, layers, and (producers, reasons) of what stays whole."""
        self._keep_divided_whole()
        readers = self._readers()
        producers: dict[Factor, list[Contraction]] = {}
        for layer in self.follower.layers:
            for factor in () if layer.depthwise else self.groups.factors(layer.outputs):
                producers.setdefault(factor, []).append(layer)
        for factor in producers:
            if factor not in readers and self._live((factor,)):
                self.groups.keep_whole((factor,), "no layer reads it")
            if self._live((factor,)) and not self._sized(factor):
                self.groups.keep_whole((factor,), "the model's `widths` do not size it")
        prunable = [factor for factor in producers if self._live((factor,))]
        gates = tuple(self._gate(factor, producers[factor], readers[factor]) for factor in prunable)
        layers = tuple(self._layer(layer, prunable) for layer in self.follower.layers)
        whole = dict.fromkeys(
            (", ".join(dict.fromkeys(map(self._name, producers[factor]))), self._reason(factor))
            for factor in producers
            if factor not in prunable
        )
        return gates, layers, tuple(whole)

    def _live(self, axis: Axis) -> list[Factor]:
        """Factors of an axis that nothing speaks against pruning."""
        return [
            factor
            for factor in self.groups.factors(axis)
            if factor.group is not None and not self.groups.reasons(factor.group)
        ]

    def _sized(self, factor: Factor) -> bool:
        """Whether the model can be built with fewer of these channels."""
        return self.sized is None or any(
            (path, place[0]) in self.sized
            for path, axes in self.leaf_axes.items()
            for place in self._places(axes, factor)
        )

    def _keep_divided_whole(self) -> None:
        """Keeps whole what a reshape has divided at its producer, and axes that hold two gates at once."""
        for layer in self.follower.layers:
            if not layer.depthwise and len(self.groups.factors(layer.outputs)) > 1:
                for factor in self._live(layer.outputs):
                    self.groups.keep_whole((factor,), "a reshape divides its channels", self._name(layer))
        for path, axes in self.leaf_axes.items():
            for axis in axes:
                if len(self._live(axis)) > 1:
                    self.groups.keep_whole(axis, "an axis holds two kinds of channels", "/".join(path))

    def _readers(self) -> dict[Factor, dict[Reader, None]]:
        """Readers of each group, in order; groups of which a reader cannot be masked are kept whole."""
        readers: dict[Factor, dict[Reader, None]] = {}
        for layer in self.follower.layers:
            for factor in self._live(layer.inputs):
                reader = self._reader(layer, factor)
                if reader is None:
                    kind = "a layer reads it otherwise than as its module's first argument alone"
                    self.groups.keep_whole((factor,), kind, self._name(layer))
                else:
                    readers.setdefault(factor, {})[reader] = None
        return readers

    def _reader(self, layer: Contraction, factor: Factor) -> Reader | None:
        """The module whose first argument holds the channels, the same way in each of its calls; None if none does."""
        path = self.paths[layer.leaf][1:-1]
        own = [call for call in layer.calls if self.calls[call][0] == path]
        calls = [call for call in self.follower.call_inputs if self.calls[call][0] == path]
        places = {tuple(self._places(self.follower.call_inputs[call], factor)) for call in calls}
        if len(own) != 1 or len(places) != 1 or self.follower.other_uses.intersection(calls):
            return None
        (place,) = places
        return Reader(path, *place[0]) if len(place) == 1 else None

    def _places(self, axes: tuple[Axis, ...], wanted: Factor) -> Iterator[tuple[int, int, int]]:
        """Where a group is in an array: (axis, outer, inner)."""
        for i, axis in enumerate(axes):
            factors = self.groups.factors(axis)
            for j, factor in enumerate(factors):
                if factor == wanted:
                    yield i, length(factors[:j]), length(factors[j + 1 :])

    def _gate(self, factor: Factor, producers: list[Contraction], readers: dict[Reader, None]) -> Gate:
        slices = (Slice(path, *place) for path, axes in self.leaf_axes.items() for place in self._places(axes, factor))
        kernels = (self.paths[layer.leaf] for layer in producers)
        made_by = dict.fromkeys(
            Slice(path, self.leaf_axes[path].index(layer.outputs))
            for path, layer in zip(kernels, producers, strict=True)
        )
        return Gate(self._name(producers[0]), factor.size, tuple(slices), tuple(readers), tuple(made_by))

    def _layer(self, layer: Contraction, prunable: list[Factor]) -> Layer:
        path = () if layer.leaf is None else self.paths[layer.leaf]
        in_gate, out_gate = (
            next((prunable.index(factor) for factor in self._live(axis)), None)
            for axis in (layer.inputs, layer.outputs)
        )
        outputs = length(layer.outputs)
        return Layer(
            self._name(layer), path, layer.kernel_shape, layer.groups, layer.positions, outputs, in_gate, out_gate
        )

    def _name(self, layer: Contraction) -> str:
        return layer.where if layer.leaf is None else "/".join(self.paths[layer.leaf][1:-1])

    def _reason(self, factor: Factor) -> str:
        if factor.group is None:
            return "its kernel is the same for all channels"
        reasons = self.groups.reasons(factor.group).items()
        return "; ".join(f"{kind} ({where})" if where else kind for kind, where in reasons)
