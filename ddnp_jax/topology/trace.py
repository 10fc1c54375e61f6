"""`trace` finds the gates and layers of any network: the channels that can be removed.

Channels belong together when elementwise operations, batch norm, pooling, concatenation or depthwise convolutions
connect them; convolutions and dense layers end one group of axes and start the next. A group becomes a gate only if
everything about it is understood; all others stay unpruned, and `Topology.describe` gives the reasons. Numbers that the
network's code computes from its channel count (such as 1 / sqrt(C)) are invisible here; `ddnp_jax.verify` detects them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax.models.layers import Backbone
from ddnp_jax.networks import LeafPath, Network, as_network, flatten, layout_note, replace_leaves
from ddnp_jax.topology.axis_groups import CHANNELS, PIXELS, Axis, AxisGroups, Constant, Factor, Part, length
from ddnp_jax.topology.propagation import BY_PLATFORM, Contraction, Propagation, Value
from ddnp_jax.topology.types import Consumer, Extent, Flattened, Gate, Layer, Slice, Topology, Variable

BATCH = 2  # images of the traced call; nothing depends on it

Keep = str | Iterable[str] | Callable[[Gate], bool]


def trace(
    model: Any,
    input_shape: tuple[int, ...],
    *,
    variables: Any = None,
    residual: bool = False,
    keep: Keep = (),
    **call_kwargs: Any,
) -> Topology:
    """Finds the channels that can be removed from a network, by tracing it without computing anything.

    In this library's own models, only channels sized by their attribute `widths` become gates, unless `residual` is
    set.

    Args:
      model: A flax.linen module, a flax.nnx module, or a function `(variables, images) -> outputs`. It maps one array
        (N, *input_shape) to its outputs.
      input_shape: Shape of one image, for example (32, 32, 3).
      variables: Variables of a function, or their shapes. Modules need none.
      residual: Whether channels that are added to those of other layers may be removed too.
      keep: Names of gates to leave unpruned, a single name, or a predicate on gates.
      **call_kwargs: Additional keyword arguments of the call. Those that select evaluation mode (`train=False`,
        `deterministic=True`, ...) are passed automatically if the module accepts them. Their values must be hashable.

    Returns:
      The topology. Anything that is not fully understood stays unpruned and is listed in `Topology.unprunable`.

    Raises:
      ValueError: The network cannot be called with such images; it has layers inside a loop or branch, whose cost
        cannot be counted; `keep` names an unknown gate; a call argument is not hashable; or the variables are those of
        another network.
    """
    _check_hashable(call_kwargs)
    network = as_network(model, **call_kwargs)
    _check_shape(input_shape)
    images = jax.ShapeDtypeStruct((BATCH, *input_shape), jnp.float32)
    shapes = variable_shapes(network, images, variables)
    leaves = flatten(shapes)
    if variables is not None and network.kind == "linen":
        _check_fit(network, leaves, flatten(variable_shapes(network, images)), images.shape)

    def forward(values: list[jax.Array], x: jax.Array) -> Any:
        return network.evaluate(replace_leaves(shapes, dict(zip(leaves, values, strict=True))), x)

    with network.calling(images):
        closed = jax.make_jaxpr(forward)(list(leaves.values()), images)
    propagation = Propagation(BATCH, residual)
    groups = propagation.groups
    values = [
        Value(tuple(groups.new(n) for n in leaf.shape), learned=True, leaf=i) for i, leaf in enumerate(leaves.values())
    ]
    x = Value(tuple(groups.new(n, "it is the network's input") for n in images.shape), frozenset((0,)))
    _mark_image(groups, x.axes)
    constants = map(propagation.constant, closed.consts)
    for value in propagation.run(closed.jaxpr, constants, [*values, x]):
        _mark_shuffled(groups, value.axes)
        for axis in value.axes:
            groups.keep_whole(axis, "it is the network's output")
    leaf_axes = {path: value.axes for path, value in zip(leaves, values, strict=True)}
    sized = None if residual else _sized_axes(network, leaves, images)
    gates, layers, whole = _Assembly(propagation, network, leaf_axes, sized, keep).result()
    return Topology(
        tuple(input_shape),
        tuple(sorted(call_kwargs.items())),
        gates,
        layers,
        whole,
        tuple(
            Variable(path, tuple(leaf.shape), network.is_parameter(path), _flattened(groups, leaf_axes[path]))
            for path, leaf in leaves.items()
        ),
    )


def _check_shape(input_shape: Any) -> None:
    if not isinstance(input_shape, tuple | list) or not all(isinstance(size, int | np.integer) for size in input_shape):
        raise ValueError("input_shape must be the shape of one image, as in (32, 32, 3); of an array, array.shape[1:].")
    if len(input_shape) == 4 and input_shape[0] == 1:
        raise ValueError(
            f"input_shape={tuple(input_shape)} begins with 1; give the shape of one image, without an axis for the "
            f"batch: {tuple(input_shape[1:])}."
        )


def _check_hashable(call_kwargs: Mapping[str, Any]) -> None:
    for name, value in call_kwargs.items():
        try:
            hash(value)
        except TypeError:
            raise ValueError(
                f"the network's argument {name}={value!r} must be hashable; give a tuple instead of a list, or make "
                "an array a constant of the network."
            ) from None


def _mark_image(groups: AxisGroups, axes: tuple[Axis, ...]) -> None:
    """Notes which axes of the input are pixels and channels; of fewer than four only its layers know."""
    if len(axes) > 3:
        for axis in axes[1:-1]:
            groups.mark(axis, (PIXELS,))
        groups.mark(axes[-1], (CHANNELS,))


def _mark_shuffled(groups: AxisGroups, axes: tuple[Axis, ...]) -> None:
    """Notes as pixels what a network's output has on one axis with them, as pixel shuffling puts it there."""
    for axis in axes[1:-1] if len(axes) > 3 else ():
        if PIXELS in groups.meanings(axis):
            groups.mark(axis, (PIXELS,))


def _flattened(groups: AxisGroups, axes: tuple[Axis, ...]) -> tuple[Flattened, ...]:
    return tuple(Flattened(i, start, parts) for i, axis in enumerate(axes) for start, parts in groups.flattened(axis))


def _check_fit(
    network: Network, leaves: Mapping[LeafPath, Any], expected: Mapping[LeafPath, Any], images: tuple[int, ...]
) -> None:
    for path, leaf in expected.items():
        name = "/".join(path)
        if path not in leaves:
            raise ValueError(f"variable {name} of {network.name} is missing; give all variables of this network.")
        if leaves[path].shape != leaf.shape:
            advice = "; give the variables of this network and the shape (H, W, C) of its images."
            raise ValueError(
                f"variable {name} has shape {leaves[path].shape}, and {leaf.shape} in {network.name} for images of "
                f"shape {images[1:]}{layout_note(images) or advice}"
            )


def variable_shapes(network: Network, images: jax.ShapeDtypeStruct, variables: Any = None) -> Any:
    """Shapes and types of a network's variables, of those given or of those it starts from; nothing is computed."""
    if variables is not None:
        return jax.eval_shape(lambda: variables)
    if network.kind == "function":
        return network.variables(None)  # raises
    with network.calling(images):
        return jax.eval_shape(network.initial, jax.random.key(0), images)


def _sized_axes(
    network: Network, leaves: dict[LeafPath, Any], images: jax.ShapeDtypeStruct
) -> set[tuple[LeafPath, int]] | None:
    """The (path, axis) that the `widths` of one of this library's models size; None for other networks."""
    if not isinstance(network.model, Backbone):
        return None
    widths = jax.tree.map(lambda width: 2 * width, network.model.widths)
    doubled = flatten(variable_shapes(as_network(network.model.clone(widths=widths)), images))
    return {
        (path, axis)
        for path, leaf in leaves.items()
        for axis, (size, double) in enumerate(zip(leaf.shape, doubled[path].shape, strict=True))
        if size != double
    }


class _Assembly:
    """Makes gates and layers of what the propagation found."""

    def __init__(
        self,
        propagation: Propagation,
        network: Network,
        leaf_axes: dict[LeafPath, tuple[Axis, ...]],
        sized: set[tuple[LeafPath, int]] | None,
        keep: Keep,
    ) -> None:
        """Prepares.

        Args:
          propagation: The propagation after its run.
          network: The network.
          leaf_axes: Axes of the variables.
          sized: (path, axis) of the variables that may shrink; None for all.
          keep: As of `trace`.
        """
        self.layers, self.network = propagation.layers, network
        self.groups: AxisGroups = propagation.groups
        self.leaf_axes, self.sized = leaf_axes, sized
        self.keep = keep if callable(keep) else (keep,) if isinstance(keep, str) else tuple(keep)
        self.paths = list(leaf_axes)

    def result(self) -> tuple[tuple[Gate, ...], tuple[Layer, ...], tuple[tuple[str, str], ...]]:
        """Gates, layers, and (producers, reasons) of what stays unpruned."""
        self._keep_divided_whole()
        producers: dict[Part, list[Contraction]] = {}
        for layer in self.layers:
            for part in () if layer.depthwise else self._parts(layer.outputs):
                producers.setdefault(part, []).append(layer)
        self._keep_unread_whole(producers)
        found = {part: self._gate(part, producers[part]) for part in producers if self.groups.live((part,))}
        self._keep_as_asked(found)
        prunable = [part for part in found if self.groups.live((part,))]
        layers = tuple(self._layer(layer, prunable) for layer in self.layers)
        whole = dict.fromkeys(
            (", ".join(dict.fromkeys(map(self._name, producers[part]))), self._reason(part))
            for part in producers
            if part not in prunable and not self._is_inside(part, producers[part], prunable)
        )
        return tuple(found[part] for part in prunable), layers, tuple(whole)

    def _is_inside(self, part: Part, producers: list[Contraction], prunable: list[Part]) -> bool:
        """Whether these are the channels inside of groups that can be removed as a whole."""
        outer = (self.groups.factors(layer.outputs)[0] for layer in producers)
        return all(found != part and set(self._parts((found,))) & set(prunable) for found in outer)

    def _parts(self, axis: Axis) -> list[Part]:
        """Everything on an axis: groups that are not divided, and parts that are the same for all channels."""
        constant = (part for part in self.groups.factors(axis) if isinstance(part, Constant))
        return list(dict.fromkeys([*(part for part, _ in self.groups.places(axis)), *constant]))

    def _keep_divided_whole(self) -> None:
        """Keeps whole what a reshape has divided at its producer, and axes that hold two gates at once.

        Channels may be divided into groups of neighbours of which whole ones are removed, as group normalization and
        grouped convolutions do.
        """
        for layer in self.layers:
            others = self.groups.factors(layer.outputs)[1:]
            if others and self.groups.live(tuple(others)):
                self.groups.keep_whole(layer.outputs, "a reshape divides its channels", self._name(layer))
            if self.groups.is_product(layer.read):
                self.groups.keep_whole(layer.read, "an axis holds two kinds of channels", self._name(layer))
        for path, axes in self.leaf_axes.items():
            for axis in axes:
                if self.groups.is_product(axis):
                    self.groups.keep_whole(axis, "an axis holds two kinds of channels", "/".join(path))

    def _keep_unread_whole(self, producers: dict[Part, list[Contraction]]) -> None:
        """Keeps whole what no mask can reach, no layer reads, or no stored kernel produces."""
        read: set[Factor] = set()
        for layer in self.layers:
            own = self.groups.live(layer.inputs)
            read.update(own)
            if layer.unmaskable is not None:
                self.groups.keep_whole(tuple(own), layer.unmaskable, self._name(layer))
        for part, layers in producers.items():
            if not self.groups.live((part,)):
                continue
            if part not in read:
                self.groups.keep_whole((part,), "no layer reads it")
            elif all(layer.leaf is None for layer in layers):
                self.groups.keep_whole((part,), "its kernel is computed from several parameters")
            elif not self._is_sized(part):
                self.groups.keep_whole((part,), "the model's `widths` do not size it")

    def _keep_as_asked(self, found: dict[Part, Gate]) -> None:
        if not callable(self.keep):
            names = [gate.name for gate in found.values()]
            if unknown := [name for name in self.keep if name not in names]:
                raise ValueError(f"keep names {unknown[0]!r}, which is not a gate; the gates are {', '.join(names)}.")
        for part, gate in found.items():
            if self.keep(gate) if callable(self.keep) else gate.name in self.keep:
                self.groups.keep_whole((part,), "`keep` names it")

    def _is_sized(self, part: Part) -> bool:
        """Whether the model can be built with fewer of these channels."""
        return self.sized is None or any((cut.path, cut.axis) in self.sized for cut in self._slices(part))

    def _slices(self, part: Part) -> list[Slice]:
        return [
            Slice(path, axis, span)
            for path, axes in self.leaf_axes.items()
            for axis in range(len(axes))
            for found, span in self.groups.places(axes[axis])
            if found == part
        ]

    def _gate(self, part: Part, producers: list[Contraction]) -> Gate:
        consumers = dict.fromkeys(
            Consumer(number, layer.read_axis, span)
            for number, layer in enumerate(self.layers)
            if layer.read_axis is not None and part in self.groups.live(layer.inputs)
            for found, span in self.groups.places(layer.read)
            if found == part
        )
        made_by = dict.fromkeys(
            self._producer(part, layer, layer.leaf) for layer in producers if layer.leaf is not None
        )
        return Gate(
            self._gate_name(part, producers[0]), part.size, tuple(self._slices(part)), tuple(consumers), tuple(made_by)
        )

    def _gate_name(self, part: Part, layer: Contraction) -> str:
        name = self._name(layer)
        places = [span for found, span in self.groups.places(layer.outputs) if found == part]
        if len(self._parts(layer.outputs)) == 1 or len(self.groups.factors(layer.outputs)) > 1:
            return name
        return f"{name}[{places[0].start}:{places[0].start + part.size}]"

    def _producer(self, part: Part, layer: Contraction, leaf: int) -> Slice:
        """Where a layer's kernel has the channels as outputs."""
        path = self.paths[leaf]
        axes = self.leaf_axes[path]
        resolved = self.groups.factors(layer.outputs)
        axis = max(i for i, axis in enumerate(axes) if self.groups.factors(axis) == resolved)
        if layer.outputs in axes:  # before groups were joined, so that inputs of the same group are told apart
            axis = axes.index(layer.outputs)
        return Slice(path, axis, next(span for found, span in self.groups.places(axes[axis]) if found == part))

    def _layer(self, layer: Contraction, prunable: list[Part]) -> Layer:
        path = () if layer.leaf is None else self.paths[layer.leaf]
        inputs, outputs = (self._extent(axis, prunable) for axis in (layer.inputs, layer.outputs))
        return Layer(
            self._name(layer),
            path,
            layer.number,
            layer.operand,
            layer.kernel_shape,
            layer.groups,
            layer.positions,
            inputs,
            outputs,
            layer.unmaskable == BY_PLATFORM,
        )

    def _extent(self, axis: Axis, prunable: list[Part]) -> Extent:
        counts: dict[int, int] = {}
        for part, span in self.groups.places(axis):
            if part in prunable:
                gate = prunable.index(part)
                counts[gate] = counts.get(gate, 0) + span.outer * span.inner
        removable = sum(prunable[gate].size * count for gate, count in counts.items())
        return Extent(length(axis) - removable, tuple(counts.items()))

    def _name(self, layer: Contraction) -> str:
        return layer.where if layer.leaf is None else self.network.layer_name(self.paths[layer.leaf])

    def _reason(self, part: Part) -> str:
        if isinstance(part, Constant):
            return "its kernel is the same for all channels"
        reasons = self.groups.reasons(part.group).items()
        return "; ".join(f"{kind} ({where})" if where else kind for kind, where in reasons)
