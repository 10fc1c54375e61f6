"""ShuffleNetV2+ (small) on ImageNet.

    python -m experiments.imagenet_shufflenet --config=configs/imagenet_shufflenet.py \
        --workdir=runs/imagenet_shufflenet --config.data.data_dir=... --config.base.weights=ShuffleNetV2+.Small.pth.tar

Budget: p = 0.70 (NPPM Table 1); DDNP has no ShuffleNetV2+ and takes the same here. The table does not say which size;
the other two are `--config.model.name=shufflenet_v2_plus_medium` and `_large`.

Megvii's networks see 0..255 with blue first and without normalization, and so do these.

No accuracy of the papers is among our sources; Megvii's small one has 74.1 % top-1.

Hardware and time: the input decides: every step needs 1,024 decoded images, and little computation.

Arguments, joined by commas: a search as in configs/cifar10_r56.py; `tiny` runs the full pipeline at 64 pixels on
the first 500 training images, in minutes on a CPU where few test images are prepared. What is the authors' and what is
ours, and why: configs/imagenet.py.
"""

from ml_collections import ConfigDict

from configs import imagenet

P = {"ddnp": 0.70, "nppm": 0.70}


def get_config(argument: str = "") -> ConfigDict:
    """The experiment in the form that `argument` names."""
    config = imagenet.get_config("shufflenet_v2_plus_small", imagenet.MOBILE, P, argument)
    config.data.update(mean=(0.0,) * 3, std=(1 / 255,) * 3, bgr=True)
    return config
