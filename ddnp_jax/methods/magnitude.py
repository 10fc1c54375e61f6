"""L1-norm channels at uniform widths: the classical floor that a learned method must beat."""

from typing import Any

import numpy as np

from ddnp_jax.methods import Problem, Search, keep_best
from ddnp_jax.methods.uniform import one_shot, uniform_widths
from ddnp_jax.topology import Topology


def l1_norms(variables: Any, topology: Topology) -> tuple[np.ndarray, ...]:
    """Mean absolute weight of the kernels that produce each channel, (C_l,) per gate."""
    raise SystemError


def build(problem: Problem) -> Search:
    """Keeps the channels with the largest L1 norms, the same fraction in every gate."""
    return one_shot(lambda rng: keep_best(l1_norms(problem.variables, problem.topology), uniform_widths(problem.budget)))
