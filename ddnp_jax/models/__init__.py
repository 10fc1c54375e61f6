"""Backbones: plain flax.linen modules without any pruning code.

Every architecture is a module of this package. Its `MODELS: dict[str, Callable[..., nn.Module]]` registers names for
`create`.
"""

import importlib
import pkgutil
from typing import Any

import flax.linen as nn


def names() -> dict[str, Any]:
    """Returns the constructors of all backbones by name."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return {name: constructor for module in modules for name, constructor in getattr(module, "MODELS", {}).items()}


def create(name: str, num_classes: int, **attributes: Any) -> nn.Module:
    """Builds a backbone.

    Args:
      name: Name of the backbone, for example "resnet56"; one of `names()`.
      num_classes: Number of outputs of the classifier.
      **attributes: Additional attributes of the module, for example `widths` or `shortcut`.

    Raises:
      ValueError: The name or an attribute is unknown, or the number of `widths` does not match the network.
    """
    constructors = names()
    if name not in constructors:
        raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(constructors)}.")
    try:
        return constructors[name](num_classes=num_classes, **attributes)
    except TypeError as error:
        given = ", ".join(f"{attribute}={value!r}" for attribute, value in attributes.items())
        raise ValueError(f"model {name!r} does not take the attributes {given}: {error}.") from error
