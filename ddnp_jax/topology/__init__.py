"""What can be removed from a network: `trace` finds its gates and layers."""

from ddnp_jax.topology.trace import (
    Gate,
    Layer,
    LeafPath,
    ModulePath,
    Reader,
    Selection,
    Slice,
    Topology,
    evaluation_kwargs,
    trace,
    variable_shapes,
)

__all__ = [
    "Gate",
    "Layer",
    "LeafPath",
    "ModulePath",
    "Reader",
    "Selection",
    "Slice",
    "Topology",
    "evaluation_kwargs",
    "trace",
    "variable_shapes",
]
