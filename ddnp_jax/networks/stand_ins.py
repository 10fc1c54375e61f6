"""Variables that stand in for a network's own where only their shapes matter, before there are any weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def zeros(shapes: Any) -> Any:
    """Returns zeros of the shapes and types of a pytree; for random keys, some key."""
    return jax.tree.map(_zeros, shapes)


def random(shapes: Any) -> Any:
    """Returns random variables of the shapes and types of a pytree, in which no two channels are the same.

    Activations keep their size with them, however deep the network is: neither the comparison of two networks nor a
    CPU's speed, which denormal numbers lower, depends on the depth.
    """
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return _zeros(leaf)
        values = rng.normal(size=leaf.shape).astype(leaf.dtype)
        if leaf.ndim > 1:  # a kernel, whose last axis is that of the outputs
            return values * math.sqrt(2 / math.prod(leaf.shape[:-1]))
        return abs(values)  # variances are positive

    return jax.tree.map(draw, shapes)


def _zeros(leaf: jax.ShapeDtypeStruct) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return np.zeros(leaf.shape, leaf.dtype)
