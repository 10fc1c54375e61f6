"""What the three kinds of networks have in common."""

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

# Arguments by which modules are told their mode, with the values of evaluation.
MODES: dict[str, bool] = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


class Resizing(NamedTuple):
    """The new sizes of a network's variables.

    Attributes:
      shapes: Old and new shape of every leaf that changes.
      groups: Old and new number of feature groups of the convolutions that change them, by the path of the kernel.
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
        """Takes a model and the further keyword arguments of its calls."""
        self.model = model
        self._call_kwargs = dict(call_kwargs)

    @property
    def name(self) -> str:
        """What to call it in reports."""
        return type(self.model).__name__

    @abc.abstractmethod
    def variables(self, given: Any) -> Any:
        """The variables: `given`, or those inside of the model where it holds them.

        Raises:
          ValueError: None was given and the model holds none.
        """

    @abc.abstractmethod
    def initial(self, rng: jax.Array, images: Any) -> Any:
        """Variables to train from; `images` (N, H, W, C) may be a `jax.ShapeDtypeStruct` under `jax.eval_shape`."""

    @abc.abstractmethod
    def evaluate(self, variables: Any, images: jax.Array) -> Any:
        """The outputs in evaluation mode."""

    @abc.abstractmethod
    def train(
        self, variables: Any, images: jax.Array, rng: jax.Array, batch_axis: str | None = None
    ) -> tuple[Any, Any]:
        """The outputs in training mode, and the variables with new batch statistics.

        Args:
          variables: Of the network.
          images: (N, H, W, C).
          rng: From which every random stream of the module is drawn.
          batch_axis: The mapped axis over which batch normalization takes its means; None for this batch alone.
        """

    @abc.abstractmethod
    def split(self, variables: Any) -> tuple[Any, Any]:
        """(what the optimizer changes, the rest)."""

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
        """What to call the layer that a kernel belongs to."""
        return "/".join(self.module_of(path)) or path[-1]

    @abc.abstractmethod
    def sizes(self, resizing: Resizing, variables: Any, images: Any) -> Sizes:
        """The attributes of submodules that variables of other sizes need.

        Args:
          resizing: The new sizes.
          variables: Variables with the old sizes, or their shapes.
          images: One batch (N, H, W, C), or its shape.
        """

    @abc.abstractmethod
    def with_sizes(self, sizes: Sizes) -> Any:
        """The model with these attributes."""

    @abc.abstractmethod
    def saved_sizes(self) -> Sizes:
        """What `with_sizes` of the unpruned model needs to become this one."""

    @contextlib.contextmanager
    def calling(self, images: Any) -> Iterator[None]:
        """Around a call of the model: lets an error of the model's own code say what it was called with.

        Args:
          images: (N, H, W, C), or their shape.

        Raises:
          ValueError: The call raised anything.
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
        """Kernels of the transposed convolutions that modules name as such; the others look like convolutions.

        Args:
          variables: Variables of the network, or their shapes.
          images: One batch (N, H, W, C), or its shape.

        Returns:
          Per path, whether the kernel is (*spatial, out, in), that of the convolution that is transposed
          (`transpose_kernel`), and not (*spatial, in, out).
        """
        del variables, images
        return {}

    def group_norms(self, variables: Any, images: Any) -> Mapping[ModulePath, int]:
        """Number of groups of the group normalizations that modules name as such; arguments as for `transposed`."""
        del variables, images
        return {}

    def bind(self, variables: Any) -> tuple[Any, Any]:
        """(model, variables) as their user holds them: the variables of an nnx module are inside of it."""
        return self.model, variables


def mode_kwargs(call: Callable, given: Mapping[str, Any], training: bool) -> dict[str, Any]:
    """Keyword arguments of a call in evaluation or training mode.

    Args:
      call: What is called; each argument of `MODES` that its signature has is set.
      given: Further arguments; those of evaluation mode may replace the ones found.
      training: Whether it is training mode.
    """
    parameters = inspect.signature(call).parameters
    modes = {name: value != training for name, value in MODES.items() if name in parameters}
    return {**given, **modes} if training else {**modes, **given}


def flatten(variables: Any) -> dict[LeafPath, Any]:
    """Path -> leaf of any pytree; boxes of partitioning metadata are opened."""
    flat, _ = jtu.tree_flatten_with_path(variables, is_leaf=_is_box)
    return {tuple(map(_name, path)): meta.unbox(leaf) for path, leaf in flat}


def replace_leaves(variables: Any, leaves: Mapping[LeafPath, Any]) -> Any:
    """The same pytree with other leaves, in the same boxes."""

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
    """What to say where a shape of images (N, ...) looks as if channels came first; "" elsewhere."""
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
      ValueError: The network returns several arrays and `which` is None, or has nothing under `which`.
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
            f"{name} returns {structure(outputs)}; say with outputs= which of them counts: a key, an index, or a "
            "function."
        )
    return arrays[0]


def structure(arrays: Any) -> str:
    """The arrays of a pytree with their shapes, for messages."""
    found = jtu.tree_flatten_with_path(arrays)[0]
    return ", ".join(f"{jtu.keystr(path) or 'an array'} {getattr(leaf, 'shape', '')}" for path, leaf in found)


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message, for the message of another one."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# ---- sizes as attributes of modules

_SIZE_NAMES = re.compile(r"feature|channel|filter|dim|width|plane|hidden|unit")


def is_size(name: str) -> bool:
    """Whether an attribute of this name may be a number of channels."""
    return _SIZE_NAMES.search(name.lower()) is not None


def size_attributes(
    integers: Mapping[str, int], leaves: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> dict[str, int]:
    """New values of those attributes of a module that are sizes of its own leaves.

    An attribute with the old size of an axis gets its new one. Where several axes had that size the last axis counts,
    which is that of the outputs.

    Args:
      integers: The module's attributes that are whole numbers.
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
