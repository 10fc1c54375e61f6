"""MobileNetV2 on ImageNet.

    python -m experiments.imagenet_mbv2 --config=configs/imagenet_mbv2.py --workdir=runs/imagenet_mbv2 \
        --config.data.data_dir=... --config.base.weights=mobilenet_v2.pth

Budgets: p = 0.67 (DDNP Table A1) and 0.63 (NPPM Table 1).

No accuracy of the papers is among our sources; torchvision's base has 71.88 / 90.29 %.

Hardware and time: the input decides: every step needs 1,024 decoded images, and little computation.

Arguments, joined by commas: a search as in configs/cifar10_r56.py, with `nppm_mobilenet` (σ = 3, no projection, batches
of 128, the rate x0.1 at half of the search: the authors' on MobileNetV2) instead of `nppm`; `tiny` runs the full
pipeline at 64 pixels on the first 500 training images, in minutes on a CPU where few test images are prepared. What is
the authors' and what is ours, and why: configs/imagenet.py.
"""

from ml_collections import ConfigDict

from configs import imagenet

P = {"ddnp": 0.67, "nppm": 0.63}


def get_config(argument: str = "") -> ConfigDict:
    """The experiment in the form that `argument` names."""
    return imagenet.get_config("mobilenet_v2", imagenet.MOBILE, P, argument)
