"""PyTorch state dicts in and out, for every flax.linen model whose modules are named as in PyTorch.

One rule ties the names, so that an architecture needs no code here: the module names of the flax path are joined by
dots, `_<digits>` in them becomes `.<digits>`, and the leaf takes PyTorch's name: ("params", "layer1_0", "conv1",
"kernel") is "layer1.0.conv1.weight". Kernels change from (*spatial, in, out) to (out, in, *spatial); that covers
dense, convolution, grouped and depthwise layers. Two things lie outside: transposed convolutions, and a dense layer
behind a flatten of more than one pixel, whose inputs PyTorch orders by (C, H, W) instead of (H, W, C).

A pruned network goes back to PyTorch with `save`, which writes its state dict and the sizes of its layers.
"""

import os
import pprint
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddnp_jax.networks import as_network, flatten
from ddnp_jax.topology import trace, variable_shapes

# Published checkpoints of one network call its classifier by one of these names; either is taken for the other.
ALIASES = {"fc": "linear", "linear": "fc"}
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
WRAPPERS = ("state_dict", "net")
WEIGHTS_FILE, LAYERS_FILE = "weights.safetensors", "pytorch_layers.py"

TreePath = tuple[str, ...]

# What `save` writes beside the weights, for a reader without this library.
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
    model: nn.Module,
    input_shape: Sequence[int] = (32, 32, 3),
) -> dict[str, Any]:
    """Reads a PyTorch checkpoint as the variables of a flax model.

    Args:
      path_or_state_dict: as of `read`.
      model: has the checkpoint's architecture and module names.
      input_shape: (H, W, C) of one image.

    Returns:
      The variables as `model.init` returns them, {"params", "batch_stats"}, in float32.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: a file is to be read and the library that reads it is not installed.
      ValueError: the file is damaged, holds no state dict, or does not fit the model: the first tensor that is
        misshapen, extra or missing is named.
    """
    wanted = _wanted(model, input_shape)
    state = rename_aliases(read(path_or_state_dict), wanted)
    _check_fit(state, wanted, _source(path_or_state_dict))
    leaves = {path: _from_torch(path, state[name]) for name, (path, _) in wanted.items()}
    # A copy: on CPU a jax array may otherwise share the memory of the caller's tensors.
    return unflatten_dict({path: jnp.array(leaf) for path, leaf in leaves.items()})


def read(path_or_state_dict: str | os.PathLike | Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads a PyTorch checkpoint as it is.

    Args:
      path_or_state_dict: a file of safetensors (named so) or of `torch.save`, which need the extra `torch`, or what it
        holds: a state dict of tensors or numpy arrays, as it is or under "state_dict" or "net".

    Returns:
      Float32 arrays under PyTorch's names, without a prefix "module." and without "num_batches_tracked".

    Raises:
      As `load`, which also checks whether a model fits.
    """
    given = path_or_state_dict
    checkpoint = given if isinstance(given, Mapping) else _read(Path(given))
    return _state_dict(checkpoint, _source(path_or_state_dict))


def export(model: nn.Module, variables: Any, input_shape: Sequence[int] = (32, 32, 3)) -> dict[str, np.ndarray]:
    """Writes the variables of a flax model as a PyTorch state dict; the inverse of `load`.

    `torch_model.load_state_dict({k: torch.from_numpy(v) for k, v in export(model, variables).items()})` reads it.

    Args:
      model: the model, pruned or not.
      variables: its {"params", "batch_stats"}.
      input_shape: (H, W, C) of one image.

    Returns:
      Writable float32 arrays under PyTorch's names and in its axis order.

    Raises:
      ValueError: the variables do not fit the model.
    """
    state = {_torch_name(path): _to_torch(path, leaf) for path, leaf in flatten_dict(variables).items()}
    _check_fit(state, _wanted(model, input_shape), "the set of variables")
    return state


def layer_sizes(
    model: nn.Module, variables: Any, input_shape: Sequence[int] = (32, 32, 3)
) -> dict[str, dict[str, int]]:
    """Sizes of every layer of a model, by PyTorch's name and under PyTorch's attributes; arguments as for `export`.

    Returns:
      For example {"conv1": {"in_channels": 3, "out_channels": 64, "groups": 1}, "bn1": {"num_features": 64},
      "fc": {"in_features": 512, "out_features": 1000}}.
    """
    groups = {layer.path: layer.groups for layer in trace(model, tuple(input_shape)).layers}
    sizes: dict[str, dict[str, int]] = {}
    for path, leaf in flatten_dict(variables).items():
        name = _torch_name(path).rpartition(".")[0]
        if path[-1] == "kernel" and leaf.ndim > 2:
            inputs = leaf.shape[-2] * groups[path]
            sizes[name] = {"in_channels": inputs, "out_channels": leaf.shape[-1], "groups": groups[path]}
        elif path[-1] == "kernel":
            sizes[name] = {"in_features": leaf.shape[0], "out_features": leaf.shape[1]}
        elif path[-1] == "mean":
            sizes[name] = {"num_features": leaf.shape[0]}
    return sizes


def save(folder: str | os.PathLike, model: nn.Module, variables: Any, input_shape: Sequence[int] = (32, 32, 3)) -> None:
    """Writes a model, pruned or not, for PyTorch: `weights.safetensors` and `pytorch_layers.py`.

    The module holds the sizes of every layer and a function that gives them, and the weights, to the whole network in
    PyTorch; it needs PyTorch alone.

    Args:
      folder: is made.
      model: the model.
      variables: its {"params", "batch_stats"}.
      input_shape: (H, W, C) of one image.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: the variables do not fit the model.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(f"writing {WEIGHTS_FILE} needs safetensors; run `pip install ddnp_jax[torch]`.") from error
    state = export(model, variables, input_shape)
    layers = pprint.pformat(layer_sizes(model, variables, input_shape), width=118, sort_dicts=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE)
    (folder / LAYERS_FILE).write_text(LAYERS_SOURCE.format(weights=WEIGHTS_FILE, layers=layers))


def _source(path_or_state_dict: Any) -> str:
    return "the state dict" if isinstance(path_or_state_dict, Mapping) else str(path_or_state_dict)


def _torch_name(path: TreePath) -> str:
    """PyTorch's name of a leaf; `path` begins with the collection."""
    *modules, leaf = path[1:]
    return ".".join([*(re.sub(r"_(\d+)(?=_|$)", r".\1", module) for module in modules), LEAVES.get(leaf, leaf)])


def _to_torch(path: TreePath, leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf, np.float32)
    return np.array(np.moveaxis(leaf, (-1, -2), (0, 1)) if path[-1] == "kernel" else leaf, order="C")


def _from_torch(path: TreePath, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (0, 1), (-1, -2)) if path[-1] == "kernel" else array


def _wanted(model: nn.Module, input_shape: Sequence[int]) -> dict[str, tuple[TreePath, tuple[int, ...]]]:
    """Flax path and PyTorch shape of every tensor of the model, by PyTorch name; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    leaves = flatten(variable_shapes(as_network(model), image))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    return {
        _torch_name(path): (path, (shape[-1], shape[-2], *shape[:-2]) if path[-1] == "kernel" else shape)
        for path, shape in shapes.items()
    }


def _read(path: Path) -> Any:
    """What a file holds; only tensors and plain containers are ever unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no PyTorch checkpoint {path}; give the path of an existing file.")
    tensors_only = path.suffix == ".safetensors"
    try:
        if tensors_only:
            from safetensors.numpy import load_file
        else:
            import torch
    except ImportError as error:
        needed = "safetensors" if tensors_only else "PyTorch"
        raise ImportError(f"reading {path} needs {needed}; run `pip install ddnp_jax[torch]`.") from error
    try:
        if tensors_only:
            return load_file(path)
        if zipfile.is_zipfile(path):
            _check_sums(path)
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error) or type(error).__name__).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path} cannot be read: it is damaged, or holds more than tensors ({reason}); "
            "fetch it again, or save its state dict alone with torch.save."
        ) from error


def _check_sums(path: Path) -> None:
    """PyTorch itself does not look at the checksums in its files: flipped bits would become weights."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _numpy_scalars() -> list[Any]:
    """What unpickles a numpy number, such as an accuracy beside the weights; harmless, though PyTorch refuses it."""
    scalar = np.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # before numpy 2 and since
    numbers = (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)
    return [*((scalar, f"{module}.scalar") for module in modules), np.dtype, *(type(np.dtype(n)) for n in numbers)]


def _state_dict(checkpoint: Any, source: str) -> dict[str, np.ndarray]:
    """The float32 arrays of a checkpoint by name, without wrapper, prefix and counters."""
    advice = f"give a state dict, as it is or under one of the keys {', '.join(WRAPPERS)}."
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{source} holds a {type(checkpoint).__name__}; {advice}")
    state = next((checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    for name, value in state.items():
        if not (isinstance(name, str) and hasattr(value, "shape")):
            raise ValueError(f"{source} holds {name!r}, which is no tensor; {advice}")
    tensors = {k.removeprefix("module."): v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return {name: _numpy(value) for name, value in tensors.items()}


def _numpy(value: Any) -> np.ndarray:
    """A float32 array of a tensor (numpy itself knows neither bfloat16 nor devices) or an array."""
    return np.asarray(value.detach().float().cpu() if hasattr(value, "detach") else value, np.float32)


def rename_aliases(state: Mapping[str, np.ndarray], wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Gives the tensors of the layers in `ALIASES` the names that are wanted."""

    def rename(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        alias = f"{ALIASES.get(module)}.{leaf}"
        return alias if name not in wanted and alias in wanted and alias not in state else name

    return {rename(name): value for name, value in state.items()}


def _check_fit(
    state: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[TreePath, tuple[int, ...]]], source: str
) -> None:
    """Raises ValueError for the first tensor that is misshapen, extra or missing."""
    misfit = f"{source} does not fit the model:"
    advice = "load it into a model of the same architecture, widths and number of classes."
    for name, array in state.items():
        if name not in wanted:
            raise ValueError(f"{misfit} it has {name!r} of shape {array.shape}, which the model lacks; {advice}")
        shape = wanted[name][1]
        if array.shape != shape:
            raise ValueError(f"{misfit} {name!r} has shape {array.shape}, the model's is {shape}; {advice}")
    for name, (_, shape) in wanted.items():
        if name not in state:
            raise ValueError(f"{misfit} it lacks {name!r} of shape {shape}; {advice}")
