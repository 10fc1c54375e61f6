"""Saving a network to a folder, with its weights and a description of its module, and loading it; without pickle."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from ddnp_jax import files
from ddnp_jax.compact import check_finite
from ddnp_jax.models.layers import Backbone
from ddnp_jax.networks import LeafPath, Network, Sizes, as_network, flatten, replace_leaves

DESCRIPTION = "model.json"
_SEPARATOR = "\x1f"  # separator of the names in a path; not a slash, because Haiku's names contain slashes
OWN_PACKAGE = __name__.partition(".")[0]
_DEFAULTS: dict[str, Any] = {"kind": "linen", "sizes": []}  # for folders of versions that supported only linen modules
_FIELDS: dict[str, type] = {
    **dict.fromkeys(("kind", "class", "weights", "sha256"), str),
    **dict.fromkeys(("missing", "sizes"), list),
    "attributes": dict,
}


def save_pruned(path: str | Path, model: Any, variables: Any = None) -> None:
    """Saves a network to a folder, for `load_pruned`.

    The folder contains the weights (msgpack) and `model.json`: the module's class and attributes, the sizes of its
    layers, and the checksum of the weights. `model.json` is replaced last and atomically, so that a reader finds either
    the old network or the new one, never a mixture.

    Args:
      path: Path of the folder, which is created if necessary.
      model: The network. If a linen module has attributes that are neither JSON values, data types nor defaults of
        their class, `load_pruned` needs the unpruned module.
      variables: Variables of the network; None for an nnx module.

    Raises:
      ValueError: A variable is NaN or infinite.
    """
    network = as_network(model)
    check_finite(network.variables(variables), network.name)
    leaves = {
        _SEPARATOR.join(path): np.asarray(leaf)
        for path, leaf in flatten(network.variables(variables)).items()
        if _is_saved(leaf)
    }
    weights = flax.serialization.msgpack_serialize(leaves)
    checksum = hashlib.sha256(weights).hexdigest()
    name = f"weights-{checksum[:16]}.msgpack"
    module = getattr(network, "module", model)
    attributes, missing = _attributes(module) if network.kind == "linen" else ({}, ["model"])
    description = {
        "kind": network.kind,
        "class": f"{type(module).__module__}:{type(module).__qualname__}",
        "attributes": attributes,
        "missing": missing,
        "sizes": [[list(path), dict(sizes)] for path, sizes in network.saved_sizes()],
        "weights": name,
        "sha256": checksum,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_bytes(folder / name, weights)
    files.write_sealed(folder / DESCRIPTION, description)
    for old in folder.glob("weights-*.msgpack"):
        if old.name != name:
            old.unlink()


def load_pruned(path: str | Path, model: Any = None, variables: Any = None) -> tuple[Any, Any]:
    """Loads a network saved by `save_pruned`.

    No code from the folder is executed: besides this library's own classes, only classes from modules that are already
    imported are instantiated.

    Args:
      path: Path of the folder.
      model: The unpruned network; not needed for linen modules whose class is known and whose attributes were saved.
      variables: Variables with the structure of those saved, if that is not nested dictionaries.

    Returns:
      The network and its variables; None for an nnx module, which holds them.

    Raises:
      ValueError: The folder does not contain a saved network, it is damaged, its module cannot be rebuilt, or `model`
        has other attributes; only the data type may differ.
    """
    file = Path(path) / DESCRIPTION
    description = _description(file)
    leaves = _weights(file, description)
    sizes: Sizes = tuple(
        (tuple(path), tuple((key, _from_json(value)) for key, value in own.items()))
        for path, own in description["sizes"]
    )
    if model is None:
        model = _build(description, file)
    network = as_network(model)
    if network.kind != description["kind"]:
        raise ValueError(
            f"{file} holds a {description['kind']} network, and model= is a {network.kind} network; pass the unpruned "
            "network that it was made from."
        )
    if network.kind == "linen":
        _check_attributes(getattr(network, "module", model), description, file)
    if isinstance(model, Backbone):  # its sizes are an attribute, and not sizes of its submodules
        widths = {"widths": description["attributes"].get("widths")}
        network = as_network(_with_attributes(model.clone, network.name, widths, file))
    network = as_network(network.with_sizes(sizes))
    loaded = _variables(network, variables, leaves, file)
    check_finite(loaded, str(file.parent))
    return network.bind(loaded)


def _is_saved(leaf: Any) -> bool:
    """Whether a leaf is saved; random keys are not, because a module that is loaded has its own."""
    return not jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)


def _variables(network: Network, like: Any, leaves: Mapping[LeafPath, Any], file: Path) -> Any:
    """Returns loaded leaves as variables with the structure of the network's variables."""
    if network.kind != "nnx" and like is None:
        return unflatten_dict(leaves)
    like = network.variables(like)
    own = flatten(like)
    if unknown := [path for path in leaves if path not in own]:
        raise ValueError(
            f"{file} has {'/'.join(unknown[0])!r}, which the given network lacks; give the network that was saved."
        )
    if absent := [path for path, leaf in own.items() if path not in leaves and _is_saved(leaf)]:
        raise ValueError(f"{file} lacks {'/'.join(absent[0])!r} of the given network; give the network that was saved.")
    return replace_leaves(like, {**own, **leaves})


def _description(file: Path) -> dict[str, Any]:
    if not file.exists():
        inner = file.parent / "pruned"  # of a run
        if (inner / file.name).exists():
            raise ValueError(f"{file} does not exist; give {inner}.")
        raise ValueError(f"{file} does not exist; load_pruned reads a folder that save_pruned wrote.")
    found = _DEFAULTS | files.read_sealed(file)
    try:
        for name, kind in _FIELDS.items():
            if not isinstance(found[name], kind):
                raise TypeError(f"{name} is not a {kind.__name__}")
        for path, own in found["sizes"]:
            if not (isinstance(path, list) and all(isinstance(name, str) for name in path) and isinstance(own, dict)):
                raise TypeError("sizes are not pairs of a path and sizes")
            if not all(_is_size(value) for value in own.values()):
                raise TypeError("a size is not a positive number")
    except KeyError as error:
        raise ValueError(f"{file} is damaged: it has no {error}; write the network again with save_pruned.") from error
    except (ValueError, TypeError) as error:  # ValueError if sizes are not pairs
        raise ValueError(f"{file} is damaged ({error}); write the network again with save_pruned.") from error
    return found


def _is_size(value: Any) -> bool:
    if value is None:  # GroupNorm has two sizes, of which one is None
        return True
    if isinstance(value, list):
        return all(map(_is_size, value))
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _weights(file: Path, description: Mapping[str, Any]) -> dict[LeafPath, jax.Array]:
    weights_file = file.parent / Path(description["weights"]).name
    content = weights_file.read_bytes() if weights_file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != description["sha256"]:
        raise ValueError(f"{weights_file} is damaged or missing: its checksum is not that of {DESCRIPTION}.")
    try:
        leaves = flatten(flax.serialization.msgpack_restore(content))
        paths = {path: tuple(path[0].split(_SEPARATOR)) if len(path) == 1 else path for path in leaves}
        found = {paths[path]: jnp.asarray(leaf) for path, leaf in leaves.items()}
        unflatten_dict(found)  # raises if the path of a leaf continues that of another one
    except Exception as error:  # a malicious file can raise any error
        raise ValueError(f"{weights_file} holds no weights ({error!r}); write the network again.") from error
    if not found or not all(path and all(isinstance(name, str) for name in path) for path in found):
        raise ValueError(f"{weights_file} holds no weights by name; write the network again.")
    return found


def _attributes(module: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Returns a module's attributes as JSON values, without defaults, and the names of those that cannot be saved."""
    attributes, missing = {}, []
    for name, field in type(module).__dataclass_fields__.items():
        value = getattr(module, name)
        if name in ("parent", "name") or value is field.default:
            continue
        try:
            written = _to_json(value)
        except TypeError:
            missing.append(name)
            continue
        if not _is_json(field.default, written):
            attributes[name] = written
    return attributes, missing


def _is_json(value: Any, written: Any) -> bool:
    """Whether a value is saved as the JSON value `written`."""
    try:
        return _to_json(value) == written and type(_to_json(value)) is type(written)
    except TypeError:
        return False


def _check_attributes(module: nn.Module, description: Mapping[str, Any], file: Path) -> None:
    own, _ = _attributes(module)
    theirs, missing = description["attributes"], description["missing"]
    may_differ = ("dtype", *missing, *(("widths",) if isinstance(module, Backbone) else ()))
    for name in theirs | own:
        if name not in may_differ and theirs.get(name) != own.get(name):
            saved, given = (repr(each[name]) if name in each else "its default" for each in (theirs, own))
            raise ValueError(
                f"{file} holds a network with {name}={saved}, and the model has {given}; pass the network with the "
                "saved value."
            )


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    if isinstance(value, type(jnp.float32) | np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {"dtype": jnp.dtype(value).name}
    raise TypeError(f"{value!r} is not a JSON value")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    return jnp.dtype(value["dtype"]) if isinstance(value, dict) else value


def _build(description: Mapping[str, Any], file: Path) -> nn.Module:
    name, missing = description["class"], description["missing"]
    if missing:
        what = f"lacks the attributes {', '.join(map(str, missing))} of {name}"
        if description["kind"] != "linen":
            what = f"holds a {description['kind']} network, of which only the variables can be saved"
        raise ValueError(f"{file} {what}; pass the unpruned network, load_pruned(..., model=).")
    found = _class(name)
    if found is None:
        advice = "" if name.startswith("__main__:") else "import its module first, or "
        raise ValueError(
            f"{file}: {name} is not a class of this library or of an imported module; {advice}pass the unpruned "
            "network, load_pruned(..., model=)."
        )
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{file}: {name} is not a flax module.")
    return _with_attributes(found, name, description["attributes"], file)


def _with_attributes(make: Callable[..., nn.Module], name: str, attributes: Mapping[str, Any], file: Path) -> nn.Module:
    """Makes a module with saved attributes; `name` is that of its class."""
    try:
        return make(**{key: _from_json(value) for key, value in attributes.items()})
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: {name} does not accept the saved attributes ({error}).") from error


def _class(name: str) -> Any:
    """Returns a class of this library or of an imported module; None for other names."""
    module, _, qualname = name.partition(":")
    if module.partition(".")[0] == OWN_PACKAGE and module not in sys.modules:
        try:
            importlib.import_module(module)
        except ImportError:
            return None
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found
