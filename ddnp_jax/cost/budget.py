"""Budgets: the target cost, whether it can be reached, and integer widths that meet it."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ddnp_jax.cost import flops
from ddnp_jax.cost.network_times import NetworkTimer
from ddnp_jax.topology import Topology

NOTED_UNUSED = 0.02  # fraction of a budget above which `describe` reports it as unused
_SIZES = {"multiply-accumulates": flops.total, "parameters": flops.parameters}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a budget counts.

    Attributes:
      of: (topology, widths) -> cost; exact for integer widths, otherwise a differentiable float32 scalar.
      unit: Unit of the cost, for messages.
      form: Format specifier of the cost, for messages.
    """

    of: Callable[[Topology, Any], Any] = flops.prunable
    unit: str = "prunable FLOPs (macs)"
    form: str = ",.0f"


def flops_cost(convention: str) -> Cost:
    """The FLOPs of the prunable layers, in one of `flops.CONVENTIONS`."""
    return Cost(functools.partial(flops.prunable, convention=convention), f"prunable FLOPs ({convention})")


@dataclasses.dataclass(frozen=True)
class Budget:
    """A target cost: the fraction p of the unpruned network's.

    Attributes:
      topology: Topology of the network, as returned by `trace`.
      p: Fraction in (0, 1] of the cost to keep.
      counted: What is counted; by default the FLOPs of the prunable layers.
      multiple: Widths are multiples of this, except those of unpruned gates.
      floors: Minimum number of channels of every gate; empty for one each.
      timer: Times the network, if the cost predicts its latency on this device: `correction.correct` measures what a
        search proposes. None for every other cost.
    """

    topology: Topology
    p: float
    counted: Cost = Cost()
    multiple: int = 1
    floors: tuple[int, ...] = ()
    timer: NetworkTimer | None = None

    @property
    def total(self) -> float:
        """T_total, the cost of the unpruned network."""
        return self.cost(self.topology.widths)

    @property
    def wanted(self) -> float:
        """The target, p T_total: the highest cost that meets the budget."""
        return self.p * self.total

    @property
    def smallest_widths(self) -> tuple[int, ...]:
        """The minimum widths: one channel (or one multiple) per gate, or its floor."""
        floors = self.floors or (1,) * len(self.topology.gates)
        return tuple(
            min(-(-floor // self.multiple) * self.multiple, channels)
            for floor, channels in zip(floors, self.topology.widths, strict=True)
        )

    @property
    def least_p(self) -> float:
        """The smallest feasible p, rounded up to four digits; above 1 if there is none."""
        return math.ceil(1e4 * self.cost(self.smallest_widths) / self.total) / 1e4

    def cost(self, widths: Any) -> Any:
        """The cost T at widths (L,): exact for integers, otherwise a differentiable float32 scalar."""
        return self.counted.of(self.topology, widths)

    def with_savings(self, factor: float) -> "Budget":
        """The same budget if pruning saves `factor` times as much of the cost as `counted` says."""
        of, total = self.counted.of, self.total

        def cost(topology: Topology, widths: Any) -> Any:
            return total - factor * (total - of(topology, widths))

        return dataclasses.replace(self, counted=dataclasses.replace(self.counted, of=cost))

    def check(self) -> None:
        """Checks that the budget can be met.

        Raises:
          ValueError: p is outside (0, 1], there is nothing to prune, or the minimum widths exceed the budget.
        """
        check_fields(self.topology, self.p, self.multiple)
        if self.cost(self.smallest_widths) > self.wanted:
            feasible = self.least_p
            least, most = map(self._size, (self.smallest_widths, self.topology.widths))
            narrower = f", or a multiple below {self.multiple}" if self.multiple > 1 else ""
            raise ValueError(
                f"p={self.p} cannot be met: it wants {self.wanted:{self.counted.form}} {self.counted.unit}, but "
                f"the smallest network ({self._smallest()}) has {least}, the largest {most}; "
                + (f"use p of at least {feasible:.4f}{narrower}." if feasible <= 1 else "no p does.")
            )

    def describe(self, widths: tuple[int, ...]) -> str:
        """Returns the sizes before and after pruning, the used part of the budget, and the widths, as text."""
        lines = [_change(name, of(self.topology), of(self.topology, widths)) for name, of in _SIZES.items()]
        reached, wanted = (f"{cost:{self.counted.form}}" for cost in (self.cost(widths), self.wanted))
        lines.append(f"budget: {reached} of at most {wanted} {self.counted.unit} (p = {self.p:g})")
        unused = 1 - self.cost(widths) / self.wanted
        if unused > NOTED_UNUSED:
            full = self._wider(np.asarray(widths), np.asarray(widths)) is None  # not so for a stored selection
            reason = ": at these widths no gate can be a step wider within it" if full else ""
            lines.append(f"  {unused:.0%} of the budget is unused{reason}.")
        gates = zip(self.topology.gates, widths, strict=True)
        return "\n".join([*lines, *(f"  {gate.name}: {width} of {gate.channels}" for gate, width in gates)])

    def fit(self, k: ArrayLike) -> tuple[int, ...]:
        """Returns integer widths close to `k_l C_l` that meet the budget and leave no room for another channel.

        All widths are scaled by the largest common factor that meets the budget after rounding; the remaining budget is
        then used up one unit at a time, starting with the gate that lost most to rounding. The cost need not be
        monotonic: a measured one may decrease as a width grows. No single gate of the result can be one unit wider
        within the budget, although being two units wider may be cheaper.

        Args:
          k: Fraction of channels to keep per gate, in (0, 1].
        """
        fractions = np.asarray(k, np.float64)
        ideal = fractions * self.topology.widths
        # The factors at which a rounded width changes; between two of them all widths are constant.
        halves = [np.arange(0.5, channels / self.multiple + 1) * self.multiple for channels in self.topology.widths]
        factors = np.unique(np.concatenate([half / each for half, each in zip(halves, ideal, strict=True)]))
        wanted = self.wanted
        for low, high in itertools.pairwise([2 * factors[-1], *factors[::-1], 0.0]):
            widths = self.round(fractions * (low + high) / 2)
            if self.cost(widths) <= wanted:
                return self._fill(np.asarray(widths), ideal * low)
        return self.smallest_widths

    def round(self, k: ArrayLike) -> tuple[int, ...]:
        """Returns the allowed widths nearest to `k_l C_l`, regardless of the budget."""
        ideal = np.asarray(k, np.float64) * self.topology.widths
        rounded = np.floor(ideal / self.multiple + 0.5).astype(int) * self.multiple
        return tuple(map(int, np.clip(rounded, self.smallest_widths, self.topology.widths)))

    def _smallest(self) -> str:
        return "at its floors" if self.floors else f"widths {self.multiple} or whole"

    def _size(self, widths: tuple[int, ...]) -> str:
        size = f"{self.cost(widths):{self.counted.form}}"
        if self.counted.of is not flops.parameters:
            size += f" and {flops.parameters(self.topology, widths):,} parameters"
        return size

    def _fill(self, widths: np.ndarray, ideal: np.ndarray) -> tuple[int, ...]:
        while (wider := self._wider(widths, ideal)) is not None:
            widths = wider
        return tuple(map(int, widths))

    def _wider(self, widths: np.ndarray, ideal: np.ndarray) -> np.ndarray | None:
        """The widths with one gate a step wider within the budget, the one that lost most first; None if none can."""
        whole, wanted = np.asarray(self.topology.widths), self.wanted
        for gate in np.argsort(widths - ideal, kind="stable"):
            wider = widths.copy()
            wider[gate] = min(widths[gate] + self.multiple, whole[gate])
            if wider[gate] > widths[gate] and self.cost(wider) <= wanted:
                return wider
        return None


def _change(name: str, before: int, after: int) -> str:
    return f"{name}: {before:,} -> {after:,} ({100 * (1 - after / before):.1f} % removed)"


def floors_of(topology: Topology, floors: Any) -> tuple[int, ...]:
    """Returns the minimum number of channels of every gate.

    Args:
      topology: Topology of the network.
      floors: Number of channels (integer) or fraction (below 1): one value for all gates, a mapping by gate name, or
        a function of the gate; None for one channel each.

    Raises:
      ValueError: A floor is neither, exceeds its gate's channels, or names an unknown gate.
    """
    if floors is None:
        return ()
    if isinstance(floors, Mapping):
        names = [gate.name for gate in topology.gates]
        if unknown := [name for name in floors if name not in names]:
            raise ValueError(f"floors names {unknown[0]!r}, which is not a gate; the gates are {', '.join(names)}.")
    found = []
    for gate in topology.gates:
        if isinstance(floors, Mapping):
            floor = floors.get(gate.name, 1)
        else:
            floor = floors(gate) if callable(floors) else floors
        channels = math.ceil(floor * gate.channels) if isinstance(floor, float) and 0 < floor < 1 else floor
        if not isinstance(channels, int | np.integer) or not 1 <= channels <= gate.channels:
            raise ValueError(
                f"the floor of gate {gate.name} is {floor!r}; it must be a fraction below 1, or a whole number from 1 "
                f"to its {gate.channels} channels."
            )
        found.append(int(channels))
    return tuple(found)


def check_fields(topology: Topology, p: Any, multiple: Any) -> None:
    """Checks what all kinds of budgets have in common.

    Raises:
      ValueError: p or `multiple` is invalid, or there is nothing to prune.
    """
    if not isinstance(p, Real) or not 0.0 < float(p) <= 1.0:
        raise ValueError(f"p={p!r} must be in (0, 1]: the fraction of the cost that remains.")
    if not isinstance(multiple, Integral) or multiple < 1:
        raise ValueError(f"multiple={multiple!r} must be a whole number of at least 1.")
    if not topology.gates:
        reasons = "; ".join(f"{producers} ({reason})" for producers, reason in topology.unprunable[:3])
        more = f"; and {len(topology.unprunable) - 3} more" if len(topology.unprunable) > 3 else ""
        raise ValueError(
            f"the network has no gate to prune; these stay unpruned: {reasons or 'no layer was found'}{more}. "
            "`trace(...).describe()` shows all."
        )
