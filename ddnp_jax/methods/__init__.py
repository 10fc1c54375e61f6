"""Pruning methods: ways to find a Selection. `METHODS` lists them by name.

A method consists of its fields, a dataclass that validates itself, and a function that builds a `Search` for a
`Problem`. Scores that need no images are searches of zero steps. Usage, as in `ddnp_jax.prune`:

    config = methods.configure("ddnp", {"tie_weight": 0.5})
    search = methods.build("ddnp", methods.Problem(model, variables, topology, budget, config, steps=2000))
    state, history = methods.run_search(search, variables, batches)
    selection = methods.select(search, state, budget)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ddnp_jax.fields import filled, names
from ddnp_jax.methods import allocations, scores, stored
from ddnp_jax.methods.base import (
    AdamW,
    Importance,
    Measured,
    Problem,
    ResourceFields,
    Search,
    Seeds,
    Survey,
    initial_state,
    over_seeds,
    proposed_cost,
    seed_metric,
    select,
)
from ddnp_jax.methods.ddnp import search as ddnp
from ddnp_jax.methods.nppm import search as nppm
from ddnp_jax.methods.scores import SCORES
from ddnp_jax.methods.searching import run_search

__all__ = [
    "METHODS",
    "SCORES",
    "AdamW",
    "Importance",
    "Measured",
    "Method",
    "Problem",
    "ResourceFields",
    "Search",
    "Seeds",
    "Survey",
    "build",
    "configure",
    "default_fields",
    "initial_state",
    "over_seeds",
    "proposed_cost",
    "run_search",
    "seed_metric",
    "select",
]


class Method(NamedTuple):
    """A pruning method.

    Attributes:
      fields: Creates its fields with their defaults, a dataclass that raises ValueError for values beyond its limits.
      build: Builds its search for a problem.
      steps: Default number of steps; 0 for methods that need no images.
      job_fields: Defaults of this method for fields of the pipeline's `search` section.
      passes: Fixed number of passes over the pipeline's search images; None if configurable.
    """

    fields: Callable[[], Any]
    build: Callable[[Problem], Search]
    steps: int
    job_fields: Mapping[str, Any] = {}
    passes: int | None = None


def _scoring(name: str, steps: int = 0, allocation: str = "uniform") -> Method:
    fields = functools.partial(allocations.Fields, allocation=allocation)
    return Method(fields, functools.partial(scores.build, SCORES[name]), steps, passes=1)


METHODS: dict[str, Method] = {
    "ddnp": Method(ddnp.Fields, ddnp.build, steps=2000),
    "nppm": Method(nppm.Fields, nppm.build, steps=2000, job_fields={"augment": True}),
    "uniform": _scoring("uniform"),
    "magnitude": _scoring("magnitude"),
    "bn_scale": _scoring("bn_scale"),
    "fpgm": _scoring("fpgm"),
    "lamp": _scoring("lamp", allocation="global"),
    "taylor": _scoring("taylor", steps=50),
    "hrank": _scoring("hrank", steps=10),
    "chip": _scoring("chip", steps=10),
    "cc": _scoring("cc", steps=10, allocation="cc"),
    "stored": Method(stored.Fields, stored.build, steps=0, passes=1),
}


def find(method: str) -> Method:
    """Returns the method with a name.

    Raises:
      ValueError: The method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
    return METHODS[method]


def configure(method: str, fields: Mapping[str, Any] | None = None) -> Any:
    """Returns a method's fields, with given values in place of their defaults.

    Args:
      method: Name of the method.
      fields: Values by name; those of an optimizer are a mapping, {"learning_rate": 1e-3}.

    Returns:
      The fields, for `Problem.config`.

    Raises:
      ValueError: The method or a field is unknown, or a value is of another type or beyond its limits; the message
        names the field.
    """
    defaults, values = find(method).fields(), fields or {}
    known = names(defaults)
    if unknown := [name for name in values if name not in known]:
        hint = _nested(defaults, unknown[0])
        raise ValueError(f"{method} has no field {unknown[0]!r}; its fields are {', '.join(known)}.{hint}")
    return filled(defaults, values)


def _nested(fields: Any, name: str) -> str:
    """How to set a field that only the fields of `fields` have, for example the learning rate of an optimizer."""
    within = [each for each in names(fields) if hasattr(getattr(fields, each), name)]
    return f" Set that of {', '.join(within)}, as in {within[0]}={{{name!r}: ...}}." if within else ""


def default_fields(method: str) -> dict[str, Any]:
    """Returns the fields of a method and their defaults, as nested dictionaries.

    Raises:
      ValueError: The method is unknown.
    """
    return dataclasses.asdict(find(method).fields())


def build(method: str, problem: Problem) -> Search:
    """Builds the search of a method.

    Raises:
      ValueError: The method is unknown.
    """
    return find(method).build(problem)
