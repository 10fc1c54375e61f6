"""Times of an entire network at any widths, on the current device or in ONNX Runtime."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax import cpu, export
from ddnp_jax.compact import Rebuild, compact
from ddnp_jax.cost import timing
from ddnp_jax.networks import as_network, stand_ins
from ddnp_jax.topology import Selection, Topology, variable_shapes

XLA, ONNX = "xla", "onnx"
RUNTIMES = (XLA, ONNX)  # XLA on the current device, ONNX Runtime on the CPU
SECONDS = 2.0  # spent on timing several networks; the ratio of two scatters by 1 to 2 % then


@dataclasses.dataclass(frozen=True)
class NetworkTimer:
    """Times a network at any widths.

    Attributes:
      model: The network.
      topology: Topology of `model`, as returned by `trace`.
      batch: Images per call.
      runtime: One of `RUNTIMES`.
      variables: Variables of a function, or their shapes; None of a module.
      rebuild: Makes a smaller network from the channels per gate, as for `compact`.
    """

    model: Any
    topology: Topology
    batch: int
    runtime: str = XLA
    variables: Any = None
    rebuild: Rebuild | None = None

    @property
    def device(self) -> str:
        """What computes the network."""
        return device_of(self.runtime)

    def ms(self, every_widths: Sequence[Sequence[int]]) -> list[float]:
        """Median milliseconds per batch at several widths, interleaved.

        Args:
          every_widths: Channels per gate, of every network.
        """
        return timing.in_turn([self._compiled(widths) for widths in every_widths], seconds=SECONDS)

    def fraction(self, widths: Sequence[int]) -> float:
        """The fraction of the unpruned network's time that it takes at `widths`: the median over interleaved rounds."""
        whole, cut = timing.rounds([self._unpruned, self._compiled(widths)], SECONDS).T
        return float(np.median(cut / whole))

    @functools.cached_property
    def _unpruned(self) -> Callable[[], Any]:
        return self._compiled(self.topology.widths)

    def _compiled(self, widths: Sequence[int]) -> Callable[[], Any]:
        model, variables = self._drawn
        small, own = compact(model, variables, Selection.first(widths), self.topology, self.rebuild)
        network = as_network(small, **dict(self.topology.call_kwargs))
        images = jax.ShapeDtypeStruct((self.batch, *self.topology.input_shape), jnp.float32)
        return compiled(self.runtime, network.evaluate, jax.device_put(network.variables(own)), filled(images))

    @functools.cached_property
    def _drawn(self) -> tuple[Any, Any]:
        """The unpruned network with random variables."""
        network = as_network(self.model, **dict(self.topology.call_kwargs))
        images = jax.ShapeDtypeStruct((self.batch, *self.topology.input_shape), jnp.float32)
        return network.bind(stand_ins.random(variable_shapes(network, images, self.variables)))


def device_of(runtime: str) -> str:
    """What a runtime computes on; a CPU by its name and cores, because times hold only for CPUs of the same kind."""
    if runtime == ONNX:
        return f"ONNX Runtime, {cpu.description()}"
    device = jax.devices()[0]
    return cpu.description() if device.platform == "cpu" else device.device_kind


def compiled(runtime: str, function: Callable[[Any, Any], Any], variables: Any, x: jax.Array) -> Callable[[], Any]:
    """Compiles a function of variables and an array for a runtime; the result takes no arguments."""
    if runtime == ONNX:
        session, read = export.in_onnx_runtime(functools.partial(function, variables), x.shape), np.asarray(x)
        return lambda: session(read)
    call = jax.jit(function).lower(variables, x).compile()
    return lambda: call(variables, x)


def filled(x: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array with few zeros and denormal numbers."""
    return jnp.linspace(-1, 1, math.prod(x.shape), dtype=x.dtype).reshape(x.shape)
