"""A search outside of the job: on any batches, on one device."""

from collections.abc import Iterable
from typing import Any

import jax

from ddnp_jax import parallel
from ddnp_jax.methods.base import Search
from ddnp_jax.training.fitting import Check, History, take_steps
from ddnp_jax.training.steps import Batch


def run_search(
    search: Search,
    variables: Any,
    batches: Iterable[Batch],
    seed: int = 0,
    progress: bool = True,
    check: Check | None = None,
) -> tuple[Any, History]:
    """Runs a search to its end; the same seed and batches give what the job gives.

    Args:
      search: Search, as returned by `methods.build`.
      variables: Variables of the network, as in the search's `Problem`.
      batches: Batches (images, targets), which can be read again and again; as for `fit`.
      seed: Seed of everything that the search draws.
      progress: Whether to report progress on standard error.
      check: Check of every batch, as for `take_steps`.

    Returns:
      The state after the last step, on the host, for `select`; and every metric over the steps.

    Raises:
      ValueError: The batches end before the search does.
      FloatingPointError: The loss became NaN or infinite.
    """
    state = search.init(jax.random.key(seed))
    if not search.steps:
        return parallel.fetch(state), {}
    return take_steps(search.step, state, variables, batches, search.steps, seed, "search" if progress else "", check)
