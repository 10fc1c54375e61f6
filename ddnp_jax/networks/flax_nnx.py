"""flax.nnx modules as networks; their variables are converted to nested dictionaries of arrays and back."""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
from flax import nnx

from ddnp_jax.networks.base import (
    LeafPath,
    ModulePath,
    Network,
    Resizing,
    Sizes,
    flatten,
    is_size,
    mode_kwargs,
    size_attributes,
)

LAYER_SIZES = ("in_features", "out_features", "kernel_shape", "feature_group_count")


class NnxNetwork(Network):
    """An nnx module. The module itself never changes: all computations use copies."""

    kind = "nnx"

    def __init__(self, model: nnx.Module, call_kwargs: Mapping[str, Any]) -> None:
        """Wraps a module with its variables."""
        super().__init__(model, call_kwargs)
        self._graph, self._state = nnx.split(model)
        self._kinds = {tuple(map(str, path)): type(variable) for path, variable in nnx.to_flat_state(self._state)}

    def variables(self, given: Any) -> Any:
        """Returns `given` or, if it is None, the module's own variables as nested dictionaries of arrays."""
        if given is None:
            return nnx.to_pure_dict(self._state)
        if set(flatten(given)) != set(self._kinds):
            raise ValueError(
                f"the variables are not those of {self.name}, an nnx module, which holds its own; give variables=None."
            )
        return given

    def initial(self, rng: jax.Array, images: Any) -> Any:
        """The module's own variables, which were initialized when the module was created."""
        return self.variables(None)

    def evaluate(self, variables: Any, images: jax.Array) -> Any:
        """The outputs in evaluation mode."""
        module = self._module(variables)
        module.eval()
        return module(images, **mode_kwargs(type(module).__call__, self._call_kwargs, training=False))

    def train(
        self, variables: Any, images: jax.Array, rng: jax.Array, batch_axis: str | None = None
    ) -> tuple[Any, Any]:
        """The outputs in training mode, and the variables with new batch statistics and counters of random numbers."""
        leaves = flatten(variables)
        keys = {path: leaf for path, leaf in leaves.items() if issubclass(self._kinds[path], nnx.RngKey)}
        # On every device and in every step the module draws other random numbers; its own keys do not change.
        drawn = {path: jax.random.fold_in(key, jax.random.bits(rng)) for path, key in keys.items()}
        module = self._module(_nested(variables, {**leaves, **drawn}))
        module.train()
        for _, part in nnx.iter_modules(module):
            if isinstance(part, nnx.BatchNorm):
                part.axis_name = batch_axis
        outputs = module(images, **mode_kwargs(type(module).__call__, self._call_kwargs, training=True))
        updated = nnx.to_pure_dict(nnx.state(module))
        return outputs, _nested(updated, {**flatten(updated), **keys})

    def split(self, variables: Any) -> tuple[Any, Any]:
        """Splits variables into those of type `nnx.Param` and all others."""
        flat = flax.traverse_util.flatten_dict(variables)
        parts: tuple[dict, dict] = ({}, {})
        for path, leaf in flat.items():
            parts[not self.is_parameter(tuple(map(str, path)))][path] = leaf
        return flax.traverse_util.unflatten_dict(parts[0]), flax.traverse_util.unflatten_dict(parts[1])

    def merge(self, parameters: Any, rest: Any) -> Any:
        """The inverse of `split`."""
        flat = map(flax.traverse_util.flatten_dict, (parameters, rest))
        return flax.traverse_util.unflatten_dict({path: leaf for part in flat for path, leaf in part.items()})

    def is_parameter(self, path: LeafPath) -> bool:
        """Whether a leaf is an `nnx.Param`."""
        return issubclass(self._kinds[path], nnx.Param)

    def sizes(self, resizing: Resizing, variables: Any, images: Any) -> Sizes:
        """New attributes of the layers, from the shapes of their variables."""
        modules = _modules(self.model)
        paths = sorted({path[:-1] for path in resizing.shapes})
        return tuple((path, tuple(_new_attributes(modules[path], path, resizing).items())) for path in paths)

    def with_sizes(self, sizes: Sizes) -> nnx.Module:
        """A copy of the module whose layers have other attributes; its variables do not change."""
        module = nnx.clone(self.model)
        modules = _modules(module)
        for path, attributes in sizes:
            if path not in modules:
                raise ValueError(f"{self.name} has no submodule {'/'.join(path)!r}; give the network that was pruned.")
            for name, value in attributes:
                setattr(modules[path], name, value)
        return module

    def saved_sizes(self) -> Sizes:
        """All sizes of all layers."""
        found = ((path, tuple(_sizes_of(module).items())) for path, module in _modules(self.model).items())
        return tuple(sorted((path, own) for path, own in found if own))

    def transposed(self, variables: Any, images: Any) -> Mapping[LeafPath, bool]:
        """Kernels of every `ConvTranspose` inside."""
        del variables, images
        return {
            (*path, "kernel"): module.transpose_kernel
            for path, module in _modules(self.model).items()
            if isinstance(module, nnx.ConvTranspose)
        }

    def group_norms(self, variables: Any, images: Any) -> Mapping[ModulePath, int]:
        """Every `GroupNorm` inside."""
        del variables, images
        return {
            path: module.num_groups
            for path, module in _modules(self.model).items()
            if isinstance(module, nnx.GroupNorm)
        }

    def bind(self, variables: Any) -> tuple[Any, Any]:
        """Returns (a module that holds the variables, None)."""
        return self._module(variables), None

    def _module(self, variables: Any) -> nnx.Module:
        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, variables)
        return nnx.merge(self._graph, state)


def _modules(model: nnx.Module) -> dict[ModulePath, nnx.Module]:
    return {tuple(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _sizes_of(module: nnx.Module) -> dict[str, Any]:
    """The attributes that `_new_attributes` may change."""
    if isinstance(module, nnx.Conv | nnx.Linear | nnx.ConvTranspose):
        return {name: getattr(module, name) for name in LAYER_SIZES if hasattr(module, name)}
    if isinstance(module, nnx.GroupNorm):
        return {"num_groups": module.num_groups}
    return {name: value for name, value in vars(module).items() if type(value) is int and is_size(name)}


def _nested(like: Any, leaves: Mapping[LeafPath, Any]) -> Any:
    """Returns nested dictionaries with the keys of `like`, which may be integers, and with other leaves."""
    paths = flax.traverse_util.flatten_dict(like)
    return flax.traverse_util.unflatten_dict({path: leaves[tuple(map(str, path))] for path in paths})


def _new_attributes(module: nnx.Module, path: ModulePath, resizing: Resizing) -> dict[str, Any]:
    """Returns new sizes of a module, from the old and new shapes of its own variables."""
    own = {leaf[-1]: shapes for leaf, shapes in resizing.shapes.items() if leaf[:-1] == path}
    if "kernel" in own and isinstance(module, nnx.Conv | nnx.Linear | nnx.ConvTranspose):
        return _layer_sizes(module, own["kernel"][1], resizing.groups.get((*path, "kernel")))
    if isinstance(module, nnx.GroupNorm):
        ((old, *_), (new, *_)) = next(iter(own.values()))
        return {"num_groups": module.num_groups * new // old}
    return dict(size_attributes(_sizes_of(module), own))


def _layer_sizes(module: Any, kernel: tuple[int, ...], groups: tuple[int, int] | None) -> dict[str, Any]:
    *_, inputs, outputs = kernel
    if getattr(module, "transpose_kernel", False):
        inputs, outputs = outputs, inputs
    count = groups[1] if groups else getattr(module, "feature_group_count", 1)
    sizes = dict(zip(LAYER_SIZES, (inputs * count, outputs, kernel, count), strict=True))
    return {name: value for name, value in sizes.items() if hasattr(module, name)}
