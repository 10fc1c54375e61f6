"""Structured (channel) pruning for JAX and Flax that really removes channels."""

import importlib
from types import ModuleType

from ddnp_jax import models, torch_weights
from ddnp_jax.compact import compact, load_pruned, save_pruned, verify
from ddnp_jax.cost import flops
from ddnp_jax.masking import apply_masked
from ddnp_jax.topology import Selection, Topology, trace

__all__ = [
    "Selection",
    "Topology",
    "apply_masked",
    "compact",
    "data",
    "flops",
    "load_pruned",
    "models",
    "save_pruned",
    "torch_weights",
    "trace",
    "verify",
]


def __getattr__(name: str) -> ModuleType:
    """Imports `data` where it is first used, because who brings images along needs no decoders."""
    if name == "data":
        return importlib.import_module("ddnp_jax.data")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
