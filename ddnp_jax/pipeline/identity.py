"""Identifies what a run and each of its results were computed from, by the contents of files and not by their paths."""

import dataclasses
import functools
import hashlib
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddnp_jax import data, files, parallel
from ddnp_jax.networks import Network, flatten
from ddnp_jax.saved import DESCRIPTION

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def given(network: Network, dataset: data.Dataset, weights: str, selection: Path | None = None) -> dict[str, Any]:
    """Describes the inputs of a run other than its configuration, as JSON values.

    Args:
      network: The network.
      dataset: The images.
      weights: Path of the initial weights, a file or a folder written by `save_pruned`; "" for none.
      selection: File of the channels to keep, if they are given.
    """
    found = {"model": described(network.model), "data": dataset.fingerprint(), "weights": _content(weights)}
    return found if selection is None else {**found, "selection": _content(str(selection))}


def digest(*parts: Any) -> str:
    """SHA-256 of the exact bytes of pytrees of arrays and JSON values."""
    found = hashlib.sha256()
    for part in parts:
        for path, leaf in flatten(part).items():
            array = np.asarray(jax.random.key_data(leaf) if parallel.is_key(leaf) else leaf)
            found.update(f"{path} {array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def described(value: Any) -> Any:
    """Describes a module, or an attribute of a module, as JSON values: its class and attributes, functions by name."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case nn.Module() | nnx.Module():
            return {"class": _name(type(value)), **_attributes(value)}
        case functools.partial():
            return ["partial", *map(described, (value.func, value.args, value.keywords))]
        case Mapping():
            return {str(key): described(each) for key, each in value.items()}
        case list() | tuple():
            return [described(each) for each in value]
        case np.ndarray() | jax.Array():
            return digest(value)
        case types.FunctionType():
            # All lambdas have the same name; the names that they use tell them apart.
            return " ".join([_name(value), *value.__code__.co_names]) if "<lambda>" in _name(value) else _name(value)
        case type() | types.MethodType() | types.BuiltinFunctionType():
            return _name(value)
    try:
        return jnp.dtype(value).name
    except TypeError:
        return _ADDRESS.sub("", repr(value))


def _attributes(module: Any) -> dict[str, Any]:
    if isinstance(module, nn.Module):
        found = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
        names = found.keys() - {"parent", "name"}
    else:
        found = vars(module)
        names = {name for name, each in found.items() if not name.startswith("_") and not isinstance(each, _STATE)}
    return {name: described(found[name]) for name in sorted(names)}


_STATE = (nnx.Variable, nnx.Rngs, nnx.RngStream)  # the state of an nnx module, which is not part of its description


def _name(value: Any) -> str:
    module, name = (getattr(value, each, "") for each in ("__module__", "__qualname__"))
    return f"{module}:{name or getattr(value, '__name__', type(value).__name__)}"


def _content(path: str) -> str:
    """SHA-256 of a file; of a folder of weights that of its description, which contains the weights' checksum."""
    if not path:
        return ""
    file = Path(path).expanduser()
    with (file / DESCRIPTION if file.is_dir() else file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def stripped(config: Mapping[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """Returns nested mappings without the given fields, which are written as 'a.b'."""
    nested = {name: tuple(f.partition(".")[2] for f in fields if f.startswith(f"{name}.")) for name in config}
    return {
        name: stripped(value, nested[name]) if isinstance(value, Mapping) and nested[name] else value
        for name, value in config.items()
        if name not in fields
    }


def made_from(identity: Mapping[str, Any], *inputs: Any) -> str:
    """SHA-256 of everything that a result was computed from: the run's identity and the input arrays."""
    return digest(files.checksum(identity), *inputs)
