"""A device whose times are counted, so that a busy machine changes no test."""

import numpy as np

from ddnp_jax.cost import flops, latency
from ddnp_jax.cost.latency import LatencyTable, LayerTimes
from ddnp_jax.cost.network_times import NetworkTimer


def use(monkeypatch):
    """Replaces all measurements; returns the runtime of every one, as they are made.

    Half of the base's 10 ms are overhead, half are in proportion to the FLOPs.
    """
    timed = []

    def ms(self, every_widths):
        timed.append(self.runtime)
        work = [flops.total(self.topology, widths) / flops.total(self.topology) for widths in every_widths]
        return [5.0 + 5.0 * each for each in work]

    def fraction(self, widths):
        whole, cut = self.ms([self.topology.widths, widths])
        return cut / whole

    def measure(timer, points=5, multiple=1):
        """A table that knows nothing of the overhead: a layer takes as long as its channels say."""
        layers = []
        for layer in timer.topology.layers:
            grids = [
                tuple(range(multiple, extent.at(timer.topology.widths) + 1, multiple)) if extent.gates else ()
                for extent in (layer.inputs, layer.outputs)
            ]
            times = np.outer(*[grid or (1.0,) for grid in grids]) * layer.positions
            rows = tuple(map(tuple, times.tolist()))
            layers.append(LayerTimes(layer.name, layer.kernel_shape, layer.positions, *grids, rows))
        return LatencyTable(timer.device, timer.batch, tuple(layers), timer.runtime)

    monkeypatch.setattr(NetworkTimer, "ms", ms)
    monkeypatch.setattr(NetworkTimer, "fraction", fraction)
    monkeypatch.setattr(latency, "measure", measure)
    return timed
