"""What may remain: the wanted FLOPs, whether they can be reached, and integer widths that meet them."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ddnp_jax import flops
from ddnp_jax.topology import Topology


@dataclasses.dataclass(frozen=True)
class Budget:
    """FLOPs of the prunable layers that may remain: p T_total.

    Attributes:
      topology: of the network.
      p: fraction in (0, 1] of the prunable FLOPs that remains.
      convention: of counting FLOPs, 'macs' or 'authors'.
      multiple: widths are multiples of this, except gates that stay whole.
    """

    topology: Topology
    p: float
    convention: str = "macs"
    multiple: int = 1

    @property
    def total(self) -> float:
        """T_total."""
        return self.cost(self.topology.widths)

    @property
    def wanted(self) -> float:
        """The most that may remain, p T_total."""
        return self.p * self.total

    @property
    def smallest_widths(self) -> tuple[int, ...]:
        """One channel (or one multiple) per gate."""
        return tuple(min(self.multiple, channels) for channels in self.topology.widths)

    def cost(self, widths: Sequence[int]) -> float:
        """T at integer widths."""
        return float(flops.prunable(self.topology, widths, self.convention))

    def check(self) -> None:
        """Refuses a budget that cannot be met.

        Raises:
          ValueError: p is outside (0, 1], there is nothing to prune, or one channel per gate costs more than wanted.
        """
        if not 0.0 < self.p <= 1.0:
            raise ValueError(f"budget.p={self.p} must be in (0, 1]: the fraction of the prunable FLOPs that remains.")
        if self.multiple < 1:
            raise ValueError(f"budget.multiple={self.multiple} must be at least 1.")
        if not self.topology.gates:
            raise ValueError(f"the network has no gate to prune: {self.topology.describe()}")
        smallest = self.cost(self.smallest_widths)
        if smallest > self.wanted:
            least = flops.parameters(self.topology, self.smallest_widths)
            most = flops.parameters(self.topology)
            feasible = math.ceil(1e4 * smallest / self.total) / 1e4
            raise ValueError(
                f"budget.p={self.p} cannot be met: it wants {self.wanted:,.0f} prunable FLOPs ({self.convention}), but "
                f"the smallest network (widths {self.multiple} or whole) has {smallest:,.0f} and {least:,} parameters, "
                f"the largest {self.total:,.0f} and {most:,}; use p of at least {feasible:.4f}."
            )

    def fit(self, k: Sequence[float]) -> tuple[int, ...]:
        """Integer widths close to `k_l C_l` that meet the budget and leave no channel's room unused.

        All widths are scaled by the largest common factor that meets the budget after rounding; the room that rounding
        leaves is then filled one unit at a time, the gate that lost most to rounding first.

        Args:
          k: fraction of channels per gate, in (0, 1].
        """
        k = np.asarray(k, np.float64)
        low, high = 0.0, float(np.max(1.0 / k))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._meets(self.round(k * middle)) else (low, middle)
        return self._fill(np.asarray(self.round(k * low)), k * low * self.topology.widths)

    def round(self, k: Sequence[float]) -> tuple[int, ...]:
        """Integer widths nearest to `k_l C_l`, whatever they cost: multiples, between the smallest and the whole."""
        ideal = np.asarray(k, np.float64) * self.topology.widths
        rounded = np.floor(ideal / self.multiple + 0.5).astype(int) * self.multiple
        return tuple(map(int, np.clip(rounded, self.smallest_widths, self.topology.widths)))

    def _meets(self, widths: Sequence[int]) -> bool:
        return self.cost(tuple(map(int, widths))) <= self.wanted

    def _fill(self, widths: np.ndarray, ideal: np.ndarray) -> tuple[int, ...]:
        whole = np.asarray(self.topology.widths)
        while True:
            for gate in np.argsort(widths - ideal, kind="stable"):
                wider = widths.copy()
                wider[gate] = min(widths[gate] + self.multiple, whole[gate])
                if wider[gate] > widths[gate] and self._meets(wider):
                    widths = wider
                    break
            else:
                return tuple(map(int, widths))
