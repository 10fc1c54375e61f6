"""Import and export of PyTorch state dicts, for flax.linen and flax.nnx models whose modules are named as in PyTorch.

The names are mapped by a single rule for all architectures: the names of the modules are joined by dots, `_<digits>`
in them becomes `.<digits>`, and the leaf gets PyTorch's name. Thus "layer1_0/conv1/kernel" of a linen module and
"layer1/0/conv1/kernel" of an nnx module are "layer1.0.conv1.weight" in PyTorch. Kernels change from
(*spatial, in, out) to (out, in, *spatial), and those of transposed convolutions to (in, out, *spatial), flipped. If an
axis of a variable holds both the pixels and the channels of an image, PyTorch has the channels first. Examples are the
rows of a dense layer after a flatten, and the outputs of a dense layer that are reshaped to an image. The trace of the
network shows which axes these are.

`save` exports a pruned network to PyTorch: its state dict and the sizes of its layers.
"""

import os
import pprint
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from ddnp_jax.compact import check_finite
from ddnp_jax.networks import flatten, replace_leaves
from ddnp_jax.torch_files import read, source_of
from ddnp_jax.torch_layout import (
    Layout,
    any_layout,
    check_fit,
    fitting_layout,
    layout_at,
    torch_network,
    weights_by_name,
)

__all__ = ["export", "layer_sizes", "load", "read", "rename_aliases", "save"]

# Published checkpoints of the same network use either of these names for its classifier.
ALIASES = {"fc": "linear", "linear": "fc"}
WEIGHTS_FILE, LAYERS_FILE = "weights.safetensors", "pytorch_layers.py"

# What `save` writes in addition to the weights, for use without this library.
LAYERS_SOURCE = '''"""The sizes of a pruned network's layers, for PyTorch alone.

    model = load(whole_model, safetensors.torch.load_file("{weights}"))

`whole_model` is the unpruned network in PyTorch, for example `torchvision.models.resnet50()`.
"""

import torch
from torch import nn

LAYERS = {layers}


def load(whole_model: nn.Module, state_dict: dict[str, torch.Tensor]) -> nn.Module:
    """Gives a network the pruned sizes and weights, in place, and returns it."""
    for name, sizes in LAYERS.items():
        layer = whole_model.get_submodule(name)
        for attribute, size in sizes.items():
            if not hasattr(layer, attribute):
                raise ValueError(f"{{name}} is a {{type(layer).__name__}}, which has no {{attribute}}.")
            setattr(layer, attribute, size)
    for name, tensor in state_dict.items():
        path, _, leaf = name.rpartition(".")
        layer = whole_model.get_submodule(path)
        tensor = tensor.clone()
        setattr(layer, leaf, nn.Parameter(tensor) if isinstance(getattr(layer, leaf), nn.Parameter) else tensor)
    whole_model.load_state_dict(state_dict)
    return whole_model
'''


def load(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any],
    model: Any,
    input_shape: Sequence[int] | None = None,
) -> Any:
    """Loads a PyTorch checkpoint as the variables of a flax model.

    Args:
      path_or_state_dict: A `.safetensors` file, a file written by `torch.save`, or its contents; see `read`.
      model: Model with the checkpoint's architecture and module names, a flax.linen or flax.nnx module.
      input_shape: Shape of one image, (H, W, C). Needed only if it cannot be derived from the weights: for models that
        flatten feature maps that no square image produces, or the network's input itself.

    Returns:
      For a linen module, the variables as `model.init` returns them, {"params", "batch_stats"}, in float32; for an nnx
      module, a copy that holds these weights.

    Raises:
      FileNotFoundError: The file does not exist.
      ImportError: The library for reading the file is not installed.
      ValueError: The file is damaged, contains no state dict, or does not match the model (the message names the first
        missing, unexpected or misshapen tensor); or `input_shape` is needed.
    """
    network, source = torch_network(model), source_of(path_or_state_dict)
    layout = any_layout(network) if input_shape is None else layout_at(network, input_shape)
    state = rename_aliases(read(path_or_state_dict, layout.tensors), layout.tensors)
    shapes = {name: array.shape for name, array in state.items()}
    if input_shape is None:
        layout = fitting_layout(network, layout, shapes, source)
    check_fit(shapes, layout, source)
    # A copy: on CPU a jax array may otherwise share the memory of the caller's tensors.
    leaves = {tensor.path: jnp.array(tensor.from_torch(state[name])) for name, tensor in layout.tensors.items()}
    if network.kind == "linen":
        return unflatten_dict(leaves)
    own = network.variables(None)
    return network.bind(replace_leaves(own, {**flatten(own), **leaves}))[0]


def export(model: Any, variables: Any = None, input_shape: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """Converts the variables of a flax model to a PyTorch state dict; the inverse of `load`.

    `torch_model.load_state_dict({k: torch.from_numpy(v) for k, v in export(model, variables).items()})` loads it.

    Args:
      model: Model, pruned or not: a flax.linen or flax.nnx module.
      variables: Variables of the model, {"params", "batch_stats"}; None for an nnx module.
      input_shape: Shape of one image, (H, W, C), if `load` would need it.

    Returns:
      Writable float32 arrays with PyTorch's names and axis order.

    Raises:
      ValueError: The variables do not fit the model, one is NaN or infinite, or `input_shape` is needed.
    """
    return _layout_and_state(model, variables, input_shape)[1]


def layer_sizes(
    model: Any, variables: Any = None, input_shape: Sequence[int] | None = None
) -> dict[str, dict[str, int]]:
    """Returns the sizes of every layer of a model, with PyTorch's layer and attribute names.

    Args:
      model: Model, pruned or not: a flax.linen or flax.nnx module.
      variables: Variables of the model, {"params", "batch_stats"}; None for an nnx module.
      input_shape: Shape of one image, (H, W, C), if `load` would need it.

    Returns:
      For example {"conv1": {"in_channels": 3, "out_channels": 64, "groups": 1}, "bn1": {"num_features": 64},
      "fc": {"in_features": 512, "out_features": 1000}}.

    Raises:
      ValueError: The variables do not fit the model or are not finite, or `input_shape` is needed.
    """
    return _layer_sizes(_layout_of(model, variables, input_shape)[0])


def save(
    folder: str | os.PathLike, model: Any, variables: Any = None, input_shape: Sequence[int] | None = None
) -> None:
    """Saves a model, pruned or not, for PyTorch: `weights.safetensors` and `pytorch_layers.py`.

    `pytorch_layers.py` contains the sizes of every layer and a function that applies them, and the weights, to the
    unpruned network in PyTorch; it depends only on PyTorch.

    Args:
      folder: Path of the folder, which is created if necessary.
      model: Model, pruned or not: a flax.linen or flax.nnx module.
      variables: Variables of the model, {"params", "batch_stats"}; None for an nnx module.
      input_shape: Shape of one image, (H, W, C), if `load` would need it.

    Raises:
      ImportError: The package safetensors is not installed.
      ValueError: The variables do not fit the model, one is NaN or infinite, or `input_shape` is needed.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(f"writing {WEIGHTS_FILE} needs safetensors; run `pip install ddnp_jax[torch]`.") from error
    layout, state = _layout_and_state(model, variables, input_shape)
    layers = pprint.pformat(_layer_sizes(layout), width=118, sort_dicts=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE)
    (folder / LAYERS_FILE).write_text(LAYERS_SOURCE.format(weights=WEIGHTS_FILE, layers=layers))


def _layout_and_state(
    model: Any, variables: Any, input_shape: Sequence[int] | None
) -> tuple[Layout, dict[str, np.ndarray]]:
    layout, leaves = _layout_of(model, variables, input_shape)
    return layout, {name: layout.tensors[name].to_torch(leaf) for name, leaf in leaves.items()}


def rename_aliases(state: Mapping[str, np.ndarray], wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Renames the tensors of the layers in `ALIASES` to the names that are wanted."""

    def rename(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        alias = f"{ALIASES.get(module)}.{leaf}"
        return alias if name not in wanted and alias in wanted and alias not in state else name

    return {rename(name): value for name, value in state.items()}


def _layer_sizes(layout: Layout) -> dict[str, dict[str, int]]:
    groups = {layer.path: layer.groups for layer in layout.topology.layers}
    sizes: dict[str, dict[str, int]] = {}
    for torch_name, tensor in layout.tensors.items():
        name, (inputs, outputs) = torch_name.rpartition(".")[0], (1, *tensor.shape)[-2:]
        if tensor.transposed:
            inputs, outputs = outputs, inputs
        if tensor.path[-1] == "kernel" and len(tensor.shape) > 2:
            count = groups.get(tensor.path, 1)
            sizes[name] = {"in_channels": inputs * count, "out_channels": outputs, "groups": count}
        elif tensor.path[-1] == "kernel":
            sizes[name] = {"in_features": inputs, "out_features": outputs}
        elif tensor.path[-1] == "mean":
            sizes[name] = {"num_features": outputs}
        elif name in layout.group_norms:
            sizes[name] = {"num_channels": outputs}
    for name, count in layout.group_norms.items():
        sizes[name] = {"num_groups": count, **sizes.get(name, {})}
    return sizes


def _layout_of(model: Any, variables: Any, input_shape: Sequence[int] | None) -> tuple[Layout, Mapping[str, Any]]:
    """A model's layout, and its leaves by PyTorch's name."""
    network, source = torch_network(model), "the set of variables"
    check_finite(network.variables(variables), network.name)
    leaves = {name: leaf for name, (_, leaf) in weights_by_name(network, network.variables(variables)).items()}
    layout = any_layout(network) if input_shape is None else layout_at(network, input_shape)
    shapes = {
        name: layout.tensors[name].torch_shape(np.shape(leaf)) if name in layout.tensors else np.shape(leaf)
        for name, leaf in leaves.items()
    }
    if input_shape is None:
        layout = fitting_layout(network, layout, shapes, source)
    check_fit(shapes, layout, source)
    return layout, leaves
