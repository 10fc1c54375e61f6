"""MobileNetV2 on CIFAR-10 (DDNP Table A1: p = 0.56; NPPM Table 1: 0.55), trained from scratch or from a checkpoint.

    python -m experiments.cifar10_mbv2 --config=configs/cifar10_mbv2.py --workdir=runs/cifar10_mbv2

The network (`mobilenet_v2_cifar`, 304.08 M multiply-accumulates) and the budgets are the authors', as are the trainer
and the search, as far as configs/cifar10_r56.py has them from their ResNet-56. Of their changes for MobileNetV2, only
NPPM's search is known, `nppm_mobilenet`: σ = 3, no projection, batches of 128, the rate x0.1 at half
of it. No accuracy of the papers is among our sources. One GPU: hours; it was not run at full length here.

Arguments: those of configs/cifar10_r56.py, with `nppm_mobilenet` instead of `nppm`; `tiny` runs the full pipeline
in minutes, on the first 2,000 training images.
"""

from ml_collections import ConfigDict

from configs import default

P = {"ddnp": 0.56, "nppm": 0.55}
FORMS = {"tiny": default.SHORT_CIFAR10}


def get_config(argument: str = "") -> ConfigDict:
    """The experiment in the form that `argument` names."""
    config = default.get_config()
    config.model.name = "mobilenet_v2_cifar"
    config.model.attributes = ConfigDict()
    return default.choose(config, argument, P, FORMS)
