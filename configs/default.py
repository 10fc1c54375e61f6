"""The searches and short forms that experiments share. Configurations start from `get_config`.

Every field is defined in `ddnp_jax/config.py`, with its default and meaning; those of a search method in its class
`Fields`, in `ddnp_jax/methods/`.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ddnp_jax import methods
from ddnp_jax.config import Config, as_dict, shared_search_fields

# The searches that every configuration offers by its argument: method, and the fields that differ from its defaults.
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddnp": ("ddnp", {}),
    "authors": (  # the authors' published code, where it differs from Tables A2 and A3
        "ddnp",
        {
            "search.bidirectional": True,
            "search.layer_norm": True,
            "search.width": "linear",
            "search.width_optimizer.learning_rate": 1e-3,
            "search.energy_weight": 0.5,
            "search.importance_average": 0.99,
        },
    ),
    "scalar": (
        "ddnp",
        {
            "search.importance": "scalar",
            "search.width": "scalar",
            "search.importance_optimizer.learning_rate": 5e-2,
            "search.width_optimizer.learning_rate": 5e-2,
        },
    ),
    "nppm": ("nppm", {}),
    "nppm_mobilenet": (  # what the authors ran on MobileNetV2
        "nppm",
        {
            "search.batch_size": 128,
            "search.decay_at": 0.5,
            "search.predictor_noise": 3.0,
            "search.projection": False,
        },
    ),
    "dg": ("nppm", {"search.predictor": "none"}),
    "uniform": ("uniform", {}),
    "magnitude": ("magnitude", {}),
    "bn_scale": ("bn_scale", {}),
    "fpgm": ("fpgm", {}),
    "lamp": ("lamp", {}),
    "taylor": ("taylor", {}),
    "hrank": ("hrank", {}),
    "chip": ("chip", {}),
    "cc": ("cc", {}),
    "stored": ("stored", {}),
}


# Fields in which the methods differ, for experiments without such fields of their own. NPPM searches on 10 % of the
# training images, as its authors on CIFAR-10.
OF_METHOD: dict[str, dict[str, Any]] = {"nppm": {"data.search_fraction": 0.1}}

# For searches of a few hundred steps: with the 1e-3 of 2,000 steps k does not always come back to the open gates.
OF_METHOD_IN_FEW_STEPS: dict[str, dict[str, Any]] = {"ddnp": {"search.width_optimizer.learning_rate": 3e-3}}

# Variants that every configuration offers in addition to its own.
FORMS: dict[str, dict[str, Any]] = {
    "residual": {"budget.residual": True},
    "global": {"search.allocation": "global"},
}

# On a slice of the training images: tests everything except accuracy and NPPM's PN, whose memory stays too small.
SHORT = {
    **{f"{stage}.epochs": 1 for stage in ("base", "search", "finetune")},
    **{f"{stage}.chunk_steps": 2 for stage in ("base", "search", "finetune")},
    **{f"{stage}.warmup_epochs": 0.0 for stage in ("base", "finetune")},
}
SHORT_CIFAR10 = {
    **SHORT,
    "data.train_split": "train[:2000]",
    "data.search_fraction": 0.2,
    "data.validation_fraction": 0.1,
}


def get_config() -> ConfigDict:
    """The common configuration; an experiment fills `data` and `model` and ends with `choose`."""
    config = ConfigDict(as_dict(Config()))
    config.search.update(shared_search_fields())
    config.model.attributes.shortcut = "subsample"  # of the CIFAR ResNets: He et al.'s option A
    return config


def choose(
    config: ConfigDict,
    argument: str,
    p: Mapping[str, float],
    forms: Mapping[str, Mapping[str, Any]],
    of_method: Mapping[str, Mapping[str, Any]] = OF_METHOD,
) -> ConfigDict:
    """Completes a configuration according to its argument, and locks it.

    Args:
      config: Configuration with all other values set.
      argument: Names joined by commas: at most one of `SEARCHES`, and any of `FORMS` and `forms`; "" is DDNP.
      p: Budget of each method; methods without one take DDNP's.
      forms: Further forms of this experiment, the fields of each by name.
      of_method: Fields of methods that differ in this experiment, unless `SEARCHES` has them.

    Raises:
      ValueError: A name is unknown, or there are two searches.
    """
    words = list(filter(None, argument.split(",")))
    forms = {**FORMS, **forms}
    if unknown := [word for word in words if word not in (*SEARCHES, *forms)]:
        known = ", ".join((*SEARCHES, *forms))
        raise ValueError(f"the configuration's argument {unknown[0]!r} is unknown; use {known}.")
    searches = [word for word in words if word in SEARCHES] or ["ddnp"]
    if len(searches) > 1:
        raise ValueError(f"the configuration's argument names two searches, {' and '.join(searches)}; name one.")
    method, fields = SEARCHES[searches[0]]
    config.search.method = method
    config.search.update(ConfigDict(methods.default_fields(method)))
    config.search.update(methods.METHODS[method].job_fields)
    config.budget.p = p.get(method, p["ddnp"])
    for chosen in (of_method.get(method, {}), fields, *(forms[word] for word in words if word in forms)):
        config.update_from_flattened_dict(chosen)
    config.search.epochs = methods.METHODS[method].passes or config.search.epochs
    config.variant = argument or "default"
    return config.lock()
