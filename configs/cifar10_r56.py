"""ResNet-56 on CIFAR-10 (DDNP Table A1: p = 0.48), from a trained PyTorch checkpoint or from scratch.

    python -m experiments.cifar10_r56 --config=configs/cifar10_r56.py --workdir=runs/r56 \
        --config.base.weights=resnet56-base.pth.tar --config.data.data_dir=...

Arguments (`configs/cifar10_r56.py:authors`): none is DDNP in the form of Tables A2 and A3; `authors` is the form of the
authors' published code; `scalar` one parameter per channel and per layer ("channel-wise-ks"); `uniform` and `magnitude`
are the floors (random and L1-norm channels at uniform widths); `tiny` runs the whole job in a minute or two.
"""

from ml_collections import ConfigDict

from configs import default

VARIANTS = {
    "": {},
    "authors": {
        "search.bidirectional": True,
        "search.layer_norm": True,
        "search.energy_weight": 0.5,
        "search.importance_average": 0.99,
    },
    "scalar": {
        "search.importance": "scalar",
        "search.width": "scalar",
        "search.importance_optimizer.learning_rate": 5e-2,
        "search.width_optimizer.learning_rate": 5e-2,
    },
    "uniform": {"search.method": "uniform"},
    "magnitude": {"search.method": "magnitude"},
    "tiny": {"model.name": "resnet20", "base.epochs": 1, "search.epochs": 2, "finetune.epochs": 1},
}


def get_config(variant: str = "") -> ConfigDict:
    """The experiment in the form that `variant` names."""
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/cifar10_r56.py:{variant} is unknown; use one of {', '.join(filter(None, VARIANTS))}."
        )
    config = default.get_config()
    config.model.attributes.shortcut = "avgpool"  # the DDNP authors' network
    config.budget.p = 0.48
    config.update_from_flattened_dict(VARIANTS[variant])
    config.variant = variant or "default"
    return config.lock()
