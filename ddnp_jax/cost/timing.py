"""Fair timing of networks in one process: measurements are interleaved, so that slowdowns affect all of them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

ROUNDS = 7  # at least, and as many as the time allows: short ones scatter most


def in_turn(calls: Sequence[Callable[[], Any]], seconds: float = 0.2) -> list[float]:
    """Times functions without arguments, interleaved call by call.

    Args:
      calls: The functions; each is called once before, which compiles it.
      seconds: Time to spend, for all of them together.

    Returns:
      The median milliseconds of each.
    """
    return list(map(float, np.median(rounds(calls, seconds), axis=0)))


def rounds(calls: Sequence[Callable[[], Any]], seconds: float) -> np.ndarray:
    """Milliseconds (R, N) of N functions in R rounds, in each of which every one is called once; as for `in_turn`."""
    for call in calls:
        _seconds(call)
    found: list[list[float]] = []
    started = time.perf_counter()
    while len(found) < ROUNDS or time.perf_counter() - started < seconds:
        found.append([_seconds(call) for call in calls])
    return 1e3 * np.array(found)


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started
