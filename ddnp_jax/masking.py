"""Masks applied from outside: a gate's mask multiplies the input of each layer that reads the gate."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddnp_jax.topology import ModulePath, Reader, Topology

Observe = Callable[[int, jax.Array], None]


def apply_masked(
    model: nn.Module,
    variables: Any,
    x: jax.Array,
    masks: Sequence[jax.Array],
    topology: Topology,
    *,
    observe: Observe | None = None,
    **call_kwargs: Any,
) -> Any:
    """Applies a network in evaluation mode with masked channels.

    The masks act behind batch norm and activation, so that a mask of zeros and ones gives the network without the
    removed channels. They may be traced and differentiated; only their gradient is formed, not that of the variables.

    Args:
      model: the network.
      variables: of the network.
      x: images (N, *topology.input_shape).
      masks: (C_l,) per gate.
      topology: what `trace` found for the model.
      observe: called while tracing, once per gate, with the gate's number and the unmasked input of its first reader,
        (..., C_l): channels are moved to the end where they are elsewhere, as after a flatten.
      **call_kwargs: keyword arguments of the call that replace those of the trace.

    Returns:
      What the model returns, the logits.

    Raises:
      ValueError: number or shape of the masks, or the images' shape, are not the topology's.
    """
    _check(x, masks, topology)
    readers: dict[ModulePath, list[tuple[int, Reader]]] = {}
    for i, gate in enumerate(topology.gates):
        for reader in gate.readers:
            readers.setdefault(reader.path, []).append((i, reader))
    observed: set[int] = set()

    def mask_input(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        own = readers.get(context.module.path, ()) if context.method_name == "__call__" else ()
        for i, reader in own:
            if observe is not None and i not in observed:
                observed.add(i)
                observe(i, _channels_last(args[0], reader, topology.gates[i].channels))
            args = (_multiply(args[0], masks[i], reader), *args[1:])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(mask_input):
        return model.apply(variables, x, **(dict(topology.call_kwargs) | call_kwargs))


def _check(x: jax.Array, masks: Sequence[jax.Array], topology: Topology) -> None:
    if x.shape[1:] != topology.input_shape:
        raise ValueError(f"the images have shape {x.shape[1:]}; the topology was traced for {topology.input_shape}.")
    if len(masks) != len(topology.gates):
        raise ValueError(f"{len(masks)} masks were given; the network has {len(topology.gates)} gates.")
    for gate, mask in zip(topology.gates, masks, strict=True):
        if jnp.shape(mask) != (gate.channels,):
            raise ValueError(f"gate {gate.name}: the mask has shape {jnp.shape(mask)}, not ({gate.channels},).")


def _multiply(x: jax.Array, mask: jax.Array, reader: Reader) -> jax.Array:
    """Multiplies the reader's channels; the data type of x stays."""
    (channels,) = jnp.shape(mask)
    axis = jnp.broadcast_to(jnp.reshape(mask, (1, channels, 1)), (reader.outer, channels, reader.inner))
    shape = [1] * x.ndim
    shape[reader.axis] = x.shape[reader.axis]
    return x * axis.reshape(shape).astype(x.dtype)


def _channels_last(x: jax.Array, reader: Reader, channels: int) -> jax.Array:
    if reader.axis == x.ndim - 1 and reader.outer == reader.inner == 1:
        return x
    before, after = x.shape[: reader.axis], x.shape[reader.axis + 1 :]
    return jnp.moveaxis(x.reshape(*before, reader.outer, channels, reader.inner, *after), reader.axis + 1, -1)
