"""Fair timing of networks in one process: measurements are interleaved, so that slowdowns affect all of them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

ROUNDS, SECONDS = 7, 0.2  # at least, and as many rounds as the time allows: short ones scatter most


def in_turn(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Times functions without arguments, interleaved call by call.

    Args:
      calls: The functions; each is called once before, which compiles it.

    Returns:
      The median milliseconds of each.
    """
    for call in calls:
        _seconds(call)
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < ROUNDS or time.perf_counter() - started < SECONDS:
        rounds.append([_seconds(call) for call in calls])
    return [1e3 * float(median) for median in np.median(rounds, axis=0)]


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started
