"""Networks by name: those of this library, and those of the user's modules."""

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from ddnp_jax import models
from ddnp_jax.networks import as_network, first_line

CLASSES = 1000  # of this library's models by default


def network_of(name: str, attributes: Mapping[str, Any], num_classes: int | None = None) -> tuple[Any, Any]:
    """Returns the network with a name, and its variables.

    Args:
      name: A model of this library, or MODULE:NAME. The latter is a network, a module class, or a function that returns
        a network or (network, variables); MODULE is imported, from the working directory too.
      attributes: Keyword arguments to make it with. A module class or function with an argument `rngs` gets one.
      num_classes: Number of classes, which a module class or function with such an argument gets too; None for
        `CLASSES`, or its own default.

    Returns:
      The network and its variables, None where it came without.

    Raises:
      ValueError: There is no such network, or what the name stands for makes none; the message says what to give.
    """
    if ":" not in name:
        if name not in models.names():
            known = ", ".join(models.names())
            raise ValueError(
                f"{name!r} is not a model of this library ({known}); give one, or your own as MODULE:NAME."
            )
        return models.create(name, **{"num_classes": num_classes or CLASSES, **attributes}), None
    found = _imported(name)
    made = found if isinstance(found, nn.Module | nnx.Module) else _made(name, found, attributes, num_classes)
    model, variables = made if type(made) is tuple and len(made) == 2 else (made, None)
    try:
        network = as_network(model)
        jax.eval_shape(lambda: variables)
    except TypeError as error:
        raise ValueError(f"{name} makes no network ({first_line(error)})") from error
    if network.kind == "function" and variables is None:
        raise ValueError(f"{name} makes a function, whose variables are needed too; return (function, variables).")
    return model, variables


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # a script's own folder is there in its place
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(
            f"the module of {name} cannot be imported ({first_line(error)}); give MODULE:NAME as in `from MODULE "
            "import NAME`, from the module's folder."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module} has no {attribute!r}; give MODULE:NAME with a function or network of it.")
        found = getattr(found, part)
    return found


def _made(name: str, make: Any, attributes: Mapping[str, Any], num_classes: int | None) -> Any:
    if not callable(make):
        raise ValueError(f"{name} is {make!r}, no network and no function that returns one; name one of these.")
    try:
        # The signature of an nnx class is that of its metaclass.
        parameters = inspect.signature(make.__init__ if inspect.isclass(make) else make).parameters
        offered = {"rngs": nnx.Rngs(0), **({"num_classes": num_classes} if num_classes else {})}
        return make(**{**{key: value for key, value in offered.items() if key in parameters}, **attributes})
    except Exception as error:  # whatever the user's code raises
        given = ", ".join(f"{attribute}={value!r}" for attribute, value in attributes.items())
        raise ValueError(
            f"{name}({given}) raises {first_line(error)}; name a function that returns the network and needs no other "
            "arguments, or give them (--attribute=NAME=VALUE, or model.attributes of a configuration)."
        ) from error
