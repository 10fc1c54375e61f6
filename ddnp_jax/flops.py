"""What a network costs: multiply-accumulates (MACs) of its convolution and dense layers, and parameters.

Two conventions. "macs": MACs per image; biases, batch norm and activations are free. "authors", of the DDNP and NPPM
authors' code: a layer that touches a gate costs 3 more per output element (batch norm 2, activation 1); the network's
other layers cost their MACs. Padding counts as if it were image. Matrix products of two activations are no layers.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax.topology import Layer, Topology

CONVENTIONS = ("macs", "authors")


def total(topology: Topology, widths: Any = None, convention: str = "macs") -> Any:
    """FLOPs of the whole network per image, T_all; arguments as for `prunable`."""
    whole = sum(_macs(layer) for layer in topology.layers if not _touches_gate(layer))
    return prunable(topology, widths, convention) + whole


def prunable(topology: Topology, widths: Any = None, convention: str = "macs") -> Any:
    """FLOPs per image of the layers that touch a gate, T.

    Args:
      topology: of the network.
      widths: channels per gate, None for the whole network; a sequence or an array (L,), which may be traced and
        fractional: the result is bilinear in it.
      convention: "macs" or "authors".

    Returns:
      An int for integer widths, else a float32 scalar that is differentiable in the widths.

    Raises:
      ValueError: the convention is unknown, or the number of widths is not that of the gates.
    """
    costs, inputs, outputs = _terms(topology, convention)
    widths = topology.widths if widths is None else widths
    if len(widths) != len(topology.gates):
        raise ValueError(f"{len(widths)} widths were given; the network has {len(topology.gates)} gates.")
    if _integers(widths):
        channels = np.array([*widths, 1], np.int64)
        return int(np.sum(costs * channels[inputs] * channels[outputs]))
    channels = jnp.concatenate([jnp.asarray(widths, jnp.float32), jnp.ones(1)])
    return jnp.sum(costs.astype(np.float32) * channels[inputs] * channels[outputs])


def parameters(topology: Topology, widths: Sequence[int] | None = None) -> int:
    """Parameters of the network with the given channels per gate, batch statistics not counted."""
    widths = topology.widths if widths is None else widths
    if len(widths) != len(topology.gates):
        raise ValueError(f"{len(widths)} widths were given; the network has {len(topology.gates)} gates.")
    shapes = {path: list(shape) for path, shape in topology.variables if path[0] == "params"}
    for gate, width in zip(topology.gates, widths, strict=True):
        for where in gate.slices:
            if where.path in shapes:
                shapes[where.path][where.axis] = where.outer * int(width) * where.inner
    return sum(map(math.prod, shapes.values()))


def p_for_reduction(topology: Topology, reduction: float, convention: str = "macs") -> float:
    """The p that removes a fraction `reduction` of the whole network's FLOPs: 1 - reduction * T_all / T_total.

    Raises:
      ValueError: the prunable layers do not have that many FLOPs.
    """
    share = total(topology, None, convention) / max(prunable(topology, None, convention), 1)
    if not 0 <= reduction * share < 1:
        raise ValueError(
            f"reduction {reduction} cannot be met: it must be at least 0 and less than {1 / share:.4f}, "
            "the prunable layers' share of the network's FLOPs."
        )
    return 1 - reduction * share


def reduction_for_p(topology: Topology, p: float, convention: str = "macs") -> float:
    """The fraction of the whole network's FLOPs that p removes; the inverse of `p_for_reduction`.

    Raises:
      ValueError: p is outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"p must be in (0, 1], got {p}.")
    return (1 - p) * prunable(topology, None, convention) / total(topology, None, convention)


def _macs(layer: Layer) -> int:
    return layer.positions * math.prod(layer.kernel_shape)


def _touches_gate(layer: Layer) -> bool:
    return layer.in_gate is not None or layer.out_gate is not None


@functools.cache
def _terms(topology: Topology, convention: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T as sum_i costs[i] * widths[inputs[i]] * widths[outputs[i]]; the index L stands for a factor of 1."""
    if convention not in CONVENTIONS:
        raise ValueError(f"the FLOPs convention {convention!r} is unknown; use one of {', '.join(CONVENTIONS)}.")
    one = len(topology.gates)
    channels = (*topology.widths, 1)
    terms = [(_macs(layer), layer.in_gate, layer.out_gate) for layer in topology.layers if _touches_gate(layer)]
    if convention == "authors":
        terms += [
            (3 * layer.positions * layer.outputs, None, layer.out_gate)
            for layer in topology.layers
            if _touches_gate(layer)
        ]
    rows = [(cost, one if i is None else i, one if o is None else o) for cost, i, o in terms]
    costs, inputs, outputs = np.array(rows, np.int64).reshape(-1, 3).T
    return costs // (np.take(channels, inputs) * np.take(channels, outputs)), inputs, outputs


def _integers(widths: Any) -> bool:
    """Whether the widths are integers that are known now."""
    if isinstance(widths, jax.Array):
        return not isinstance(widths, jax.core.Tracer) and jnp.issubdtype(widths.dtype, jnp.integer)
    return all(isinstance(width, int | np.integer) for width in widths)
