"""The names and memory layout of a network's variables in PyTorch, and the size of images that match given weights."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax.networks import LeafPath, ModulePath, Network, as_network, flatten
from ddnp_jax.topology import Flattened, Topology, trace, variable_shapes

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

# Image sizes to try if the shape is not given: preferred sides, and an upper limit for all others.
SIDES, LARGEST_SIDE = (224, 32, 28, 64, 96, 128, 256, 299, 384, 512), 1024
BATCH = 2  # number of images in the calls that are tried; these are only traced


class Tensor(NamedTuple):
    """A variable and its conversion to a PyTorch tensor.

    Attributes:
      path: Path of the variable.
      shape: Shape of the variable.
      flattened: Where its axes hold both pixels and channels.
      transposed: For the kernel of a transposed convolution: whether it is (*spatial, out, in) and not
        (*spatial, in, out). None for all other variables.
    """

    path: LeafPath
    shape: tuple[int, ...]
    flattened: tuple[Flattened, ...]
    transposed: bool | None

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in PyTorch of this variable if it has the given `shape` here."""
        if self.path[-1] != "kernel" or len(shape) != len(self.shape):
            return shape
        return tuple(shape[i] for i in self._axes)

    def to_torch(self, leaf: Any) -> np.ndarray:
        """Converts the variable to a writable float32 array with PyTorch's axes and order."""
        array = np.asarray(leaf, np.float32)
        for axis, order in self._orders():
            array = np.take(array, order, axis)
        if self.path[-1] == "kernel":
            array = np.transpose(self._turned(array), self._axes)
        return np.array(array, order="C")

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_torch`; the result may share the array's memory."""
        if self.path[-1] == "kernel":
            array = self._turned(np.transpose(array, np.argsort(self._axes)))
        for axis, order in self._orders():
            array = np.take(array, np.argsort(order), axis)
        return array

    @property
    def _axes(self) -> tuple[int, ...]:
        """The axes of a kernel in PyTorch's order."""
        *spatial, before, last = range(len(self.shape))
        return (before, last, *spatial) if self.transposed is False else (last, before, *spatial)

    def _turned(self, kernel: np.ndarray) -> np.ndarray:
        """Flips the spatial axes of a transposed convolution's kernel, if flax and PyTorch differ.

        In PyTorch, a transposed convolution is the gradient of a convolution. In flax, it is a convolution of the
        dilated image.
        """
        return np.flip(kernel, tuple(range(kernel.ndim - 2))) if self.transposed is False else kernel

    def _orders(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (axis, positions in PyTorch's order) for all axes whose order differs in PyTorch."""
        for axis in sorted({each.axis for each in self.flattened}):
            order = np.arange(self.shape[axis])
            for each in self.flattened:
                if each.axis == axis:
                    part = slice(each.start, each.start + each.length)
                    order[part] = self._channels_first(each, order[part])
            yield axis, order

    def _channels_first(self, flattened: Flattened, positions: np.ndarray) -> np.ndarray:
        lengths, kinds = zip(*flattened.parts, strict=True)
        if None in kinds:
            raise ValueError(
                f"variable {'/'.join(self.path)} holds pixels and channels on axis {flattened.axis} in an order that "
                "cannot be determined, nor can PyTorch's; use a single reshape, from or to (N, H, W, C)."
            )
        return positions.reshape(lengths).transpose(np.argsort(kinds, kind="stable")).reshape(-1)


class Layout(NamedTuple):
    """A network's tensors in PyTorch.

    Attributes:
      topology: Topology of the network, for one shape of images.
      tensors: The tensors by PyTorch's name.
      group_norms: Number of groups of the group normalizations by PyTorch's name.
    """

    topology: Topology
    tensors: Mapping[str, Tensor]
    group_norms: Mapping[str, int]


def torch_network(model: Any) -> Network:
    """Wraps a module as a network.

    Raises:
      ValueError: The model is a function, which has no modules from which tensors get their names.
    """
    network = as_network(model)
    if network.kind == "function":
        raise ValueError(
            f"{network.name} is a function, and PyTorch's names are derived from those of modules; give a flax.linen "
            "or flax.nnx module."
        )
    return network


def _torch_name(network: Network, path: LeafPath) -> str:
    """PyTorch's name of a leaf."""
    module, leaf = _torch_module(network.module_of(path)), path[-1]
    return ".".join([*filter(None, [module]), LEAVES.get(leaf, leaf)])


def _torch_module(path: ModulePath) -> str:
    """PyTorch's name of a module."""
    return ".".join(re.sub(r"_(\d+)(?=_|$)", r".\1", module) for module in path)


def weights_by_name(network: Network, variables: Any) -> dict[str, tuple[LeafPath, Any]]:
    """Returns (path, leaf) of all weights by PyTorch's name; the state of random streams is left out."""
    named: dict[str, tuple[LeafPath, Any]] = {}
    for path, leaf in flatten(variables).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        name = _torch_name(network, path)
        if name in named:
            raise ValueError(
                f"the variables {'/'.join(named[name][0])} and {'/'.join(path)} would both be {name!r} in PyTorch; "
                "rename one of their modules."
            )
        named[name] = path, leaf
    return named


def check_fit(shapes: Mapping[str, tuple[int, ...]], layout: Layout, source: str) -> None:
    """Raises ValueError for the first tensor that is missing, unexpected or of another shape."""
    misfit = f"{source} does not fit the model:"
    advice = "load it into a model of the same architecture, widths and number of classes."
    wanted = {name: tensor.torch_shape(tensor.shape) for name, tensor in layout.tensors.items()}
    for name, shape in shapes.items():
        if name not in wanted:
            raise ValueError(f"{misfit} it has {name!r} of shape {shape}, which the model lacks; {advice}")
        if shape != wanted[name]:
            raise ValueError(f"{misfit} {name!r} has shape {shape}, the model's is {wanted[name]}; {advice}")
    for name, shape in wanted.items():
        if name not in shapes:
            raise ValueError(f"{misfit} it lacks {name!r} of shape {shape}; {advice}")


# ---- the shape of an image, which determines the order of a dense layer's rows after a flatten


def layout_at(network: Network, input_shape: Sequence[int]) -> Layout:
    """The layout for images of one shape; the network is only traced."""
    images = _images(input_shape)
    topology = trace(network.model, tuple(input_shape))
    shapes = variable_shapes(network, images)
    transposed = network.transposed(shapes, images)
    flattened = {variable.path: variable.flattened for variable in topology.variables}
    tensors = {
        name: Tensor(path, leaf.shape, flattened[path], transposed.get(path))
        for name, (path, leaf) in weights_by_name(network, shapes).items()
    }
    group_norms = {_torch_module(path): count for path, count in network.group_norms(shapes, images).items()}
    return Layout(topology, tensors, group_norms)


def _images(input_shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((BATCH, *input_shape), jnp.float32)


def any_layout(network: Network) -> Layout:
    """The layout for the first image size of `SIDES` that the network accepts."""
    channels = {3: None, 1: None}
    if network.kind == "nnx":  # the layers of an nnx module have fixed sizes
        kernels = (leaf.shape for path, leaf in flatten(network.variables(None)).items() if path[-1] == "kernel")
        channels |= {shape[-2]: None for shape in kernels if len(shape) > 2}
    shapes = [(side, side, count) for count in channels for side in SIDES]
    found = next((shape for shape in shapes if _weights_at(network, shape) is not None), None)
    if found is None:
        raise ValueError(
            f"{network.name} cannot be called with square images of {', '.join(map(str, SIDES))} pixels; give "
            "input_shape=(H, W, C), the shape of one image."
        )
    return layout_at(network, found)


def _weights_at(network: Network, input_shape: Sequence[int]) -> dict[str, int] | None:
    """Number of elements of each tensor by PyTorch's name; None if the network does not accept such images."""
    images = _images(input_shape)
    try:
        shapes = variable_shapes(network, images)
        outputs = jax.tree.leaves(jax.eval_shape(network.evaluate, shapes, images))
    except Exception:  # the network's own code may raise any error
        return None
    if all(output.shape[:1] != (BATCH,) for output in outputs):  # a reshape to (-1, fixed) has changed the batch size
        return None
    return {name: math.prod(leaf.shape) for name, (_, leaf) in weights_by_name(network, shapes).items()}


def fitting_layout(network: Network, layout: Layout, shapes: Mapping[str, tuple[int, ...]], source: str) -> Layout:
    """The layout for images of a size with which the network's tensors have the given shapes, if there is one."""
    layout = _with_channels(network, layout, shapes)
    side, _, channels = layout.topology.input_shape
    misfits = {
        name: math.prod(shape)
        for name, shape in shapes.items()
        if name in layout.tensors and shape != layout.tensors[name].torch_shape(layout.tensors[name].shape)
    }
    if misfits and network.kind == "linen":
        other = next(filter(None, (_weights_at(network, (n, n, channels)) for n in SIDES if n != side)), {})
        changing = {n: m for n, m in misfits.items() if other.get(n) != math.prod(layout.tensors[n].shape)}
        if changing:
            fitting, name = _side(network, channels, changing), next(iter(changing))
            if fitting is None:
                raise ValueError(
                    f"{source} does not fit the model for any square image: {name!r} has shape {shapes[name]}; give "
                    "input_shape=(H, W, C), the shape of one image."
                )
            layout = layout_at(network, (fitting, fitting, channels))
    _check_known(layout, source)
    return layout


def _with_channels(network: Network, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout for images with as many channels as the first layer's weights, if the network accepts any number."""
    side = layout.topology.input_shape[0]
    first = next(iter(layout.topology.layers), None)
    if network.kind == "nnx" or first is None:
        return layout
    name = next((name for name, tensor in layout.tensors.items() if tensor.path == first.path), "")
    shape = shapes.get(name, ())
    if len(shape) != len(first.kernel_shape) or _reads_pixels(layout.tensors[name]):
        return layout
    reads = 1 if layout.tensors[name].transposed is None else 0
    own = layout.tensors[name].torch_shape(layout.tensors[name].shape)
    return layout if shape[reads] == own[reads] else layout_at(network, (side, side, shape[reads] * first.groups))


def _reads_pixels(tensor: Tensor) -> bool:
    """Whether a tensor is the kernel of a dense layer after a flatten."""
    return len(tensor.shape) == 2 and any(each.axis == 0 for each in tensor.flattened)


def _side(network: Network, channels: int, wanted: Mapping[str, int]) -> int | None:
    """Side of square images with which the tensors have the wanted numbers of elements; None if there is none.

    If an axis holds pixels and channels, their order depends only on the number of pixels, and not on H and W.
    """

    def excess(side: int) -> int:
        """Number of elements above the wanted number; a side that the network does not accept counts as too small."""
        found = _weights_at(network, (side, side, channels))
        return -1 if found is None else sum(found[name] - count for name, count in wanted.items())

    low, high = 1, LARGEST_SIDE
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if excess(middle) >= 0 else (middle + 1, high)
    return next((side for side in (low, *SIDES) if _weights_at_are(network, (side, side, channels), wanted)), None)


def _weights_at_are(network: Network, input_shape: Sequence[int], wanted: Mapping[str, int]) -> bool:
    found = _weights_at(network, input_shape)
    return found is not None and all(found[name] == count for name, count in wanted.items())


def _check_known(layout: Layout, source: str) -> None:
    """Raises if the order of a tensor depends on more than the shapes tell: the numbers of pixels and channels."""
    paths = {tensor.path: tensor for tensor in layout.tensors.values()}
    first = paths.get(layout.topology.layers[0].path) if layout.topology.layers else None
    for tensor in layout.tensors.values():
        axes = [each.axis for each in tensor.flattened]
        several = len(set(axes)) < len(axes) or any(len(each.parts) > 2 for each in tensor.flattened)
        if several or (tensor is first and _reads_pixels(tensor)):
            raise ValueError(
                f"{source} does not tell the order of the numbers in {'/'.join(tensor.path)}, which depends on the "
                "size of the images; give input_shape=(H, W, C), the shape of one image."
            )
