"""The two static types that the library is built around: `Topology` and `Selection`."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddnp_jax import files
from ddnp_jax.networks import LeafPath, flatten
from ddnp_jax.topology.axis_groups import WHOLE_AXIS, Span


@dataclasses.dataclass(frozen=True)
class Slice:
    """Where a gate's channels are in a variable.

    Attributes:
      path: Path of the leaf, for example ("params", "conv1", "kernel").
      axis: Axis of the leaf.
      span: Where on the axis.
    """

    path: LeafPath
    axis: int
    span: Span = WHOLE_AXIS


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Where a gate's channels are in the input of a layer that reads them; a mask multiplies them there.

    Attributes:
      layer: Number of the layer in `Topology.layers`.
      axis: Axis of the layer's input.
      span: Where on the axis.
    """

    layer: int
    axis: int
    span: Span = WHOLE_AXIS


@dataclasses.dataclass(frozen=True)
class Gate:
    """A place in the network where channels can be removed.

    Attributes:
      name: Name of the first layer that produces the channels, for example "layer1_0/conv1".
      channels: Number of channels in the unpruned network. If channels can only be removed by whole groups (group
        normalization, grouped convolutions), the number of groups.
      slices: The axes of all variables that hold these channels.
      consumers: The layers whose input holds them, in the order of the forward pass.
      producers: The kernels that produce these channels, in the order of the forward pass, except depthwise ones. A
        channel's L1 norm is the sum over all other axes of the kernel.
    """

    name: str
    channels: int
    slices: tuple[Slice, ...]
    consumers: tuple[Consumer, ...]
    producers: tuple[Slice, ...]


@dataclasses.dataclass(frozen=True)
class Extent:
    """The length of an axis as a function of the widths: `constant + sum(count * widths[gate])`.

    Attributes:
      constant: Positions that are always kept.
      counts: (gate, positions per channel of the gate).
    """

    constant: int
    counts: tuple[tuple[int, int], ...] = ()

    def at(self, widths: Any) -> Any:
        """The length at widths (L,), which may be traced and fractional."""
        return self.constant + sum(count * widths[gate] for gate, count in self.counts)

    @property
    def gates(self) -> tuple[int, ...]:
        """The gates on this axis."""
        return tuple(gate for gate, _ in self.counts)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or dense layer, once per use in the forward pass.

    Attributes:
      name: Name of the module, for example "layer1_0/conv1".
      path: Path of the kernel, or of the variable that it is computed from; empty where it is computed from several.
      contraction: Number among all convolutions and matrix products of the traced program.
      operand: Index of the operand that is the layer's input, 0 or 1.
      kernel_shape: Shape of the kernel.
      groups: Feature groups of a convolution, else 1.
      positions: How often the kernel is applied per image: H * W of the output of a convolution, of the input of a
        transposed one.
      inputs: Length of the kernel's input axis; 1 for a depthwise convolution.
      outputs: Length of the kernel's output axis.
      by_platform: Whether each platform has its own implementation, inside `jax.lax.platform_dependent`.
    """

    name: str
    path: LeafPath
    contraction: int
    operand: int
    kernel_shape: tuple[int, ...]
    groups: int
    positions: int
    inputs: Extent
    outputs: Extent
    by_platform: bool = False

    @property
    def gates(self) -> tuple[int, ...]:
        """The gates that the layer reads or produces."""
        return tuple(dict.fromkeys(self.inputs.gates + self.outputs.gates))


@dataclasses.dataclass(frozen=True)
class Flattened:
    """Pixels and channels of an image that lie together on an axis of a variable, because a reshape put them there.

    Attributes:
      axis: Axis of the variable.
      start: Position of the first one.
      parts: (length, whether it is pixels) in row-major order, for example ((49, True), (512, False)) of an image of
        7 x 7 pixels and 512 channels; None in place of the latter where it is not known.
    """

    axis: int
    start: int
    parts: tuple[tuple[int, bool | None], ...]

    @property
    def length(self) -> int:
        """How many positions of the axis it takes."""
        return math.prod(length for length, _ in self.parts)


@dataclasses.dataclass(frozen=True)
class Variable:
    """A leaf of the variables.

    Attributes:
      path: Its path.
      shape: Its shape.
      parameter: Whether it counts as a parameter; batch statistics do not.
      flattened: Where its axes hold both pixels and channels: the rows of a dense layer behind a flatten, for example.
    """

    path: LeafPath
    shape: tuple[int, ...]
    parameter: bool
    flattened: tuple[Flattened, ...] = ()


@dataclasses.dataclass(frozen=True)
class Topology:
    """The gates and layers of a network; static, hashable and without arrays.

    Attributes:
      input_shape: Shape of one image, without the batch.
      call_kwargs: Additional keyword arguments of the traced call.
      gates: The gates, in the order of their producers in the forward pass.
      layers: The layers, in the order of the forward pass.
      unprunable: (layers that produce the channels, reason) of all groups of channels that cannot be removed.
      variables: All leaves of the variables.
    """

    input_shape: tuple[int, ...]
    call_kwargs: tuple[tuple[str, Any], ...]
    gates: tuple[Gate, ...]
    layers: tuple[Layer, ...]
    unprunable: tuple[tuple[str, str], ...]
    variables: tuple[Variable, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each gate in the unpruned network."""
        return tuple(gate.channels for gate in self.gates)

    def check(self, variables: Any) -> None:
        """Checks that variables match the traced network.

        Raises:
          ValueError: A leaf is missing, unexpected or of another shape; the message names the first one.
        """
        found = {path: np.shape(leaf) for path, leaf in flatten(variables).items()}
        traced = {variable.path: variable.shape for variable in self.variables}
        for path in traced | found:
            own, wanted = found.get(path), traced.get(path)  # None: absent
            if own != wanted:
                raise ValueError(f"variable {'/'.join(path)} has shape {own}; the topology was traced with {wanted}.")

    def describe(self) -> str:
        """Returns the gates, the layers, the unprunable layers with reasons, and a summary, as text."""
        from ddnp_jax.topology.describe import describe

        return describe(self)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The channels to keep.

    Attributes:
      kept: Sorted indices of the kept channels, one tuple per gate.
    """

    kept: tuple[tuple[int, ...], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Kept channels per gate."""
        return tuple(map(len, self.kept))

    @classmethod
    def first(cls, widths: Iterable[int]) -> "Selection":
        """Selects the first channels of every gate.

        Args:
          widths: Number of channels per gate.
        """
        return cls(tuple(tuple(range(width)) for width in widths))

    def check(self, topology: Topology) -> None:
        """Checks that the selection matches a network.

        Raises:
          ValueError: The number of gates differs, or the indices of a gate are empty, unsorted or out of range.
        """
        if len(self.kept) != len(topology.gates):
            raise ValueError(f"the selection has {len(self.kept)} gates, the network {len(topology.gates)}.")
        for gate, kept in zip(topology.gates, self.kept, strict=True):
            if not kept:
                raise ValueError(f"gate {gate.name}: no channel is kept; keep at least one.")
            if any(a >= b for a, b in itertools.pairwise(kept)):
                raise ValueError(f"gate {gate.name}: kept channels must be ascending and different, got {kept}.")
            if kept[0] < 0 or kept[-1] >= gate.channels:
                raise ValueError(f"gate {gate.name}: kept channels must be in 0..{gate.channels - 1}, got {kept}.")

    def masks(self, topology: Topology) -> tuple[np.ndarray, ...]:
        """Returns float32 masks (C_l,), one per gate: 1 for kept channels, 0 for removed ones."""
        self.check(topology)
        return tuple(
            np.isin(np.arange(gate.channels), kept).astype(np.float32)
            for gate, kept in zip(topology.gates, self.kept, strict=True)
        )

    def positions(self, topology: Topology) -> Mapping[tuple[LeafPath, int], np.ndarray]:
        """Returns the kept positions on every axis that the selection shortens, by (path of the leaf, axis)."""
        self.check(topology)
        lengths = {variable.path: variable.shape for variable in topology.variables}
        stays: dict[tuple[LeafPath, int], np.ndarray] = {}
        for gate, mask in zip(topology.gates, self.masks(topology), strict=True):
            removed = np.flatnonzero(mask == 0)
            for cut in gate.slices if removed.size else ():
                axis = stays.setdefault((cut.path, cut.axis), np.ones(lengths[cut.path][cut.axis], bool))
                axis[cut.span.positions(gate.channels)[removed]] = False
        return {place: np.flatnonzero(axis) for place, axis in stays.items()}

    def save(self, path: str | Path) -> None:
        """Writes the selection as JSON; the file is replaced atomically."""
        files.write_json(path, {"kept": self.kept})

    @classmethod
    def load(cls, path: str | Path) -> "Selection":
        """Reads a selection written by `save`.

        Raises:
          ValueError: The file does not contain a selection.
        """
        try:
            kept = json.loads(Path(path).read_text())["kept"]
            if not all(type(c) is int for gate in kept for c in gate):
                raise TypeError("a channel is no integer")
            return cls(tuple(map(tuple, kept)))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold a selection ({error!r}); it needs a list of lists 'kept'."
            ) from error
