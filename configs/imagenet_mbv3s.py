"""MobileNetV3-small on ImageNet.

    python -m experiments.imagenet_mbv3s --config=configs/imagenet_mbv3s.py --workdir=runs/imagenet_mbv3s \
        --config.data.data_dir=... --config.base.weights=mobilenet_v3_small.pth

Budget: p = 0.75 (DDNP Table A1); NPPM has no MobileNetV3 and takes the same here.

No accuracy of the papers is among our sources; torchvision's base has 67.67 / 87.40 %.

Hardware and time: the input decides: every step needs 1,024 decoded images, and little computation.

Arguments, joined by commas: a search as in configs/cifar10_r56.py; `tiny` runs the full pipeline at 64 pixels on
the first 500 training images, in minutes on a CPU where few test images are prepared. What is the authors' and what is
ours, and why: configs/imagenet.py.
"""

from ml_collections import ConfigDict

from configs import imagenet

P = {"ddnp": 0.75}


def get_config(argument: str = "") -> ConfigDict:
    """The experiment in the form that `argument` names."""
    return imagenet.get_config("mobilenet_v3_small", imagenet.MOBILE, P, argument)
