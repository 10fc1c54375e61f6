"""Structured (channel) pruning for JAX and Flax that really removes channels."""

from ddnp_jax import models
from ddnp_jax.compact import Verification, compact, verify
from ddnp_jax.cost import flops
from ddnp_jax.masking import apply_masked
from ddnp_jax.networks import Resized
from ddnp_jax.saved import load_pruned, save_pruned
from ddnp_jax.topology import Selection, Topology, trace

__all__ = [
    "Resized",
    "Selection",
    "Topology",
    "Verification",
    "apply_masked",
    "compact",
    "flops",
    "load_pruned",
    "models",
    "save_pruned",
    "trace",
    "verify",
]
