"""ResNet-34 on ImageNet.

    python -m experiments.imagenet_r34 --config=configs/imagenet_r34.py --workdir=runs/imagenet_r34 \
        --config.data.data_dir=... --config.base.weights=resnet34.pth

Budgets: p = 0.55 (DDNP Table A1) and 0.50 (NPPM Table 1).

No accuracy of the papers is among our sources; torchvision's base has 73.31 / 91.42 %.

Hardware and time: as ResNet-50, at 0.9 of its FLOPs.

Arguments, joined by commas: a search as in configs/cifar10_r56.py; `tiny` runs the full pipeline at 64 pixels on
the first 500 training images, in minutes on a CPU where few test images are prepared. What is the authors' and what is
ours, and why: configs/imagenet.py.
"""

from ml_collections import ConfigDict

from configs import imagenet

P = {"ddnp": 0.55, "nppm": 0.50}


def get_config(argument: str = "") -> ConfigDict:
    """The experiment in the form that `argument` names."""
    return imagenet.get_config("resnet34", imagenet.RESNET, P, argument)
