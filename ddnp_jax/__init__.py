"""Structured (channel) pruning for JAX and Flax that really removes channels."""

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
    "flops",
    "load_pruned",
    "models",
    "save_pruned",
    "torch_weights",
    "trace",
    "verify",
]
