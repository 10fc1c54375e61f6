"""Ways to arrive at a Selection. `METHODS` lists them by the name that the configuration uses.

A method module defines `build(problem: Problem) -> Search`. Where it has fields of its own it also defines
`default_config()`, which gives them (and its own defaults of the common ones), and `check(config)`, which refuses what
it does not know. One-shot methods are searches of zero steps.
"""

from types import ModuleType

import ml_collections

from ddnp_jax.methods import magnitude, uniform
from ddnp_jax.methods.base import (
    Problem,
    Search,
    Seeds,
    over_seeds,
    proposed_cost,
    refuse_unknown,
    seed_metric,
    select,
)
from ddnp_jax.methods.ddnp import search as ddnp
from ddnp_jax.methods.nppm import search as nppm

__all__ = [
    "METHODS",
    "Problem",
    "Search",
    "Seeds",
    "build",
    "check",
    "default_config",
    "over_seeds",
    "proposed_cost",
    "refuse_unknown",
    "seed_metric",
    "select",
]

METHODS: dict[str, ModuleType] = {"ddnp": ddnp, "magnitude": magnitude, "nppm": nppm, "uniform": uniform}


def default_config(method: str) -> ml_collections.ConfigDict:
    """The fields that a method adds to the `search` section, and its own defaults of the common ones.

    Raises:
      ValueError: the method is unknown.
    """
    return getattr(_module(method), "default_config", ml_collections.ConfigDict)()


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses what the method of the `search` section does not know; needs no network.

    Raises:
      ValueError: names the field and what it may be.
    """
    missing = [field for field in default_config(config.method) if field not in config]
    if missing:
        raise ValueError(
            f"search.method={config.method!r} needs search.{missing[0]}, which this configuration lacks; choose the "
            f"method by the configuration's argument, --config=FILE.py:{config.method}."
        )
    getattr(_module(config.method), "check", lambda _: None)(config)


def build(method: str, problem: Problem) -> Search:
    """Builds the search of a method.

    Raises:
      ValueError: the method or a field of its configuration is unknown.
    """
    return _module(method).build(problem)


def _module(method: str) -> ModuleType:
    if method not in METHODS:
        raise ValueError(f"search.method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
    return METHODS[method]
