"""The multiple of channels that a device computes fastest, measured once on the network itself.

Networks of the same FLOPs are timed whose widths are random multiples of 1, 4, 8, 16 and 32. Where a device computes
channels in tiles, a width between two tiles takes as long as the wider one, or longer.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ddnp_jax import fields, files, parallel
from ddnp_jax.cost import flops
from ddnp_jax.cost.budget import Budget
from ddnp_jax.cost.network_times import NetworkTimer

MULTIPLES = (1, 4, 8, 16, 32)
FILE = "multiple.json"  # in the workdir
P = 0.5  # fraction of the prunable FLOPs of the networks that are timed, where so few can be reached
DRAWS = 2  # random networks of every multiple
NOISE = 0.02  # a coarser multiple must be faster by this


@dataclasses.dataclass(frozen=True)
class MultipleTimes:
    """Times of networks of the same FLOPs.

    Attributes:
      device: Device on which they were measured.
      batch: Images per call.
      runtime: What they were measured in, one of `network_times.RUNTIMES`.
      ms: Milliseconds per batch by the multiple of the widths, summed over `DRAWS` networks and scaled to the same
        FLOPs.
      channels: Channels per gate of the unpruned network.
      p: Fraction of the prunable FLOPs of these networks.
    """

    device: str
    batch: int
    runtime: str
    ms: Mapping[str, float]
    channels: tuple[int, ...]
    p: float = P

    def fastest(self, among: Collection[int] = MULTIPLES) -> int:
        """The fastest multiple among these and 1; a coarser one only where it saves more than `NOISE`."""
        best = 1
        for multiple in sorted(map(int, self.ms)):
            if multiple in among and self.ms[str(multiple)] < (1 - NOISE) * self.ms[str(best)]:
                best = multiple
        return best

    def describe(self, chosen: int) -> str:
        """What was measured and which multiple was chosen, in one sentence."""
        times = ", ".join(f"{ms:.2f} ms with multiples of {multiple}" for multiple, ms in self.ms.items())
        return (
            f"Widths are multiples of {chosen}, the fastest that can meet the budget ({DRAWS} networks with "
            f"{self.p:.0%} of the prunable FLOPs, batch {self.batch}, {self.device}): {times}."
        )


def measure(timer: NetworkTimer) -> MultipleTimes:
    """Times networks of the same FLOPs whose widths are multiples of each of `MULTIPLES`.

    They have half of the prunable FLOPs, or as few as can be reached. Multiples at which there are none are left out.
    """
    p = max(P, Budget(timer.topology, P).least_p)
    rng = np.random.default_rng(0)
    draws = [rng.uniform(0.3, 1.0, len(timer.topology.gates)) for _ in range(DRAWS)]
    budgets = [Budget(timer.topology, p, multiple=multiple) for multiple in MULTIPLES]
    budgets = [budget for budget in budgets if budget.least_p <= p]
    every_widths = [budget.fit(draw) for budget in budgets for draw in draws]
    # Coarse widths leave some of the FLOPs unused, by which they must not seem faster.
    work = _by_multiple([flops.total(timer.topology, widths) for widths in every_widths])
    sums = _by_multiple(timer.ms(every_widths)) * work[0] / work
    ms = {str(budget.multiple): float(each) for budget, each in zip(budgets, sums, strict=True)}
    return MultipleTimes(timer.device, timer.batch, timer.runtime, ms, timer.topology.widths, p)


def _by_multiple(values: Sequence[float]) -> np.ndarray:
    return np.reshape(values, (-1, DRAWS)).sum(axis=1)


def at_fastest(budget: Budget, times: MultipleTimes) -> Budget:
    """Returns the budget with the fastest of the multiples at which it can be met."""
    feasible = [each for each in MULTIPLES if dataclasses.replace(budget, multiple=each).least_p <= budget.p]
    return dataclasses.replace(budget, multiple=times.fastest(feasible))


def measured_once(path: Path, timer: NetworkTimer) -> MultipleTimes:
    """Returns the times in `path`; where there are none, they are measured and written there first.

    In a run of several processes all must call; the first one measures, and all read the same numbers.

    Raises:
      ValueError: The file holds no times of multiples, or those of another network, batch or runtime.
    """
    parallel.write_once(path, lambda: files.write_json(path, dataclasses.asdict(measure(timer))))
    times = load(path)
    if (times.channels, times.batch, times.runtime) != (timer.topology.widths, timer.batch, timer.runtime):
        raise ValueError(
            f"{path} was measured with {times.batch} images per call in {times.runtime} and {sum(times.channels)} "
            f"channels, this run has {timer.batch} in {timer.runtime} and {sum(timer.topology.widths)}; delete it, and "
            "it is measured again."
        )
    return times


def load(path: Path) -> MultipleTimes:
    """Reads the times that `measured_once` wrote.

    Raises:
      ValueError: The file holds no times of multiples.
    """
    try:
        times = fields.built(MultipleTimes, json.loads(path.read_text()))
        if unknown := [name for name in times.ms if name not in map(str, MULTIPLES)]:
            raise ValueError(f"{unknown[0]!r} is not one of {MULTIPLES}")
        if "1" not in times.ms or not all(0 < ms < math.inf for ms in times.ms.values()):
            raise ValueError("ms must have positive numbers of milliseconds, of the multiple 1 among others")
    except ValueError as error:
        raise ValueError(
            f"{path} holds no times of multiples ({error}); delete it, and they are measured again."
        ) from error
    return times
