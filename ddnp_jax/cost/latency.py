"""What a network's layers take on a device: measured over their widths, interpolated, and kept as a plain file.

A table has, for every convolution and dense layer, milliseconds per batch at a grid of the widths of its input and
output gate. The time of a network is the sum over its layers of the multilinear interpolation, which is differentiable
in the widths. Batch norm, activations, additions and pooling are not in it, nor is what a compiler gains by fusing
them, so that it predicts differences between networks better than the time of one.

Between the points of the grid a device may jump (tiles of 8, 32 or 128 channels): with `budget.multiple` the points are
multiples too.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ddnp_jax import parallel
from ddnp_jax.checkpoint import write_json_atomic
from ddnp_jax.cost import flops
from ddnp_jax.topology import Layer, ModulePath, Topology

ROUNDS = 5  # of which the median counts
ROUND_MS = 5.0  # shortest time of a round; short layers are called several times

Call = tuple[nn.Module, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """Times of one layer, that is one use of it in the forward pass.

    Attributes:
      name: as in the topology.
      kernel_shape: of the whole network's kernel.
      positions: output positions.
      inputs: ascending widths of the input gate, up to the whole one; empty where the layer reads no gate.
      outputs: the same of the output gate; a depthwise layer has only these.
      ms: milliseconds per batch, (len(inputs) or 1) rows of (len(outputs) or 1).
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
          ValueError: names the layer and what does not fit.
        """
        if (self.name, self.kernel_shape, self.positions) != (layer.name, layer.kernel_shape, layer.positions):
            raise ValueError(
                f"it has {self.name} with kernel {self.kernel_shape} at {self.positions} positions where the network "
                f"has {layer.name} with kernel {layer.kernel_shape} at {layer.positions}"
            )
        for side, grid, gate in (("inputs", self.inputs, layer.in_gate), ("outputs", self.outputs, layer.out_gate)):
            whole = None if gate is None else topology.gates[gate].channels
            if (grid[-1] if grid else None) != whole or any(a >= b for a, b in itertools.pairwise((0, *grid))):
                raise ValueError(f"{self.name}: {side} {list(grid)} must be ascending widths up to {whole} channels")
        shape = [len(self.inputs) or 1, len(self.outputs) or 1]
        if len(self.ms) != shape[0] or any(len(row) != shape[1] for row in self.ms):
            raise ValueError(f"{self.name}: ms must be {shape[0]} rows of {shape[1]}, one per width")
        if not all(0 < ms < math.inf for row in self.ms for ms in row):
            raise ValueError(f"{self.name}: every time must be a positive number of milliseconds")


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Times of every layer of a network.

    Attributes:
      device: on which they were measured.
      batch: images per call.
      layers: as in the topology.
    """

    device: str
    batch: int
    layers: tuple[LayerTimes, ...]

    def ms(self, topology: Topology, widths: Any = None) -> Any:
        """Milliseconds per batch of all layers together.

        Args:
          topology: of the network.
          widths: channels per gate, None for the whole network; below the smallest measured width, that one's time.

        Returns:
          A float for integer widths, else a float32 scalar that is differentiable in the widths.

        Raises:
          ValueError: the number of widths is not that of the gates.
        """
        channels = flops.channels(topology, widths)
        on_host = isinstance(channels, np.ndarray)
        xp, kind = (np, np.float64) if on_host else (jnp, np.float32)
        gates, knots, times = _arrays(self, topology)
        times = xp.asarray(times, kind)
        (i, s), (j, t) = (
            _locate(xp, axis_knots.astype(kind), channels[axis_gates].astype(kind))
            for axis_gates, axis_knots in zip(gates, knots, strict=True)
        )
        rows = np.arange(len(times))
        below = (1 - t) * times[rows, i, j] + t * times[rows, i, j + 1]
        above = (1 - t) * times[rows, i + 1, j] + t * times[rows, i + 1, j + 1]
        result = xp.sum((1 - s) * below + s * above)
        return float(result) if on_host else result

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON; `load` gives back the same numbers, bit for bit."""
        write_json_atomic(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path, topology: Topology) -> Self:
        """Reads what `save` wrote, or a table of another device in the same form.

        Raises:
          ValueError: the file holds no table, or one of another network.
        """
        try:
            content = json.loads(Path(path).read_text())
            layers = tuple(
                LayerTimes(**{name: _as_tuple(value) for name, value in layer.items()}) for layer in content["layers"]
            )
            table = cls(str(content["device"]), int(content["batch"]), layers)
            if len(layers) != len(topology.layers):
                raise ValueError(f"it has {len(layers)} layers, the network {len(topology.layers)}")
            for times, layer in zip(layers, topology.layers, strict=True):
                times.check(layer, topology)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no latency table of this network ({error}); delete it, and it is measured again."
            ) from error
        return table


def measured_once(
    path: Path, model: nn.Module, topology: Topology, batch: int, points: int, multiple: int
) -> LatencyTable:
    """The table in `path`, measured and written there first where there is none; further arguments as for `measure`.

    In a run of several processes all must call; the first one measures, and all read the same numbers.
    """
    if parallel.any_process(not path.exists()):
        calls = _calls(model, topology, batch)  # every process refuses what cannot be measured, or none
        path.parent.mkdir(parents=True, exist_ok=True)
        parallel.on_first_process(lambda: _measure(calls, topology, batch, points, multiple).save(path))
    table = LatencyTable.load(path, topology)
    if table.batch != batch:
        raise ValueError(
            f"{path} was measured with {table.batch} images per call, this run has {batch}; delete it, and it is "
            "measured again."
        )
    return table


def measure(model: nn.Module, topology: Topology, batch: int, points: int = 5, multiple: int = 1) -> LatencyTable:
    """Compiles and times every layer by itself on the present device.

    Args:
      model: the network.
      topology: what `trace` found for it.
      batch: images per call.
      points: widths per gate, evenly spaced from the smallest to the whole; at least 2.
      multiple: the widths are multiples of this, except the whole.

    Raises:
      ValueError: a layer is not flax's convolution or dense layer.
    """
    return _measure(_calls(model, topology, batch), topology, batch, points, multiple)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


@functools.cache
def _arrays(table: LatencyTable, topology: Topology) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gates (2, N), knots (2, N, G) and times (N, G, G) of N layers, of which the first axis is (input, output)."""
    one = len(topology.gates)
    gates = [(layer.in_gate, layer.out_gate) for layer in topology.layers]
    grids = [(layer.inputs or (1,), layer.outputs or (1,)) for layer in table.layers]
    size = max(2, *(len(grid) for pair in grids for grid in pair))
    times = [
        np.pad(layer.ms, [(0, size - len(grid)) for grid in pair], mode="edge")
        for layer, pair in zip(table.layers, grids, strict=True)
    ]
    knots = [[[*grid, *(grid[-1] + 1 + n for n in range(size - len(grid)))] for grid in pair] for pair in grids]
    return (
        np.array([[one if gate is None else gate for gate in pair] for pair in gates], np.int64).T,
        np.array(knots, np.float64).swapaxes(0, 1),
        np.array(times, np.float64),
    )


def _locate(xp: Any, knots: np.ndarray, widths: Any) -> tuple[Any, Any]:
    """Where widths (N,) are among knots (N, G): the knot below, and the fraction of the way to the next one."""
    rows = np.arange(len(knots))
    widths = xp.where(widths > knots[:, 0], widths, knots[:, 0])
    below = xp.sum(xp.asarray(knots[:, 1:-1]) < widths[:, None], axis=1)  # at a knot: the slope of smaller widths
    first, second = xp.asarray(knots)[rows, below], xp.asarray(knots)[rows, below + 1]
    return below, (widths - first) / (second - first)


def _calls(model: nn.Module, topology: Topology, batch: int) -> list[Call]:
    """Of each layer of the topology: its module, by itself, and the input of its call."""
    owners = {layer.path[1:-1] for layer in topology.layers}
    found: dict[ModulePath, deque[Call]] = {path: deque() for path in owners}

    def record(next_fun: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and context.module.path in owners and args:
            alone = context.module.clone(parent=None, name=None)
            found[context.module.path].append((alone, jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)))
        return next_fun(*args, **kwargs)

    images = jax.ShapeDtypeStruct((batch, *topology.input_shape), jnp.float32)
    with nn.intercept_methods(record):
        kwargs = dict(topology.call_kwargs)
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **kwargs), images)
        for calls in found.values():
            calls.clear()
        jax.eval_shape(lambda v, x: model.apply(v, x, **kwargs), variables, images)
    return [_checked(layer, found[layer.path[1:-1]]) for layer in topology.layers]


def _checked(layer: Layer, calls: deque[Call]) -> Call:
    if not calls or not layer.path or not isinstance(calls[0][0], nn.Conv | nn.Dense):
        raise ValueError(
            f"layer {layer.name} cannot be timed by itself: it is not one call of flax's Conv or Dense; "
            "use budget.kind='flops' or 'params', or measure it yourself and put latency.json into the workdir."
        )
    return calls.popleft()


def _measure(calls: list[Call], topology: Topology, batch: int, points: int, multiple: int) -> LatencyTable:
    grids = [_knots(gate.channels, points, multiple) for gate in topology.gates]
    known: dict[str, float] = {}  # networks repeat their layers

    def milliseconds(call: Call) -> float:
        geometry = repr(call)
        if geometry not in known:
            known[geometry] = _milliseconds(*call)
        return known[geometry]

    layers = []
    for layer, call in tqdm(list(zip(topology.layers, calls, strict=True)), desc="latency table", unit="layer"):
        inputs, outputs = (() if gate is None else grids[gate] for gate in (layer.in_gate, layer.out_gate))
        ms = tuple(
            tuple(milliseconds(_resized(call, layer, topology, a, b)) for b in outputs or (None,))
            for a in inputs or (None,)
        )
        layers.append(LayerTimes(layer.name, layer.kernel_shape, layer.positions, inputs, outputs, ms))
    return LatencyTable(jax.devices()[0].device_kind, batch, tuple(layers))


def _knots(channels: int, points: int, multiple: int) -> tuple[int, ...]:
    """Measured widths of a gate: multiples, evenly spaced, from the smallest to the whole."""
    smallest = min(multiple, channels)
    spaced = np.round(np.linspace(smallest, channels, points) / multiple).astype(int) * multiple
    return tuple(sorted({*(min(max(int(width), smallest), channels) for width in spaced[:-1]), channels}))


def _resized(call: Call, layer: Layer, topology: Topology, a: int | None, b: int | None) -> Call:
    """A layer's module and input with widths a of its input gate and b of its output gate; None is the whole."""
    module, x = call
    shape = list(x.shape)
    if a is not None:
        readers = topology.gates[layer.in_gate].readers
        reader = next(reader for reader in readers if reader.path == layer.path[1:-1])
        shape[reader.axis] = reader.outer * a * reader.inner
    if b is not None:
        module = module.clone(features=layer.outputs // topology.gates[layer.out_gate].channels * b)
        if layer.groups > 1:  # depthwise: the gate's channels are its input too
            module = module.clone(feature_group_count=b)
            shape[-1] = b
    return module, jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def _milliseconds(module: nn.Module, x: jax.ShapeDtypeStruct) -> float:
    """Median time of a compiled call."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    variables, images = jax.tree.map(_filled, (shapes, x))
    call = jax.jit(module.apply).lower(variables, images).compile()
    first, second = next(_rounds(call, variables, images, 1)), next(_rounds(call, variables, images, 1))
    calls = max(1, math.ceil(ROUND_MS / min(first, second)))
    return statistics.median(itertools.islice(_rounds(call, variables, images, calls), ROUNDS))


def _rounds(call: Any, variables: Any, images: jax.Array, calls: int) -> Iterator[float]:
    """Milliseconds per call, round by round; the calls of a round wait for each other on the device alone."""
    while True:
        started = time.perf_counter()
        for _ in range(calls):
            result = call(variables, images)
        jax.block_until_ready(result)
        yield 1e3 * (time.perf_counter() - started) / calls


def _filled(x: jax.ShapeDtypeStruct) -> jax.Array:
    """An array without zeros or denormal numbers in masses."""
    return jnp.linspace(-1, 1, math.prod(x.shape), dtype=x.dtype).reshape(x.shape)
