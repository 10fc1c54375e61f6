"""The layers of a network one by one, as functions that can be timed with any number of channels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from ddnp_jax.models.layers import depthwise_conv
from ddnp_jax.networks import as_network
from ddnp_jax.topology import Layer, Topology, jaxprs, variable_shapes


class LayerCall(NamedTuple):
    """One convolution or matrix product, by itself.

    Attributes:
      primitive: "conv_general_dilated" or "dot_general".
      arguments: Further arguments of the function of this name in `jax.lax`, (name, value).
      x: Shape of the layer's input.
      kernel: Shape of the kernel.
      operand: Which operand the input is.
      read_axis: Axis of the input that is contracted; the channels of a grouped convolution.
      axes: Axes of the kernel's input and output channels.
      groups: Feature groups.
      dtype: Data type of the input.
      by_platform: Whether it is `models.layers.depthwise_conv`, in the form that suits the platform.
    """

    primitive: str
    arguments: tuple[tuple[str, Any], ...]
    x: tuple[int, ...]
    kernel: tuple[int, ...]
    operand: int
    read_axis: int
    axes: tuple[int, int]
    groups: int
    dtype: Any
    by_platform: bool

    def resized(self, inputs: int | None, outputs: int | None) -> "LayerCall":
        """The same layer with other numbers of input and output channels; None for those that it has."""
        x, kernel, groups = list(self.x), list(self.kernel), self.groups
        if inputs is not None:
            x[self.read_axis] = kernel[self.axes[0]] = inputs
        if outputs is not None:
            kernel[self.axes[1]] = outputs
            if groups > 1:  # whole groups stay or go
                x[self.read_axis] = self.x[self.read_axis] * outputs // self.kernel[self.axes[1]]
                groups = groups * outputs // self.kernel[self.axes[1]]
        return self._replace(x=tuple(x), kernel=tuple(kernel), groups=groups)

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Computes the layer."""
        arguments = dict(self.arguments)
        if self.by_platform:
            padding = arguments["padding"]
            arguments = {name: arguments[name] for name in ("window_strides", "dimension_numbers")}
            return depthwise_conv(x, kernel, padding=padding, feature_group_count=self.groups, **arguments)
        operands = (x, kernel) if self.operand == 0 else (kernel, x)
        if self.primitive == "conv_general_dilated":
            arguments["feature_group_count"] = self.groups
        return getattr(lax, self.primitive)(*operands, **arguments)


_ARGUMENTS = {
    "conv_general_dilated": (
        *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision"),
        "preferred_element_type",
    ),
    "dot_general": ("dimension_numbers", "precision", "preferred_element_type"),
}


def layer_calls(model: Any, topology: Topology, batch: int, variables: Any) -> list[LayerCall]:
    """Every layer of the topology by itself, as the network calls it.

    Args:
      model: The network.
      topology: Topology of `model`, as returned by `trace`.
      batch: Images per call.
      variables: Variables of a function, or their shapes; None of a module.
    """
    network = as_network(model, **dict(topology.call_kwargs))
    images = jax.ShapeDtypeStruct((batch, *topology.input_shape), jnp.float32)
    shapes = variable_shapes(network, images, variables)
    program = jax.make_jaxpr(network.evaluate)(shapes, images).jaxpr
    found = list(jaxprs.contractions(program))
    return [_call(found[layer.contraction], layer) for layer in topology.layers]


def _call(eqn: core.JaxprEqn, layer: Layer) -> LayerCall:
    name = eqn.primitive.name
    x, kernel = (eqn.invars[operand] for operand in (layer.operand, 1 - layer.operand))
    x_shape, kernel_shape = jaxprs.shape_of(x), jaxprs.shape_of(kernel)
    numbers = eqn.params["dimension_numbers"]
    if name == "conv_general_dilated":
        read_axis, axes = numbers.lhs_spec[1], (numbers.rhs_spec[1], numbers.rhs_spec[0])
    else:
        read_axis, contracted = numbers[0][layer.operand][0], numbers[0][1 - layer.operand]
        free = [axis for axis in range(len(kernel_shape)) if axis not in contracted]
        axes = (contracted[0], free[-1] if free else 0)
    arguments = tuple((key, eqn.params[key]) for key in _ARGUMENTS[name])
    return LayerCall(
        name,
        arguments,
        x_shape,
        kernel_shape,
        layer.operand,
        read_axis,
        axes,
        layer.groups,
        jaxprs.dtype_of(x),
        layer.by_platform,
    )
