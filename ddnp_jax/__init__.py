"""Structured (channel) pruning for JAX that really removes channels."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from ddnp_jax import config, export, methods, models, torch_weights
from ddnp_jax.compact import Verification, compact, verify
from ddnp_jax.cost import flops
from ddnp_jax.cost.budget import Budget, Cost
from ddnp_jax.cost.kinds import latency_budget
from ddnp_jax.cost.network_times import NetworkTimer
from ddnp_jax.cpu import configure_cpu
from ddnp_jax.masking import apply_masked
from ddnp_jax.networks import Resized
from ddnp_jax.pruning import Pruned, prune
from ddnp_jax.saved import load_pruned, save_pruned
from ddnp_jax.topology import Selection, Topology, trace
from ddnp_jax.training.fitting import Fitted, evaluate, fit

if TYPE_CHECKING:
    from ddnp_jax import data as data
    from ddnp_jax import pipeline as pipeline

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Cost",
    "Fitted",
    "NetworkTimer",
    "Pruned",
    "Resized",
    "Selection",
    "Topology",
    "Verification",
    "apply_masked",
    "compact",
    "config",
    "configure_cpu",
    "evaluate",
    "export",
    "fit",
    "flops",
    "latency_budget",
    "load_pruned",
    "methods",
    "models",
    "prune",
    "save_pruned",
    "torch_weights",
    "trace",
    "verify",
]

_OF_THE_JOB = ("data", "pipeline")  # imported when they are first used: they need packages that pruning does not


def __getattr__(name: str) -> ModuleType:
    if name not in _OF_THE_JOB:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
