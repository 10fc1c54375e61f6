"""Networks of any kind as pure functions of their variables: flax.linen modules, flax.nnx modules, plain functions.

Everything else in the library works on a `Network` and knows no module system.
"""

from typing import Any

import flax.linen as nn
from flax import nnx

from ddnp_jax.networks.base import (
    LeafPath,
    ModulePath,
    Network,
    Outputs,
    Resizing,
    Sizes,
    first_line,
    flatten,
    layout_note,
    picked,
    replace_leaves,
    structure,
)
from ddnp_jax.networks.flax_linen import LinenNetwork, Resized
from ddnp_jax.networks.flax_nnx import NnxNetwork
from ddnp_jax.networks.function import FunctionNetwork

__all__ = [
    "LeafPath",
    "ModulePath",
    "Network",
    "Outputs",
    "Resized",
    "Resizing",
    "Sizes",
    "as_network",
    "first_line",
    "flatten",
    "layout_note",
    "picked",
    "replace_leaves",
    "structure",
]


def as_network(model: Any, **call_kwargs: Any) -> Network:
    """Wraps a model as a `Network`.

    Args:
      model: A flax.linen module, a flax.nnx module, or a function `(variables, images) -> outputs`.
      **call_kwargs: Additional keyword arguments of every call. Those that switch between training and evaluation
        (`train`, `deterministic`, ...) are passed automatically if the module accepts them.

    Raises:
      TypeError: The model is none of these.
    """
    if isinstance(model, nn.Module):
        return LinenNetwork(model, call_kwargs)
    if isinstance(model, nnx.Module):
        return NnxNetwork(model, call_kwargs)
    if isinstance(model, type):
        raise TypeError(f"{model.__name__} is a class and not a network; create one, as in {model.__name__}().")
    if callable(model):
        return FunctionNetwork(model, call_kwargs)
    raise TypeError(
        f"{model!r} is not a network; give a flax.linen module, a flax.nnx module, or a function "
        "(variables, images) -> outputs."
    )
