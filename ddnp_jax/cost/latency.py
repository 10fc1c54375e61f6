"""Latency of a network on a device: measured over the widths of its layers, interpolated, and saved as a plain file.

A table has, for every convolution and dense layer, milliseconds per batch at a grid of its numbers of input and output
channels; the sum over the layers of their multilinear interpolation is differentiable in the widths. A network takes
longer than the sum of its layers: normalization, activations, additions, and an overhead for every operation. So the
entire network is timed too, at several widths, and its time is modeled as an overhead plus a factor times the sum, both
fitted to these times. What is left of the error, `cost.correction` takes away once the widths are known.

Between the points of the grid a device may jump (tiles of 8, 32 or 128 channels): with `budget.multiple` the points are
multiples too.
"""

import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax import fields, files, parallel
from ddnp_jax.cost import flops
from ddnp_jax.cost.layer_calls import LayerCall, layer_calls
from ddnp_jax.cost.network_times import XLA, NetworkTimer, compiled, filled
from ddnp_jax.topology import Extent, Layer, Topology

FILE = "latency.json"  # of a run's table, in its workdir
ROUNDS = 5  # the shortest one counts: other load on the machine only adds time
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.0)  # of every gate, at which the entire network is timed
ROUND_MS = 5.0  # shortest time of a round; short layers are called several times


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """Times of one layer, that is one use of it in the forward pass.

    Attributes:
      name: Name of the layer, as in the topology.
      kernel_shape: Shape of the kernel in the unpruned network.
      positions: Positions at which the kernel is applied, as in the topology.
      inputs: Ascending numbers of input channels, up to the whole; empty where no gate changes them.
      outputs: The same of the output channels; a depthwise layer has only these.
      ms: Milliseconds per batch, (len(inputs) or 1) rows of (len(outputs) or 1).
    """

    name: str
    kernel_shape: tuple[int, ...]
    positions: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def check(self, layer: Layer, topology: Topology) -> None:
        """Checks that these are times of a layer of a network.

        Raises:
          ValueError: Names the layer and what does not fit.
        """
        if (self.name, self.kernel_shape, self.positions) != (layer.name, layer.kernel_shape, layer.positions):
            raise ValueError(
                f"it has {self.name} with kernel {self.kernel_shape} at {self.positions} positions where the network "
                f"has {layer.name} with kernel {layer.kernel_shape} at {layer.positions}"
            )
        for side, grid, extent in (("inputs", self.inputs, layer.inputs), ("outputs", self.outputs, layer.outputs)):
            whole = extent.at(topology.widths) if extent.gates else None
            if (grid[-1] if grid else None) != whole or any(a >= b for a, b in itertools.pairwise((0, *grid))):
                raise ValueError(f"{self.name}: {side} {list(grid)} must be ascending numbers up to {whole} channels")
        shape = [len(self.inputs) or 1, len(self.outputs) or 1]
        if len(self.ms) != shape[0] or any(len(row) != shape[1] for row in self.ms):
            raise ValueError(f"{self.name}: ms must be {shape[0]} rows of {shape[1]}, one per width")
        if not all(0 < ms < math.inf for row in self.ms for ms in row):
            raise ValueError(f"{self.name}: every time must be a positive number of milliseconds")


@dataclasses.dataclass(frozen=True)
class NetworkTime:
    """Time of the entire network.

    Attributes:
      widths: Channels per gate.
      ms: Milliseconds per batch.
    """

    widths: tuple[int, ...]
    ms: float

    def check(self, topology: Topology) -> None:
        """Checks that this is a time of a network.

        Raises:
          ValueError: Says what does not fit.
        """
        whole = topology.widths
        if len(self.widths) != len(whole) or not all(1 <= w <= c for w, c in zip(self.widths, whole, strict=True)):
            raise ValueError(f"networks: widths {list(self.widths)} must be one number of channels for each gate")
        if not 0 < self.ms < math.inf:
            raise ValueError(f"networks: ms={self.ms!r} must be a positive number of milliseconds")


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Times of every layer of a network, and of the network.

    Attributes:
      device: Device on which they were measured.
      batch: Images per call.
      layers: Layers, in the topology's order.
      runtime: One of `RUNTIMES`.
      networks: Times of the entire network at several widths; empty if only the times of the layers count.
    """

    device: str
    batch: int
    layers: tuple[LayerTimes, ...]
    runtime: str = XLA
    networks: tuple[NetworkTime, ...] = ()

    def ms(self, topology: Topology, widths: Any = None) -> Any:
        """Milliseconds per batch of the network.

        Args:
          topology: Topology of the network.
          widths: Channels per gate; None for the unpruned network. Below the smallest measured width, its time counts.

        Returns:
          A float for integer widths, else a float32 scalar that is differentiable in the widths.

        Raises:
          ValueError: The number of widths is not that of the gates.
        """
        overhead, factor = _fitted(self, topology)
        return overhead + factor * self.layers_ms(topology, widths)

    def layers_ms(self, topology: Topology, widths: Any = None) -> Any:
        """Milliseconds per batch of all layers, each by itself; arguments and result as for `ms`."""
        channels = flops.channels(topology, widths)
        on_host = isinstance(channels, np.ndarray)
        xp, kind = (np, np.float64) if on_host else (jnp, np.float32)
        extents, knots, times = _arrays(self, topology)
        times = xp.asarray(times, kind)
        (i, s), (j, t) = (
            _locate(xp, axis_knots.astype(kind), xp.asarray(axis_extents, kind) @ channels.astype(kind))
            for axis_extents, axis_knots in zip(extents, knots, strict=True)
        )
        rows = np.arange(len(times))
        below = (1 - t) * times[rows, i, j] + t * times[rows, i, j + 1]
        above = (1 - t) * times[rows, i + 1, j] + t * times[rows, i + 1, j + 1]
        result = xp.sum((1 - s) * below + s * above)
        return float(result) if on_host else result

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON; `load` gives back the same numbers, bit for bit."""
        files.write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path, topology: Topology) -> Self:
        """Reads what `save` wrote, or a table of another device in the same form.

        Raises:
          ValueError: The file holds no table, or one of another network.
        """
        try:
            content = json.loads(Path(path).read_text())
            table = fields.built(cls, content)
            layers = table.layers
            if len(layers) != len(topology.layers):
                raise ValueError(f"it has {len(layers)} layers, the network {len(topology.layers)}")
            for times, layer in zip(layers, topology.layers, strict=True):
                times.check(layer, topology)
            for network in table.networks:
                network.check(topology)
        except ValueError as error:
            raise ValueError(
                f"{path} is not a latency table of this network ({error}); delete it, and it is measured again."
            ) from error
        return table


def measured_once(path: Path, timer: NetworkTimer, points: int, multiple: int) -> LatencyTable:
    """Returns the table in `path`; where there is none, it is measured and written there first.

    In a run of several processes all must call; the first one measures, and all read the same numbers.

    Args:
      path: The file.
      timer: Times the entire network; the layers are timed in the same way.
      points: As for `measure`.
      multiple: As for `measure`.

    Raises:
      ValueError: The file holds no table of this network, or one of another batch or runtime, or one that was measured
        on this device at other widths.
    """
    parallel.write_once(path, lambda: measure(timer, points, multiple).save(path))
    table = LatencyTable.load(path, timer.topology)
    if (table.batch, table.runtime) != (timer.batch, timer.runtime):
        raise ValueError(
            f"{path} was measured with {table.batch} images per call in {table.runtime}, this run has {timer.batch} in "
            f"{timer.runtime}; delete it, and it is measured again."
        )
    if table.device == timer.device and any(
        grid != _knots(extent, timer.topology, points, multiple)
        for times, layer in zip(table.layers, timer.topology.layers, strict=True)
        for grid, extent in ((times.inputs, layer.inputs), (times.outputs, layer.outputs))
    ):
        raise ValueError(
            f"{path} was measured at other widths than {points} per gate in multiples of {multiple}; delete it, and it "
            "is measured again."
        )
    return table


def measure(timer: NetworkTimer, points: int = 5, multiple: int = 1) -> LatencyTable:
    """Compiles and times every layer alone, and the entire network at several widths.

    Args:
      timer: Times the entire network; the layers are timed with as many images, in the same runtime.
      points: Widths per gate, evenly spaced from the smallest to the whole; at least 2.
      multiple: The widths are multiples of this, except the whole.
    """
    topology, runtime = timer.topology, timer.runtime
    calls = layer_calls(timer.model, topology, timer.batch, timer.variables)
    known: dict[LayerCall, float] = {}  # networks repeat their layers

    def milliseconds(call: LayerCall) -> float:
        if call not in known:
            known[call] = _milliseconds(call, runtime)
        return known[call]

    layers = []
    for layer, call in zip(topology.layers, calls, strict=True):
        inputs, outputs = (_knots(extent, topology, points, multiple) for extent in (layer.inputs, layer.outputs))
        ms = tuple(tuple(milliseconds(call.resized(a, b)) for b in outputs or (None,)) for a in inputs or (None,))
        layers.append(LayerTimes(layer.name, layer.kernel_shape, layer.positions, inputs, outputs, ms))
        _report(len(layers), len(topology.layers))
    return LatencyTable(timer.device, timer.batch, tuple(layers), runtime, _networks(timer, multiple))


def _networks(timer: NetworkTimer, multiple: int) -> tuple[NetworkTime, ...]:
    """Times the entire network at fractions of every gate."""
    every_widths = list(
        dict.fromkeys(tuple(_part(c, fraction, multiple) for c in timer.topology.widths) for fraction in FRACTIONS)
    )
    return tuple(NetworkTime(*each) for each in zip(every_widths, timer.ms(every_widths), strict=True))


def _part(channels: int, fraction: float, multiple: int) -> int:
    if fraction == 1:
        return channels
    return min(max(round(fraction * channels / multiple), 1) * multiple, channels)


@functools.cache
def _fitted(table: LatencyTable, topology: Topology) -> tuple[float, float]:
    """Overhead (ms) and factor, neither negative, with which the layers' times are nearest to those of the network."""
    if not table.networks:
        return 0.0, 1.0
    ms = np.array([network.ms for network in table.networks])
    layers = np.array([table.layers_ms(topology, network.widths) for network in table.networks])
    columns = np.stack([np.ones_like(ms), layers], 1) / ms[:, None]  # relative errors count
    candidates = [np.linalg.lstsq(columns * use, np.ones_like(ms), rcond=None)[0] for use in ((1, 1), (0, 1), (1, 0))]
    allowed = [each for each in candidates if min(each) >= 0]
    overhead, factor = min(allowed, key=lambda each: float(np.sum((columns @ each - 1) ** 2)))
    return float(overhead), float(factor)


def _report(measured: int, layers: int) -> None:
    """A line on standard error, about ten times in all."""
    if measured % max(layers // 10, 1) == 0:
        print(f"latency table: {measured} of {layers} layers", file=sys.stderr, flush=True)


@functools.cache
def _arrays(table: LatencyTable, topology: Topology) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Extents (2, N, L + 1), knots (2, N, G) and times (N, G, G) of N layers; the first axis is (input, output).

    An extent times `flops.channels` is a number of channels.
    """
    sides = [(layer.inputs, layer.outputs) for layer in topology.layers]
    extents = np.zeros((2, len(sides), len(topology.gates) + 1))
    for n, pair in enumerate(sides):
        for side, extent in enumerate(pair):
            extents[side, n, -1] = extent.constant
            for gate, count in extent.counts:
                extents[side, n, gate] = count
    grids = [
        (times.inputs or (inputs.constant,), times.outputs or (outputs.constant,))
        for times, (inputs, outputs) in zip(table.layers, sides, strict=True)
    ]
    size = max(2, *(len(grid) for pair in grids for grid in pair))
    times = [
        np.pad(layer.ms, [(0, size - len(grid)) for grid in pair], mode="edge")
        for layer, pair in zip(table.layers, grids, strict=True)
    ]
    knots = [[[*grid, *(grid[-1] + 1 + n for n in range(size - len(grid)))] for grid in pair] for pair in grids]
    return extents, np.array(knots, np.float64).swapaxes(0, 1), np.array(times, np.float64)


def _locate(xp: Any, knots: np.ndarray, widths: Any) -> tuple[Any, Any]:
    """Where widths (N,) are among knots (N, G): the knot below, and the fraction of the way to the next one."""
    rows = np.arange(len(knots))
    widths = xp.where(widths > knots[:, 0], widths, knots[:, 0])
    below = xp.sum(xp.asarray(knots[:, 1:-1]) < widths[:, None], axis=1)  # at a knot: the slope of smaller widths
    first, second = xp.asarray(knots)[rows, below], xp.asarray(knots)[rows, below + 1]
    return below, (widths - first) / (second - first)


def _knots(extent: Extent, topology: Topology, points: int, multiple: int) -> tuple[int, ...]:
    """Numbers of channels at which a layer is timed: the gates on its axis from the smallest to the whole."""
    if not extent.gates:
        return ()
    channels = {gate: topology.widths[gate] for gate in extent.gates}
    smallest = {gate: min(multiple, count) for gate, count in channels.items()}
    numbers = set()
    for fraction in np.linspace(0, 1, points):
        widths = {}
        for gate, count in channels.items():
            spaced = smallest[gate] + fraction * (count - smallest[gate])
            nearest = int(np.round(spaced / multiple)) * multiple
            widths[gate] = count if fraction == 1 else min(max(nearest, smallest[gate]), count)
        numbers.add(extent.at(widths))
    return tuple(sorted(numbers))


def _milliseconds(call: LayerCall, runtime: str) -> float:
    """Shortest time of a compiled call."""
    x, kernel = (filled(jax.ShapeDtypeStruct(shape, call.dtype)) for shape in (call.x, call.kernel))
    layer = compiled(runtime, lambda kernel, x: call(x, kernel), kernel, x)
    first, second = next(_rounds(layer, 1)), next(_rounds(layer, 1))
    calls = max(1, math.ceil(ROUND_MS / min(first, second)))
    return min(itertools.islice(_rounds(layer, calls), ROUNDS))


def _rounds(call: Callable[[], Any], calls: int) -> Iterator[float]:
    """Milliseconds per call, round by round; the calls of a round wait for each other on the device alone."""
    while True:
        started = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        yield 1e3 * (time.perf_counter() - started) / calls
