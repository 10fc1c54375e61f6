"""The data that channels can be scored by."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax.methods.base import Measured, Problem
from ddnp_jax.networks import LeafPath, flatten, replace_leaves
from ddnp_jax.topology import Gate, Slice, Topology


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The data that the channels of a network can be scored by, computed lazily.

    Attributes:
      topology: Topology of the network.
      variables: Its variables.
      rng: Source of random numbers, for scores that need no images.
      problem: The pruning problem, for scores that need images.
      batch: (images, targets), for scores that need images.
    """

    topology: Topology
    variables: Any
    rng: np.random.Generator | None = None
    problem: Problem | None = None
    batch: Any = None

    @functools.cached_property
    def leaves(self) -> dict[LeafPath, Any]:
        """The variables by path."""
        return flatten(self.variables)

    def filters(self, gate: int) -> list[np.ndarray]:
        """The kernels that produce a gate's channels, each as float64 (C_l, weights per channel)."""
        found = self.topology.gates[gate]
        return [_by_channel(np.float64(self.leaves[piece.path]), piece, found) for piece in found.producers]

    def norm_scales(self, gate: int) -> list[np.ndarray]:
        """The scales of the normalization layers of a gate's channels, each (C_l, n): n > 1 of channels in groups."""
        found = self.topology.gates[gate]
        pieces = [piece for piece in found.slices if piece.path[-1] == "scale"]
        return [_by_channel(np.float64(self.leaves[piece.path]), piece, found) for piece in pieces]

    def consuming_kernels(self, gate: int, arrays: Mapping[LeafPath, Any] | None = None) -> list[Any]:
        """The kernels of the layers that read a gate, each (C_l, n).

        Args:
          gate: Index of the gate.
          arrays: Arrays with the shapes of the kernels, by path, to use instead of the kernels.

        Raises:
          ValueError: A layer that reads the gate computes its kernel from several parameters.
        """
        found, arrays = self.topology.gates[gate], self.leaves if arrays is None else arrays
        return [_by_channel(arrays[piece.path], piece, found) for piece in self._consuming_slices(gate)]

    def _consuming_slices(self, gate: int) -> list[Slice]:
        found = self.topology.gates[gate]
        layers = [self.topology.layers[consumer.layer] for consumer in found.consumers]
        if computed := [layer.name for layer in layers if not layer.path]:
            raise ValueError(
                f"gate {found.name} is read by {computed[0]}, whose kernel is computed from several parameters, so "
                "that the loss of a channel is unknown; leave the gate unpruned with keep=, or use another method."
            )
        paths = {layer.path for layer in layers}
        return [piece for piece in found.slices if piece.path in paths and piece not in found.producers]

    @functools.cached_property
    def features(self) -> tuple[tuple[jax.Array, ...], ...]:
        """The features of every gate's channels, float32 (N, ..., C_l): one array per distinct tensor that layers read.

        They are (N, ..., m, C_l) where a channel has m > 1 positions, as in groups or after a flatten.
        """
        return self._observed[0]

    @functools.cached_property
    def _observed(self) -> tuple[tuple[tuple[jax.Array, ...], ...], Measured]:
        seen: list[list[jax.Array]] = [[] for _ in self.topology.gates]

        def observe(gate: int, features: jax.Array) -> None:
            seen[gate].append(features.astype(jnp.float32))  # bfloat16 matrices cannot be decomposed

        measured = self._problem.measure(self._ones, self.variables, self.batch, observe)
        return tuple(map(tuple, seen)), measured

    @functools.cached_property
    def gradients(self) -> tuple[jax.Array, ...]:
        """The gradient of each image's loss with respect to the masks of the unpruned network, (N, C_l) per gate."""
        return self._differentiated[0]

    @functools.cached_property
    def _differentiated(self) -> tuple[tuple[jax.Array, ...], Measured]:
        def one(masks: tuple[jax.Array, ...], image_and_target: Any) -> tuple[jax.Array, Measured]:
            measured = self._problem.measure(masks, self.variables, jax.tree.map(lambda x: x[None], image_and_target))
            return measured.loss, measured

        gradients, measured = jax.vmap(jax.grad(one, has_aux=True), in_axes=(None, 0))(self._ones, self.batch)
        return gradients, jax.tree.map(jnp.mean, measured)

    @property
    def kernel_effects(self) -> dict[LeafPath, jax.Array]:
        """The kernels W that read gates, multiplied by the gradient g of the loss with respect to W, by path."""
        return {path: gradient * self.leaves[path] for path, gradient in self._kernel_gradients[0].items()}

    @functools.cached_property
    def _kernel_gradients(self) -> tuple[dict[LeafPath, jax.Array], Measured]:
        gates = range(len(self.topology.gates))
        kernels = {piece.path: self.leaves[piece.path] for gate in gates for piece in self._consuming_slices(gate)}

        def loss(kernels: dict[LeafPath, jax.Array]) -> tuple[jax.Array, Measured]:
            variables = replace_leaves(self.variables, {**self.leaves, **kernels})
            measured = self._problem.measure(self._ones, variables, self.batch)
            return measured.loss, measured

        return jax.grad(loss, has_aux=True)(kernels)

    @property
    def _problem(self) -> Problem:
        if self.problem is None:
            raise ValueError("this score needs images; give the problem and a batch.")
        return self.problem

    @property
    def _ones(self) -> tuple[jax.Array, ...]:
        return tuple(jnp.ones(channels) for channels in self.topology.widths)

    def measured(self) -> Measured:
        """Results of the unpruned network on the batch, taken from a forward pass that was computed for the score."""
        known = [name for name in ("_differentiated", "_kernel_gradients") if name in self.__dict__]
        return getattr(self, known[0] if known else "_observed")[1]


def _by_channel(leaf: Any, piece: Slice, gate: Gate) -> Any:
    """The values of a leaf that belong to each channel of a gate, (C_l, n)."""
    others = [axis for axis in range(leaf.ndim) if axis != piece.axis]
    return leaf.transpose(piece.axis, *others)[piece.span.positions(gate.channels)].reshape(gate.channels, -1)
