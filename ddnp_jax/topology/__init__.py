"""What can be removed from a network: `trace` finds its gates and layers."""

from ddnp_jax.topology.axis_groups import Span
from ddnp_jax.topology.trace import Keep, trace, variable_shapes
from ddnp_jax.topology.types import Consumer, Extent, Flattened, Gate, Layer, Selection, Slice, Topology, Variable

__all__ = [
    "Consumer",
    "Extent",
    "Flattened",
    "Gate",
    "Keep",
    "Layer",
    "Selection",
    "Slice",
    "Span",
    "Topology",
    "Variable",
    "trace",
    "variable_shapes",
]
