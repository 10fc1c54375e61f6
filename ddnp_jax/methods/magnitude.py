"""L1-norm channels at uniform widths: the classical floor that a learned method must beat."""

from typing import Any

import numpy as np

from ddnp_jax.methods.base import Problem, Search
from ddnp_jax.methods.uniform import one_shot
from ddnp_jax.topology import Gate, Topology


def l1_norms(variables: Any, topology: Topology) -> tuple[np.ndarray, ...]:
    """L1 norm of the kernels that produce each channel, (C_l,) per gate."""
    return tuple(_l1_norm(variables, gate) for gate in topology.gates)


def _l1_norm(variables: Any, gate: Gate) -> np.ndarray:
    norm = np.zeros(gate.channels)
    for piece in gate.producers:
        kernel = variables
        for name in piece.path:
            kernel = kernel[name]
        by_position = np.moveaxis(np.abs(np.asarray(kernel, np.float64)), piece.axis, 0)
        norm += by_position[piece.span.positions(gate.channels)].reshape(gate.channels, -1).sum(1)
    return norm


def build(problem: Problem) -> Search:
    """Keeps the channels with the largest L1 norms, the same fraction in every gate."""
    return one_shot(lambda _: l1_norms(problem.variables, problem.topology), problem)
