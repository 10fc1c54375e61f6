"""Corrects a budget in latency by what the chosen network really takes.

A table of layers predicts how latency changes with the widths, to within some ten percent. So the network that a search
proposes is timed beside the unpruned one, the predicted savings are scaled by the measured ones, and the widths are
fitted again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ddnp_jax.cost.budget import Budget

ROUNDS = 5  # networks that are timed at most
CLOSE = 0.01  # of the unpruned network's time: what a repeated measurement differs by
_LEAST_SAVINGS = 0.005  # of the unpruned network's time: less is noise, from which nothing is scaled


class Correction(NamedTuple):
    """How a prediction of latency is corrected.

    Attributes:
      savings: What the predicted savings are multiplied by, for `Budget.with_savings`.
      measured: Fraction of the unpruned network's time that the chosen network takes, measured.
    """

    savings: float
    measured: float

    def describe(self) -> str:
        """What was measured, in one sentence."""
        return f"measured: {self.measured:.1%} of the unpruned network's time, in turn with it"


def correct(budget: Budget, choose: Callable[[Budget], tuple[int, ...]]) -> Correction | None:
    """Finds the correction at which the chosen network takes the fraction of time that the budget wants.

    Every network that is timed adds a point to the relation of predicted and measured fractions, which is interpolated
    linearly between the two points around the wanted fraction, or extended from the unpruned network and the fastest.

    Args:
      budget: Budget whose cost predicts what its `timer` measures.
      choose: Widths that meet a budget, as the search proposes them.

    Returns:
      The correction whose network is measured nearest to `budget.p`, of at most `ROUNDS` that are tried; fewer where
      the widths stay the same. None for a budget without a timer.
    """
    if budget.timer is None:
        return None
    savings = 1.0
    widths: tuple[int, ...] = ()
    points, tried = [(1.0, 1.0)], []  # (measured, predicted)
    for _ in range(ROUNDS):
        before, widths = widths, choose(budget.with_savings(savings))
        if widths == before:  # as those of a stored selection
            break
        measured, predicted = budget.timer.fraction(widths), budget.cost(widths) / budget.total
        tried.append(Correction(savings, measured))
        close = abs(measured - budget.p) <= CLOSE
        if close or budget.p >= 1 or min(1 - measured, 1 - predicted) < _LEAST_SAVINGS:
            break
        points.append((measured, predicted))
        savings = (1 - budget.p) / (1 - _predicted_at(budget.p, points))
    return min(tried, key=lambda each: abs(each.measured - budget.p))


def _predicted_at(wanted: float, points: Sequence[tuple[float, float]]) -> float:
    """The predicted fraction at which the wanted one is measured, below 1."""
    above = min(point for point in points if point[0] > wanted)
    below = [point for point in points if point[0] <= wanted]
    first, second = (above, max(below)) if below else ((1.0, 1.0), above)
    slope = (second[1] - first[1]) / (second[0] - first[0])
    return min(first[1] + slope * (wanted - first[0]), 1 - _LEAST_SAVINGS)
