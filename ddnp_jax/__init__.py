"""Structured (channel) pruning for JAX that really removes channels."""

import importlib
from types import ModuleType

from ddnp_jax import methods, models, torch_weights
from ddnp_jax.compact import Verification, compact, verify
from ddnp_jax.cost import flops
from ddnp_jax.masking import apply_masked
from ddnp_jax.networks import Resized
from ddnp_jax.pruning import Pruned, prune
from ddnp_jax.saved import load_pruned, save_pruned
from ddnp_jax.topology import Selection, Topology, trace
from ddnp_jax.training.fitting import Fitted, fit

__all__ = [
    "Fitted",
    "Pruned",
    "Resized",
    "Selection",
    "Topology",
    "Verification",
    "apply_masked",
    "compact",
    "data",
    "fit",
    "flops",
    "load_pruned",
    "methods",
    "models",
    "prune",
    "save_pruned",
    "torch_weights",
    "trace",
    "verify",
]


def __getattr__(name: str) -> ModuleType:
    """Imports `data` when it is first used, because it needs packages that pruning itself does not."""
    if name != "data":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.data")
