"""Uniform widths with random channels: the floor that every method must beat."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ddnp_jax.methods.base import Problem, Search


def one_shot(importance: Callable[[np.random.Generator], tuple[np.ndarray, ...]], problem: Problem) -> Search:
    """A search of zero steps that keeps the same fraction of channels in every gate.

    Args:
      importance: a random generator, seeded by the run -> (C_l,) per gate.
      problem: what is to be pruned.
    """

    def propose(state: jax.Array) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        return importance(np.random.default_rng(np.asarray(state))), np.ones(len(problem.topology.gates))

    return Search(steps=0, init=jax.random.key_data, step=_no_step, propose=propose)


def _no_step(*_: Any) -> Any:
    raise RuntimeError("a one-shot method has no search step.")


def build(problem: Problem) -> Search:
    """Draws the kept channels of every gate at random, by the run's seed."""
    return one_shot(lambda generator: tuple(map(generator.random, problem.topology.widths)), problem)
