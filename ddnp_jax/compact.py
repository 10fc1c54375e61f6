"""From a Selection to a smaller model: cut, proof that it computes what the masked network does, and its file."""

import hashlib
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax.masking import apply_masked
from ddnp_jax.topology import Selection, Topology, variable_shapes

DESCRIPTION = "model.json"


def compact(
    model: nn.Module,
    variables: Any,
    selection: Selection,
    topology: Topology,
    rebuild: Callable[[tuple[int, ...]], nn.Module] | None = None,
) -> tuple[nn.Module, Any]:
    """Cuts the channels that are not selected out of a network.

    Args:
      model: the network.
      variables: of the network.
      selection: what stays.
      topology: what `trace` found for the model.
      rebuild: makes the smaller module from the channels per gate; needed for modules without a `widths` attribute.

    Returns:
      The smaller module and its variables, without a trace of masks.

    Raises:
      ValueError: the selection does not fit, or the smaller module's variables are others than the slices.
    """
    selection.check(topology)
    if rebuild is None and not hasattr(model, "widths"):
        raise ValueError(f"{type(model).__name__} has no attribute `widths`; pass rebuild=, a function of the widths.")
    small_model = model.clone(widths=selection.widths) if rebuild is None else rebuild(selection.widths)
    topology.check(variables)
    leaves = flax.traverse_util.flatten_dict(jax.device_get(variables))
    for gate, kept in zip(topology.gates, selection.kept, strict=True):
        for cut in gate.slices:
            leaves[cut.path] = np.take(leaves[cut.path], cut.indices(gate.channels, kept), cut.axis)
    _check_shapes(small_model, leaves, topology)
    return small_model, jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(leaves))


def _check_shapes(small_model: nn.Module, leaves: dict[tuple[str, ...], Any], topology: Topology) -> None:
    image = jax.ShapeDtypeStruct((1, *topology.input_shape), jnp.float32)
    expected = variable_shapes(small_model, image, dict(topology.call_kwargs))
    shapes = {path: leaf.shape for path, leaf in expected.items()}
    for path in shapes | leaves:
        wanted, cut = shapes.get(path), leaves[path].shape if path in leaves else None
        if wanted != cut:
            raise ValueError(
                f"the smaller model expects {'/'.join(path)} with shape {wanted}, the cut gives {cut}; "
                "its channels must be the widths, gate by gate in the order of `topology.gates`."
            )


class Verification(NamedTuple):
    """How near a smaller network is to the masked one.

    Attributes:
      max_difference: largest difference of an output.
      argmax_agreement: fraction of the images with the same predicted class.
    """

    max_difference: float
    argmax_agreement: float


def verify(
    model: nn.Module,
    variables: Any,
    small_model: nn.Module,
    small_variables: Any,
    selection: Selection,
    topology: Topology,
    images: Any,
    tolerance: float = 1e-4,
) -> Verification:
    """Compares a smaller network with the masked one that it was cut from.

    Args:
      model: the whole network.
      variables: of the whole network.
      small_model: the smaller network.
      small_variables: of the smaller network.
      selection: what stays.
      topology: of the whole network.
      images: (N, *topology.input_shape).
      tolerance: allowed difference of the logits, relative to the largest absolute logit of the masked network.

    Both compute in float32, where their modules have an attribute `dtype`.

    Raises:
      ValueError: the networks differ by more than the tolerance.
    """
    masks = selection.masks(topology)
    kwargs = dict(topology.call_kwargs)
    # In bfloat16 another order of a sum would hide what is looked for; the parameters are float32 anyway.
    model, small_model = (m.clone(dtype=jnp.float32) if hasattr(m, "dtype") else m for m in (model, small_model))
    with jax.default_matmul_precision("float32"):
        masked = jax.jit(lambda v, x: apply_masked(model, v, x, masks, topology))(variables, images)
        cut = jax.jit(lambda v, x: small_model.apply(v, x, **kwargs))(small_variables, images)
    masked, cut = (np.asarray(logits, np.float32) for logits in (masked, cut))
    difference = float(np.max(np.abs(masked - cut)))
    agreement = float(np.mean(masked.argmax(-1) == cut.argmax(-1)))
    allowed = tolerance * float(np.max(np.abs(masked)))
    if not difference <= allowed:
        raise ValueError(
            f"the smaller network does not compute what the masked one does: logits differ by up to {difference:.3g} "
            f"(allowed: {allowed:.3g}), and {agreement:.2%} of the predictions agree."
        )
    return Verification(difference, agreement)


def save_pruned(path: str | Path, model: nn.Module, variables: Any) -> None:
    """Writes a network into a folder, for `load_pruned`.

    The folder gets the weights (msgpack) and `model.json`: the module's class, attributes, and the weights' checksum.
    `model.json` is replaced last and at once, so that a reader finds the old network or the new one, never a mixture.

    Args:
      path: of the folder, which is made.
      model: the network. Attributes that are neither JSON values, data types nor defaults of their class are listed
        as missing, and `load_pruned` then needs the module.
      variables: of the network.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = flax.serialization.to_bytes(jax.device_get(variables))
    checksum = hashlib.sha256(weights).hexdigest()
    name = f"weights-{checksum[:16]}.msgpack"
    _write(folder / name, weights)
    attributes, missing = _attributes(model)
    cls = type(model)
    description = {
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "attributes": attributes,
        "missing": missing,
        "weights": name,
        "sha256": checksum,
    }
    _write(folder / DESCRIPTION, json.dumps(description, indent=2).encode())
    for old in folder.glob("weights-*.msgpack"):
        if old.name != name:
            old.unlink()


def load_pruned(path: str | Path, model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """Reads a network that `save_pruned` wrote; imports its class by name, and nothing is unpickled.

    Args:
      path: of the folder.
      model: the module, for networks whose class cannot be imported or whose attributes could not be written.

    Returns:
      The module and its variables.

    Raises:
      ValueError: the folder holds no such network, it is damaged, its module cannot be built again, or `model` has
        other attributes; the data type may differ.
    """
    file = Path(path) / DESCRIPTION
    if not file.exists():
        raise ValueError(f"{file} does not exist; load_pruned reads a folder that save_pruned wrote.")
    try:
        description = json.loads(file.read_text())
        weights_file, checksum = file.parent / Path(description["weights"]).name, description["sha256"]
        cls, attributes, missing = (description[key] for key in ("class", "attributes", "missing"))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); write the network again with save_pruned.") from error
    weights = weights_file.read_bytes() if weights_file.exists() else b""
    if hashlib.sha256(weights).hexdigest() != checksum:
        raise ValueError(f"{weights_file} is damaged or missing: its checksum is not that of {DESCRIPTION}.")
    if model is None:
        model = _build(cls, attributes, missing, file)
    else:
        _check_attributes(model, attributes, missing, file)
    return model, jax.tree.map(jnp.asarray, flax.serialization.msgpack_restore(weights))


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _attributes(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """A module's attributes as JSON values, and the names of those that are none; defaults are left out."""
    attributes, missing = {}, []
    for name, field in type(model).__dataclass_fields__.items():
        value = getattr(model, name)
        if name in ("parent", "name") or value is field.default:
            continue
        try:
            attributes[name] = _to_json(value)
        except TypeError:
            missing.append(name)
    return attributes, missing


def _check_attributes(model: nn.Module, attributes: dict[str, Any], missing: list[str], file: Path) -> None:
    own, _ = _attributes(model)
    for name in attributes | own:
        if name not in ("dtype", *missing) and attributes.get(name) != own.get(name):
            theirs, ours = (repr(each[name]) if name in each else "its default" for each in (attributes, own))
            raise ValueError(f"{file} holds a network with {name}={theirs}, and the model has {ours}.")


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    if isinstance(value, type(jnp.float32) | np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {"dtype": jnp.dtype(value).name}
    raise TypeError(f"{value!r} is no JSON value")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    return jnp.dtype(value["dtype"]) if isinstance(value, dict) else value


def _build(cls: str, attributes: dict[str, Any], missing: list[str], file: Path) -> nn.Module:
    if missing:
        raise ValueError(f"{file} lacks the attributes {', '.join(missing)} of {cls}; pass load_pruned(..., model=).")
    module, _, qualname = cls.partition(":")
    try:
        found = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{file}: {cls} cannot be imported ({error}); pass load_pruned(..., model=).") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{file}: {cls} is no flax module.")
    try:
        return found(**{name: _from_json(value) for name, value in attributes.items()})
    except TypeError as error:
        raise ValueError(f"{file}: {cls} does not take its attributes any more ({error}).") from error
