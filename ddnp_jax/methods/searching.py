"""A search without the pipeline: on any batches, on one device."""

import itertools
from collections.abc import Iterable, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax import parallel
from ddnp_jax.methods.base import Search, Survey, initial_state
from ddnp_jax.training.fitting import Check, History, checked_batch, take_steps
from ddnp_jax.training.steps import Batch


def run_search(
    search: Search,
    variables: Any,
    batches: Iterable[Batch],
    seed: int = 0,
    progress: bool = True,
    check: Check | None = None,
) -> tuple[Any, History]:
    """Runs a search to its end; with the same seed and batches, the result is the same as in the pipeline.

    A search with a survey takes it first: over all batches if their number is known, as that of a list is, otherwise
    over as many as the search has steps, because they may be endless.

    Args:
      search: Search, as returned by `methods.build`.
      variables: Variables of the network, as in the search's `Problem`.
      batches: Batches (images, targets), a reusable iterable; as for `fit`.
      seed: Random seed of the search.
      progress: Whether to report progress on standard error.
      check: Check of every batch, as for `take_steps`.

    Returns:
      The state after the last step, on the host, for `select`; and every metric over the steps.

    Raises:
      ValueError: The batches end before the search does.
      FloatingPointError: The loss became NaN or infinite.
    """
    if search.survey is not None:
        surveyed = batches if isinstance(batches, Sized) else itertools.islice(batches, search.steps)
        sums = _sums(search.survey, variables, surveyed, check or checked_batch)
        search = search.survey.then(sums)
    state = initial_state(search, seed)
    if not search.steps:
        return parallel.fetch(state), {}
    return take_steps(search.step, state, variables, batches, search.steps, seed, "search" if progress else "", check)


def _sums(survey: Survey, variables: Any, batches: Iterable[Batch], check: Check) -> tuple[np.ndarray, ...]:
    """The sums of a survey over the images of all batches."""

    @jax.jit
    def of_batch(variables: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.sum(values, axis=0) for values in survey.of(variables, images))

    found = [of_batch(variables, check(batch, number)[0]) for number, batch in enumerate(batches)]
    return tuple(np.asarray(jax.device_get(parts), np.float64).sum(axis=0) for parts in zip(*found, strict=True))
