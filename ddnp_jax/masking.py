"""Evaluates a network with masks on the inputs of the layers that read gates, without changes to its modules.

The traced program (jaxpr) is evaluated equation by equation, and the input of each layer that reads a gate is
multiplied by the gate's mask.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax.interpreter import Change, Interpreter, evaluate
from ddnp_jax.networks import as_network
from ddnp_jax.topology import Consumer, Span, Topology

Mask = jax.Array | np.ndarray
Observe = Callable[[int, jax.Array], Any]


def apply_masked(
    model: Any,
    variables: Any,
    x: jax.Array,
    masks: Sequence[Mask],
    topology: Topology,
    *,
    observe: Observe | None = None,
    interpreter: type[Interpreter] = Interpreter,
) -> Any:
    """Applies a network in evaluation mode with masked channels.

    The masks are applied after batch norm and activation, so that a binary mask gives the network without the removed
    channels. They may be traced and differentiated; only their gradient is computed, not that of the variables.

    Args:
      model: The network, of any kind that `trace` takes.
      variables: Variables of the network; None for an nnx module, which holds them.
      x: Images (N, *topology.input_shape).
      masks: One mask (C_l,) per gate.
      topology: Topology of `model`, as returned by `trace`.
      observe: Called while tracing with the index of a gate and the unmasked input (..., C_l) of its consumers, once
        for every distinct input, in the order of the forward pass. Channels are moved to the last axis if necessary;
        those with m > 1 positions each, as after a flatten or in groups, are (..., m, C_l).
      interpreter: Evaluates the program; `FullPrecision` for verification.

    Returns:
      The outputs of the model.

    Raises:
      ValueError: The number or shape of the masks or the shape of the images does not match the topology, or the
        network's program differs from the traced one.
    """
    _check(x, masks, topology)
    network = as_network(model, **dict(topology.call_kwargs))
    changes = {
        topology.layers[number].contraction: (topology.layers[number].operand, change)
        for number, change in _changes(topology, masks, observe).items()
    }
    shapes = {layer.contraction: layer.kernel_shape for layer in topology.layers}
    # Arrays that are observed inside `jax.checkpoint` could not be used outside.
    evaluation = interpreter(changes, shapes, keeps_rematerialization=observe is None)
    return evaluate(network.evaluate, evaluation, network.variables(variables), x)


def _check(x: jax.Array, masks: Sequence[Mask], topology: Topology) -> None:
    if x.shape[1:] != topology.input_shape:
        raise ValueError(f"the images have shape {x.shape[1:]}; the topology was traced for {topology.input_shape}.")
    if len(masks) != len(topology.gates):
        raise ValueError(f"{len(masks)} masks were given; the network has {len(topology.gates)} gates.")
    for gate, mask in zip(topology.gates, masks, strict=True):
        if jnp.shape(mask) != (gate.channels,):
            raise ValueError(f"gate {gate.name}: the mask has shape {jnp.shape(mask)}, not ({gate.channels},).")


def _changes(topology: Topology, masks: Sequence[Mask], observe: Observe | None) -> dict[int, Change]:
    """Returns the functions that mask the inputs of layers, by number of the layer."""
    consumers: dict[int, list[tuple[int, Consumer]]] = {}
    for i, gate in enumerate(topology.gates):
        for consumer in gate.consumers:
            consumers.setdefault(consumer.layer, []).append((i, consumer))
    observed: dict[int, list[jax.Array]] = {i: [] for i in range(len(topology.gates))}

    def change(number: int) -> Change:
        def masked(x: jax.Array) -> jax.Array:
            if observe is not None:
                for i, consumer in consumers[number]:
                    if not any(x is other for other in observed[i]):
                        observed[i].append(x)
                        observe(i, _channels_last(x, consumer, topology.gates[i].channels))
            return _multiply(x, masks, consumers[number])

        return masked

    return {number: change(number) for number in consumers}


def _multiply(x: jax.Array, masks: Sequence[Mask], consumers: Sequence[tuple[int, Consumer]]) -> jax.Array:
    """Multiplies the channels of all gates on an axis by their masks; the data type of x does not change."""
    axis = consumers[0][1].axis
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    along = _along_axis(x.shape[axis], [(masks[i], consumer.span) for i, consumer in consumers])
    return x * along.reshape(shape).astype(x.dtype)


def _along_axis(length: int, masks: Sequence[tuple[Mask, Span]]) -> jax.Array:
    """Returns the factors along an axis (length,): the masks at the positions of their gates, and 1 elsewhere."""
    mask, span = masks[0]
    (channels,) = jnp.shape(mask)
    if span.outer * channels * span.inner == length:
        repeated = jnp.broadcast_to(jnp.reshape(mask, (1, channels, 1)), (span.outer, channels, span.inner))
        return repeated.reshape(length)
    source = np.zeros(length, np.int64)  # index of each position's factor in the concatenation of a 1 and all masks
    start = 1
    for mask, span in masks:
        source[span.positions(len(mask)).T] = start + np.arange(len(mask))
        start += len(mask)
    return jnp.concatenate([jnp.ones(1, masks[0][0].dtype), *(mask for mask, _ in masks)])[source]


def _channels_last(x: jax.Array, consumer: Consumer, channels: int) -> jax.Array:
    """Moves the channels of one gate to the last axis: (..., C_l), or (..., m, C_l) if each has m > 1 positions."""
    if consumer.axis == x.ndim - 1 and x.shape[consumer.axis] == channels:
        return x
    positions = consumer.span.positions(channels)
    taken = jnp.moveaxis(x, consumer.axis, -1)[..., positions.T]
    return taken if positions.shape[1] > 1 else taken[..., 0, :]
