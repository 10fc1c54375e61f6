"""The interface of `Network`, and functions that all three kinds of networks share."""

import abc
import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.tree_util as jtu
from flax.core import meta

LeafPath = tuple[str, ...]  # names from the root of the variables to a leaf
ModulePath = tuple[str, ...]

# (path of a submodule, its attributes and their values), for example ((("conv1",), (("features", 7),)),).
Sizes = tuple[tuple[ModulePath, tuple[tuple[str, Any], ...]], ...]

Outputs = str | int | Callable[[Any], Any] | None  # how to select the outputs to use

# Arguments that switch modules between training and evaluation, with their values for evaluation.
MODES: dict[str, bool] = {
    "train": False,
    "training": False,
    "is_training": False,
    "is_train": False,
    "deterministic": True,
    "use_running_average": True,
}


class Resizing(NamedTuple):
    """The new sizes of a network's variables.

    Attributes:
      shapes: Old and new shape of every leaf whose shape changes, by path.
      groups: Old and new number of feature groups of every grouped convolution that changes, by path of the kernel.
    """

    shapes: Mapping[LeafPath, tuple[tuple[int, ...], tuple[int, ...]]]
    groups: Mapping[LeafPath, tuple[int, int]]


class Network(abc.ABC):
    """A network as pure functions of its variables.

    Attributes:
      kind: 'linen', 'nnx' or 'function'.
      model: The module or function.
    """

    kind: ClassVar[str]

    def __init__(self, model: Any, call_kwargs: Mapping[str, Any]) -> None:
        """Wraps a model; `call_kwargs` are additional keyword arguments for every call."""
        self.model = model
        self._call_kwargs = dict(call_kwargs)

    @property
    def name(self) -> str:
        """Name of the network in reports and messages."""
        return type(self.model).__name__

    @abc.abstractmethod
    def variables(self, given: Any) -> Any:
        """Returns the variables: `given`, or those that the model itself holds if `given` is None.

        Raises:
          ValueError: `given` is None, and the model holds no variables.
        """

    @abc.abstractmethod
    def initial(self, rng: jax.Array, images: Any) -> Any:
        """Initial variables; `images` (N, H, W, C) may be a `jax.ShapeDtypeStruct` under `jax.eval_shape`."""

    @abc.abstractmethod
    def evaluate(self, variables: Any, images: jax.Array) -> Any:
        """The outputs in evaluation mode."""

    @abc.abstractmethod
    def train(
        self, variables: Any, images: jax.Array, rng: jax.Array, batch_axis: str | None = None
    ) -> tuple[Any, Any]:
        """The outputs in training mode, and the variables with new batch statistics.

        Args:
          variables: Variables of the network.
          images: Images (N, H, W, C).
          rng: Random key for all random streams of the module.
          batch_axis: Name of the mapped axis over which batch normalization averages; None to average only over these
            images.
        """

    @abc.abstractmethod
    def split(self, variables: Any) -> tuple[Any, Any]:
        """Splits variables into (parameters, which the optimizer changes; all others)."""

    @abc.abstractmethod
    def merge(self, parameters: Any, rest: Any) -> Any:
        """The inverse of `split`."""

    @abc.abstractmethod
    def is_parameter(self, path: LeafPath) -> bool:
        """Whether a leaf counts as a parameter; batch statistics do not."""

    def module_of(self, path: LeafPath) -> ModulePath:
        """The module that a leaf belongs to."""
        return path[:-1]

    def layer_name(self, path: LeafPath) -> str:
        """Name of the layer that a kernel belongs to."""
        return "/".join(self.module_of(path)) or path[-1]

    @abc.abstractmethod
    def sizes(self, resizing: Resizing, variables: Any, images: Any) -> Sizes:
        """Returns the attributes of submodules that must change for variables of other sizes.

        Args:
          resizing: The new sizes.
          variables: Variables with the old sizes, or their shapes.
          images: One batch (N, H, W, C), or its shape.
        """

    @abc.abstractmethod
    def with_sizes(self, sizes: Sizes) -> Any:
        """Returns the model with other attributes of its submodules."""

    @abc.abstractmethod
    def saved_sizes(self) -> Sizes:
        """Returns the sizes with which `with_sizes` of the unpruned network builds this network."""

    @contextlib.contextmanager
    def calling(self, images: Any) -> Iterator[None]:
        """Context for a call of the model, which adds the arguments of the call to the message of any error.

        Args:
          images: Images (N, H, W, C) of the call, or their shape.

        Raises:
          ValueError: The call raised an error.
        """
        try:
            yield
        except Exception as error:
            given = "".join(f" and {name}={value!r}" for name, value in self._call_kwargs.items())
            raise ValueError(
                f"{self.name} cannot be called with images {tuple(images.shape)}{given}: {first_line(error)}"
                f"{layout_note(images.shape)}"
            ) from error

    def transposed(self, variables: Any, images: Any) -> Mapping[LeafPath, bool]:
        """Kernels of transposed convolutions whose module is known to be one; others look like ordinary convolutions.

        Args:
          variables: Variables of the network, or their shapes.
          images: One batch (N, H, W, C), or its shape.

        Returns:
          By path, whether the kernel is (*spatial, out, in), like that of the convolution that is transposed
          (`transpose_kernel`), and not (*spatial, in, out).
        """
        del variables, images
        return {}

    def group_norms(self, variables: Any, images: Any) -> Mapping[ModulePath, int]:
        """Number of groups of every group normalization whose module is known; arguments as for `transposed`."""
        del variables, images
        return {}

    def bind(self, variables: Any) -> tuple[Any, Any]:
        """Returns (model, variables) in the form that users work with: an nnx module holds its variables itself."""
        return self.model, variables


def mode_kwargs(call: Callable, given: Mapping[str, Any], training: bool) -> dict[str, Any]:
    """Returns the keyword arguments of a call in evaluation or training mode.

    Args:
      call: The function to call; every argument of `MODES` in its signature is set.
      given: Additional arguments; in evaluation mode, they take precedence over `MODES`.
      training: Whether the call is in training mode.
    """
    parameters = inspect.signature(call).parameters
    modes = {name: value != training for name, value in MODES.items() if name in parameters}
    return {**given, **modes} if training else {**modes, **given}


def flatten(variables: Any) -> dict[LeafPath, Any]:
    """Returns the leaves of a pytree by path, without flax's boxes for partitioning metadata."""
    flat, _ = jtu.tree_flatten_with_path(variables, is_leaf=_is_box)
    return {tuple(map(_name, path)): meta.unbox(leaf) for path, leaf in flat}


def replace_leaves(variables: Any, leaves: Mapping[LeafPath, Any]) -> Any:
    """Returns the same pytree with other leaves, in the same boxes for partitioning metadata."""

    def replace(path: Any, leaf: Any) -> Any:
        new = leaves[tuple(map(_name, path))]
        return leaf.replace_boxed(new) if _is_box(leaf) else new

    return jtu.tree_map_with_path(replace, variables, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def layout_note(shape: tuple[int, ...]) -> str:
    """Addition to a message if a shape of images (N, ...) seems to have the channels first; otherwise ""."""
    if len(shape) == 4 and shape[1] in (1, 3, 4) and min(shape[2:]) > 4:
        return "; images are (N, H, W, C), and these look like (N, C, H, W)."
    return ""


def picked(outputs: Any, which: Outputs, name: str = "the network") -> Any:
    """Selects the outputs to use, for example the logits among several.

    Args:
      outputs: What the network returns.
      which: A key or index, a function of the outputs, or None if the network returns a single array.
      name: Name of the network, for the message.

    Raises:
      ValueError: The network returns several arrays and `which` is None, or it has no output `which`.
    """
    if callable(which):
        return which(outputs)
    if which is not None:
        try:
            return getattr(outputs, which) if isinstance(which, str) and hasattr(outputs, which) else outputs[which]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{name} returns {structure(outputs)}, which has no outputs={which!r}.") from error
    arrays = jax.tree.leaves(outputs)
    if len(arrays) != 1:
        raise ValueError(
            f"{name} returns {structure(outputs)}; select one of them with outputs=, a key, an index, or a function."
        )
    return arrays[0]


def structure(arrays: Any) -> str:
    """The arrays of a pytree with their shapes, for messages."""
    found = jtu.tree_flatten_with_path(arrays)[0]
    return ", ".join(f"{jtu.keystr(path) or 'an array'} {getattr(leaf, 'shape', '')}" for path, leaf in found)


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message, for use in the message of another error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# ---- sizes as attributes of modules

_SIZE_NAMES = re.compile(r"feature|channel|filter|dim|width|plane|hidden|unit")


def is_size(name: str) -> bool:
    """Whether an attribute of this name may be a number of channels."""
    return _SIZE_NAMES.search(name.lower()) is not None


def size_attributes(
    integers: Mapping[str, int], leaves: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> dict[str, int]:
    """Returns new values of the attributes of a module that are sizes of its own leaves.

    If an attribute equals the old size of an axis, its new value is the new size of this axis. If several axes had this
    size, the last axis counts, which is that of the outputs.

    Args:
      integers: The module's integer attributes.
      leaves: Old and new shape of the module's own leaves.
    """
    new: dict[str, int] = {}
    for name, value in integers.items():
        if not is_size(name):
            continue
        axes = [
            (old[axis], cut[axis], len(old) - axis)
            for old, cut in leaves.values()
            for axis in range(len(old))
            if old[axis] == value
        ]
        if axes:
            new[name] = min(axes, key=lambda axis: axis[2])[1]
    return {name: value for name, value in new.items() if value != integers[name]}
