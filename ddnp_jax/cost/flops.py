"""Costs of a network: multiply-accumulates (MACs) of its convolution and dense layers, and parameters.

There are two conventions. "macs": MACs per image; biases, batch norm and activations are free. "authors", as in the
DDNP and NPPM authors' code: a layer that touches a gate costs 3 more per output element (batch norm 2, activation 1),
a transposed convolution per input position and output channel; other layers cost their MACs. Padding is counted like
pixels. Matrix products of two activations are not counted.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax.networks import LeafPath
from ddnp_jax.topology.types import Extent, Layer, Topology

CONVENTIONS = ("macs", "authors")


def total(topology: Topology, widths: Any = None, convention: str = "macs") -> Any:
    """FLOPs of the entire network per image, T_all; arguments as for `prunable`."""
    whole = sum(_macs(layer) for layer in topology.layers if not _touches_gate(layer))
    return prunable(topology, widths, convention) + whole


def prunable(topology: Topology, widths: Any = None, convention: str = "macs") -> Any:
    """FLOPs per image of the layers that touch a gate, T.

    Args:
      topology: Topology of the network.
      widths: Channels per gate; None for the unpruned network. A sequence or an array (L,), which may be traced and
        fractional: the result is bilinear in it.
      convention: "macs" or "authors".

    Returns:
      An int for integer widths, otherwise a float32 scalar that is differentiable in the widths.

    Raises:
      ValueError: The convention is unknown, or the number of widths does not match the gates.
    """
    check_convention(convention)
    return _sum(_flops_terms(topology, convention), channels(topology, widths))


def parameters(topology: Topology, widths: Any = None) -> Any:
    """Number of parameters of the entire network, without batch statistics.

    Args:
      topology: Topology of the network.
      widths: Channels per gate, as for `prunable`; the result has constant, linear and bilinear terms.

    Returns:
      An int for integer widths, otherwise a float32 scalar that is differentiable in the widths.

    Raises:
      ValueError: The number of widths is not that of the gates.
    """
    return _sum(_parameter_terms(topology), channels(topology, widths))


def channels(topology: Topology, widths: Any = None) -> Any:
    """Returns the widths as an array (L + 1,) whose last entry is 1, for terms that depend on no gate.

    Args:
      topology: Topology of the network.
      widths: Channels per gate; None for the unpruned network.

    Returns:
      int64 on the host for integer widths, otherwise float32, traced if the widths are.

    Raises:
      ValueError: The number of widths is not that of the gates.
    """
    widths = topology.widths if widths is None else widths
    if len(widths) != len(topology.gates):
        raise ValueError(f"{len(widths)} widths were given; the network has {len(topology.gates)} gates.")
    if _integers(widths):
        return np.array([*widths, 1], np.int64)
    return jnp.concatenate([jnp.asarray(widths, jnp.float32), jnp.ones(1)])


def check_convention(convention: str) -> None:
    """Checks that a convention is known.

    Raises:
      ValueError: The convention is unknown; the message lists the known ones.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"the FLOPs convention {convention!r} is unknown; use one of {', '.join(CONVENTIONS)}.")


def p_for_reduction(topology: Topology, reduction: float, convention: str = "macs") -> float:
    """Returns the p that removes a fraction of the entire network's FLOPs: 1 - reduction * T_all / T_total.

    Args:
      topology: Topology of the network.
      reduction: Fraction of T_all to remove.
      convention: "macs" or "authors".

    Raises:
      ValueError: The prunable layers have fewer FLOPs than that.
    """
    share = total(topology, None, convention) / max(prunable(topology, None, convention), 1)
    if not 0 <= reduction * share < 1:
        raise ValueError(
            f"reduction {reduction} cannot be met: it must be at least 0 and less than {1 / share:.4f}, "
            "the prunable layers' share of the network's FLOPs."
        )
    return 1 - reduction * share


def reduction_for_p(topology: Topology, p: float, convention: str = "macs") -> float:
    """Returns the fraction of the entire network's FLOPs that p removes; the inverse of `p_for_reduction`.

    Raises:
      ValueError: p is outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"p must be in (0, 1], got {p}.")
    return (1 - p) * prunable(topology, None, convention) / total(topology, None, convention)


def _touches_gate(layer: Layer) -> bool:
    return bool(layer.gates)


def _macs(layer: Layer) -> int:
    return layer.positions * math.prod(layer.kernel_shape)


class _Terms(NamedTuple):
    """A cost as sum_i coefficients[i] * prod_j channels[factors[i, j]], see `channels`."""

    coefficients: np.ndarray
    factors: np.ndarray


def _sum(terms: _Terms, channels: Any) -> Any:
    on_host = isinstance(channels, np.ndarray)
    coefficients = terms.coefficients if on_host else terms.coefficients.astype(np.float32)
    result = (coefficients * math.prod(channels[factor] for factor in terms.factors.T)).sum()
    return int(result) if on_host else result


def _terms(products: Iterable[tuple[int, Sequence[Extent]]], gates: int) -> _Terms:
    """The sum of `coefficient * product of extents`, multiplied out."""
    rows: dict[tuple[int, ...], int] = {}
    for coefficient, extents in products:
        options = [((gates, extent.constant), *extent.counts) for extent in extents]
        for choice in itertools.product(*options):
            found = tuple(sorted(gate for gate, _ in choice if gate != gates))
            rows[found] = rows.get(found, 0) + coefficient * math.prod(count for _, count in choice)
    rows = {factors: coefficient for factors, coefficient in rows.items() if coefficient}
    degree = max(map(len, rows), default=0) or 1
    factors = [(*found, *(gates,) * (degree - len(found))) for found in rows]
    return _Terms(np.array(list(rows.values()), np.int64), np.array(factors, np.int64).reshape(-1, degree))


@functools.cache
def _flops_terms(topology: Topology, convention: str) -> _Terms:
    widths = topology.widths
    layers = list(filter(_touches_gate, topology.layers))
    products: list[tuple[int, Sequence[Extent]]] = [
        (_macs(layer) // (layer.inputs.at(widths) * layer.outputs.at(widths)), (layer.inputs, layer.outputs))
        for layer in layers
    ]
    if convention == "authors":
        products += [(3 * layer.positions, (layer.outputs,)) for layer in layers]
    return _terms(products, len(topology.gates))


@functools.cache
def _parameter_terms(topology: Topology) -> _Terms:
    counts: dict[LeafPath, dict[int, dict[int, int]]] = {}
    for i, gate in enumerate(topology.gates):
        for cut in gate.slices:
            axis = counts.setdefault(cut.path, {}).setdefault(cut.axis, {})
            axis[i] = axis.get(i, 0) + cut.span.outer * cut.span.inner
    products = []
    for variable in topology.variables:
        if variable.parameter:
            axes = counts.get(variable.path, {})
            whole = math.prod(n for axis, n in enumerate(variable.shape) if axis not in axes)
            extents = [
                Extent(
                    variable.shape[axis] - sum(count * topology.widths[gate] for gate, count in found.items()),
                    tuple(found.items()),
                )
                for axis, found in axes.items()
            ]
            products.append((whole, extents))
    return _terms(products, len(topology.gates))


def _integers(widths: Any) -> bool:
    """Whether the widths are integers that are known now."""
    if isinstance(widths, jax.Array):
        return not isinstance(widths, jax.core.Tracer) and jnp.issubdtype(widths.dtype, jnp.integer)
    return all(isinstance(width, int | np.integer) for width in widths)
