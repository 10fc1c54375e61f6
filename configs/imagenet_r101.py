"""ResNet-101 on ImageNet.

    python -m experiments.imagenet_r101 --config=configs/imagenet_r101.py --workdir=runs/imagenet_r101 \
        --config.data.data_dir=... --config.base.weights=resnet101.pth

Budget: p = 0.42 (NPPM Table 1); DDNP has no ResNet-101 and takes the same here.

No accuracy of the papers is among our sources; torchvision's base has 77.37 / 93.55 %.

Hardware and time: as ResNet-50, at 1.9 times its FLOPs.

Arguments, joined by commas: a search as in configs/cifar10_r56.py; `tiny` runs the full pipeline at 64 pixels on
the first 500 training images, in minutes on a CPU where few test images are prepared. What is the authors' and what is
ours, and why: configs/imagenet.py.
"""

from ml_collections import ConfigDict

from configs import imagenet

P = {"ddnp": 0.42, "nppm": 0.42}


def get_config(argument: str = "") -> ConfigDict:
    """The experiment in the form that `argument` names."""
    return imagenet.get_config("resnet101", imagenet.RESNET, P, argument)
