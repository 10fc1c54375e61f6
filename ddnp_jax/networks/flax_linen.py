"""flax.linen modules as networks, and the wrapper that overrides the sizes of their layers."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from ddnp_jax.networks.base import (
    MODES,
    LeafPath,
    ModulePath,
    Network,
    Resizing,
    Sizes,
    mode_kwargs,
    size_attributes,
)

PARAMETERS = "params"
RESIZED = "_ddnp_jax_is_resized"  # attribute of a submodule whose sizes are set
_MODE_WORDS = {"train", "training", "eval", "evaluate", "evaluation", "infer", "inference", "test", "deterministic"}
LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum, nn.ConvLocal)


@dataclasses.dataclass(frozen=True)
class _Held:
    """Hides a module from flax, which would otherwise turn an attribute that is a module into a submodule."""

    module: nn.Module


class Resized(nn.Module):
    """A wrapper that overrides the sizes of a module's layers; variables keep the names of the module's.

    Attributes:
      held: The wrapped module; see `module`.
      sizes: Overridden attributes of submodules, by path.
    """

    held: _Held
    sizes: Sizes

    @classmethod
    def of(cls, module: nn.Module, sizes: Sizes) -> "Resized":
        """Wraps a module with these sizes."""
        return cls(_Held(module), sizes)

    @property
    def module(self) -> nn.Module:
        """The wrapped module, with its original sizes."""
        return self.held.module

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped module in this module's scope, so that its variables keep their names."""
        sizes = dict(self.sizes)
        outside = len(self.path)

        def resize(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            # A module that is created and called independently of the network has no scope. If wrappers are nested,
            # the outer wrapper takes precedence.
            if module.scope is not None and not hasattr(module, RESIZED):
                for name, value in (*sizes.get(module.path[outside:], ()), (RESIZED, True)):
                    object.__setattr__(module, name, value)  # modules are frozen; this one is a copy
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(resize):
            return self.module.clone(parent=self.scope)(*args, **kwargs)


class LinenNetwork(Network):
    """A linen module, called with one array."""

    kind = "linen"

    def __init__(self, model: nn.Module, call_kwargs: Mapping[str, Any]) -> None:
        """Takes a module without variables.

        Raises:
          ValueError: The module is bound to variables.
        """
        if model.scope is not None:
            raise ValueError(f"{type(model).__name__} is bound to variables; give the unbound model.unbind()[0].")
        super().__init__(model, call_kwargs)

    @property
    def module(self) -> nn.Module:
        """The module without its wrapper."""
        return self.model.module if isinstance(self.model, Resized) else self.model

    @property
    def name(self) -> str:
        """Name of the module's class."""
        return type(self.module).__name__

    def variables(self, given: Any) -> Any:
        """The variables that were given."""
        if given is None:
            raise ValueError(f"{self.name} is a linen module, which holds no variables; give variables=.")
        return given

    def initial(self, rng: jax.Array, images: Any) -> Any:
        """The variables that `model.init` returns."""
        return self._in_mode(training=False).init(rng, images, **self._kwargs(training=False))

    def evaluate(self, variables: Any, images: jax.Array) -> Any:
        """The outputs in evaluation mode."""
        return self._in_mode(training=False).apply(variables, images, **self._kwargs(training=False))

    def train(
        self, variables: Any, images: jax.Array, rng: jax.Array, batch_axis: str | None = None
    ) -> tuple[Any, Any]:
        """The outputs in training mode, and the variables with new batch statistics.

        Every random stream of the module (`dropout`, `drop_path`, ...) is drawn from `rng`: flax uses the key of
        `params` for streams without a key of their own.
        """

        def over_batch(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            if isinstance(context.module, nn.BatchNorm):
                object.__setattr__(context.module, "axis_name", batch_axis)
            return next_fun(*args, **kwargs)

        self._check_mode(variables)
        with nn.intercept_methods(over_batch):
            outputs, updated = self._in_mode(training=True).apply(
                variables,
                images,
                **self._kwargs(training=True),
                rngs={PARAMETERS: rng, "dropout": jax.random.fold_in(rng, 1)},
                mutable=[name for name in variables if name != PARAMETERS],
            )
        return outputs, {**variables, **updated}

    def split(self, variables: Any) -> tuple[Any, Any]:
        """Splits variables into the collection "params" and all other collections."""
        return variables[PARAMETERS], {name: value for name, value in variables.items() if name != PARAMETERS}

    def merge(self, parameters: Any, rest: Any) -> Any:
        """The inverse of `split`."""
        return {PARAMETERS: parameters, **rest}

    def is_parameter(self, path: LeafPath) -> bool:
        """Whether a leaf is in the collection "params"."""
        return path[0] == PARAMETERS

    def module_of(self, path: LeafPath) -> ModulePath:
        """The module that a leaf belongs to: its path without the collection."""
        return path[1:-1]

    def sizes(self, resizing: Resizing, variables: Any, images: Any) -> Sizes:
        """New attributes of the layers, from the shapes of their variables and, for group norm, of its input."""
        found: dict[ModulePath, Mapping[str, Any]] = dict(map(_as_mapping, self.saved_sizes()))
        for path, call in self._calls(variables, images).items():
            own = {leaf[-1]: shapes for leaf, shapes in resizing.shapes.items() if self.module_of(leaf) == path}
            # The sizes of an earlier pruning take precedence.
            call = call._replace(attributes={**call.attributes, **found.get(path, {})})
            new = _new_sizes(call, own, resizing.groups.get((PARAMETERS, *path, "kernel")))
            if new:
                found[path] = {**found.get(path, {}), **new}
        return tuple(sorted((path, tuple(sorted(new.items()))) for path, new in found.items()))

    def transposed(self, variables: Any, images: Any) -> Mapping[LeafPath, bool]:
        """Kernels of every `ConvTranspose` that is called."""
        return {
            (PARAMETERS, *path, "kernel"): call.attributes["transpose_kernel"]
            for path, call in self._calls(variables, images).items()
            if issubclass(call.kind, nn.ConvTranspose)
        }

    def group_norms(self, variables: Any, images: Any) -> Mapping[ModulePath, int]:
        """Every `GroupNorm` that is called with an array."""
        resized = dict(map(_as_mapping, self.saved_sizes()))
        found: dict[ModulePath, int] = {}
        for path, call in self._calls(variables, images).items():
            if issubclass(call.kind, nn.GroupNorm) and call.channels is not None:
                own = {**call.attributes, **resized.get(path, {})}
                found[path] = own["num_groups"] or call.channels // own["group_size"]
        return found

    def with_sizes(self, sizes: Sizes) -> nn.Module:
        """The module in a wrapper that holds the sizes."""
        return Resized.of(self.module, sizes) if sizes else self.module

    def saved_sizes(self) -> Sizes:
        """The wrapper's sizes."""
        return self.model.sizes if isinstance(self.model, Resized) else ()

    def _calls(self, variables: Any, images: Any) -> dict[ModulePath, "_Call"]:
        """Records the first call of every submodule; the network is only traced."""
        found: dict[ModulePath, _Call] = {}

        def record(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            if context.method_name == "__call__" and module.scope is not None and module.path not in found:
                channels = args[0].shape[-1] if args and getattr(args[0], "shape", ()) else None
                found[module.path] = _Call(type(module), _attributes(module), channels)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(record):
            jax.eval_shape(self.evaluate, variables, images)
        return found

    def _in_mode(self, training: bool) -> nn.Module:
        """The module in evaluation or training mode, set by an attribute if its call has no argument for the mode."""
        call = inspect.signature(type(self.module).__call__).parameters
        own: dict[str, Any] = {name: on != training for name, on in MODES.items() if name in _attributes(self.module)}
        if not own or set(MODES) & set(call):
            return self.model
        module = self.module.clone(**own)
        return Resized.of(module, self.model.sizes) if isinstance(self.model, Resized) else module

    def _check_mode(self, variables: Mapping[str, Any]) -> None:
        """Raises for a mode argument with another name, with which training would not change batch statistics."""
        arguments = inspect.signature(type(self.module).__call__).parameters
        if "batch_stats" not in variables or set(MODES) & {*arguments, *_attributes(self.module)}:
            return
        for name, argument in arguments.items():
            if isinstance(argument.default, bool) and _MODE_WORDS & set(name.split("_")):
                raise ValueError(
                    f"{self.name} is called with {name!r}, which is not known to switch between training and "
                    f"evaluation; rename it to one of {', '.join(MODES)}."
                )

    def _kwargs(self, training: bool) -> dict[str, Any]:
        return mode_kwargs(type(self.module).__call__, self._call_kwargs, training)


def _as_mapping(entry: tuple[ModulePath, tuple[tuple[str, Any], ...]]) -> tuple[ModulePath, Mapping[str, Any]]:
    return entry[0], dict(entry[1])


class _Call(NamedTuple):
    """A call of a submodule.

    Attributes:
      kind: Class of the submodule.
      attributes: Its attributes.
      channels: Length of the last axis of its input; None if the input is not an array.
    """

    kind: type
    attributes: dict[str, Any]
    channels: int | None


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: getattr(module, name, None) for name in type(module).__dataclass_fields__ if name != "parent"}


def _new_sizes(
    call: _Call,
    own: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    groups: tuple[int, int] | None,
) -> dict[str, int | None]:
    """Returns new attributes of a submodule, from the old and new shapes of its own leaves."""
    if issubclass(call.kind, nn.GroupNorm):
        count = call.attributes["num_groups"]
        grouped = count is not None and count > 1 and call.channels is not None
        return {"num_groups": None, "group_size": call.channels // count} if grouped else {}
    if not own:
        return {}
    if issubclass(call.kind, LAYERS) and "kernel" in own:
        last = -2 if call.attributes.get("transpose_kernel") else -1
        new: dict[str, int | None] = {"features": own["kernel"][1][last]}
        return new | ({"feature_group_count": groups[1]} if groups else {})
    if call.kind.__module__.startswith("flax."):
        return {}  # all other modules of flax infer their sizes from their inputs
    integers = {name: value for name, value in call.attributes.items() if type(value) is int}
    return dict(size_attributes(integers, own))
