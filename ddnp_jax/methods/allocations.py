"""Allocations: functions of the scores of all channels and a budget that return how many channels each gate keeps."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from ddnp_jax.cost.budget import Budget
from ddnp_jax.fields import check_limits, choice, number
from ddnp_jax.methods.base import Importance
from ddnp_jax.topology import Topology

_MOST_REMOVED = 0.95  # largest fraction of a gate's channels that CC's allocation removes


def uniform_widths(importance: Importance, budget: Budget, fields: "Fields") -> tuple[int, ...]:
    """Widths that are the same fraction of the channels of every gate."""
    return budget.fit(np.ones(len(importance)))


def by_rates(importance: Importance, budget: Budget, fields: "Fields") -> tuple[int, ...]:
    """Widths that result from given pruning rates, all scaled by one factor to meet the budget."""
    return budget.fit(1 - np.array(fields.rates))


def by_fitted_losses(importance: Importance, budget: Budget, fields: "Fields") -> tuple[int, ...]:
    """CC's widths: another percent of any gate's channels would lose as much importance.

    For every gate, the importance that is lost with a fraction c of its channels is fitted by p1 exp(p2 c), weighted
    by the square root of the loss. CC removes from all gates up to the same slope λ: c = ln(λ / (p1 p2)) / p2, clipped
    to [0, 0.95]; λ is found by bisection. (The least sum of losses at a given number of FLOPs would have slopes
    proportional to the gates' FLOPs.) The importances must be additive, as those of `cc` are.
    """
    fits = [_exponential(np.sort(np.asarray(scores, np.float64))) for scores in importance]

    def fractions(log_slope: float) -> np.ndarray:
        rates = [(log_slope - log_p1 - math.log(p2)) / p2 for log_p1, p2 in fits]
        return 1 - np.clip(rates, 0.0, _MOST_REMOVED)

    low = min(log_p1 + math.log(p2) for log_p1, p2 in fits)
    high = max(log_p1 + math.log(p2) + p2 for log_p1, p2 in fits)
    for _ in range(64):
        middle = (low + high) / 2
        met = budget.cost(jnp.asarray(fractions(middle) * budget.topology.widths, jnp.float32)) <= budget.wanted
        low, high = (low, middle) if met else (middle, high)
    return budget.fit(fractions(high))


def _exponential(ascending: np.ndarray) -> tuple[float, float]:
    """Fits p1 exp(p2 c) to the importance that is lost with a fraction c of the channels; returns (ln p1, p2).

    Args:
      ascending: Importances of the channels, in ascending order.
    """
    losses = np.cumsum(ascending)
    rates = np.arange(1, len(losses) + 1) / len(losses)
    known = losses > 0
    if np.unique(losses[known]).size < 2:  # too few values for a fit: a curve that ends at the loss of all channels
        return math.log(max(losses[-1], np.finfo(float).tiny)) - 1.0, 1.0
    weights = np.sqrt(losses[known] / losses[-1])
    p2, log_p1 = np.polyfit(rates[known], np.log(losses[known]), 1, w=weights)
    return float(log_p1), float(p2)


def over_all_gates(importance: Importance, budget: Budget, fields: "Fields") -> tuple[int, ...]:
    """Widths by a single ranking of the channels of all gates: as many of the best channels as the budget allows.

    Every gate keeps at least its smallest width, and widths are rounded down to the budget's `multiple`.
    """
    gates = np.repeat(np.arange(len(importance)), [len(scores) for scores in importance])
    order = gates[np.argsort(-np.concatenate(importance), kind="stable")]
    whole = np.asarray(budget.topology.widths)

    def widths(kept: int) -> tuple[int, ...]:
        counts = np.bincount(order[:kept], minlength=len(importance))
        rounded = np.where(counts == whole, whole, counts // budget.multiple * budget.multiple)
        return tuple(map(int, np.maximum(rounded, budget.smallest_widths)))

    met, missed = 0, len(order) + 1
    while missed - met > 1:
        middle = (met + missed) // 2
        if budget.cost(widths(middle)) <= budget.wanted:
            met = middle
        else:
            missed = middle
    return widths(met)


ALLOCATIONS: dict[str, Callable[[Importance, Budget, "Fields"], tuple[int, ...]]] = {
    "uniform": uniform_widths,
    "global": over_all_gates,
    "rates": by_rates,
    "cc": by_fitted_losses,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """Fields of the methods that score channels.

    Attributes:
      allocation: How many channels each gate keeps: 'uniform', the same fraction of every gate; 'global', by one
        ranking of the channels of all gates; 'rates', as given by `rates`; 'cc', so that another percent of any
        gate's channels would lose as much importance, by a fitted curve.
      rates: For allocation 'rates': the fraction of each gate's channels to remove, in the order of `topology.gates`,
        for example published rates. All widths are then scaled by one factor to meet the budget.
    """

    allocation: str = choice("uniform", *ALLOCATIONS)
    rates: tuple[float, ...] = number((), least=0, below=1, about="fractions of channels to remove")

    def __post_init__(self) -> None:
        check_limits(self)
        if self.rates and self.allocation != "rates":
            raise ValueError(
                f"rates={self.rates} needs allocation='rates', and it is {self.allocation!r}; set it, or give no rates."
            )

    def check(self, topology: Topology) -> None:
        """Checks that the rates match the network.

        Raises:
          ValueError: The number of rates is not the number of gates.
        """
        if self.allocation == "rates" and len(self.rates) != len(topology.gates):
            raise ValueError(
                f"rates has {len(self.rates)} entries and the network {len(topology.gates)} gates; give one for each, "
                "in the order in which `trace(...).describe()` lists them."
            )
