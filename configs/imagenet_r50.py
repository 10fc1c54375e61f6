"""ResNet-50 on ImageNet: 55 % or 62 % of all FLOPs removed.

    python -m experiments.imagenet_r50 --config=configs/imagenet_r50.py --workdir=runs/imagenet_r50 \
        --config.data.data_dir=... --config.base.weights=resnet50.pth

Budgets: p = 0.38 removes 55.0 % of the network's FLOPs, p = 0.31 62.0 % (DDNP Table A1); NPPM Table 1 has p = 0.38.

To expect (not reproduced here): DDNP Table A4, base 76.13 / 92.86 %, 62.0 % removed: 75.56 / 92.68 % top-1 / top-5.

Hardware and time: 8 H100 or a TPU v4-16; the hours are arithmetic in docs/scaling.md.

Arguments, joined by commas: a search as in configs/cifar10_r56.py; `55` and `62` choose the
budget by the FLOPs removed (`imagenet_r50.py:62`); `tiny` runs the whole job at 64 pixels on
the first 500 training images, in minutes on a CPU where few test images are prepared. What is the authors' and what is
ours, and why: configs/imagenet.py.
"""

from ml_collections import ConfigDict

from configs import imagenet

P = {"ddnp": 0.38, "nppm": 0.38}
FORMS = {"55": {"budget.p": 0.38}, "62": {"budget.p": 0.31}}


def get_config(argument: str = "") -> ConfigDict:
    """The experiment in the form that `argument` names."""
    return imagenet.get_config("resnet50", imagenet.RESNET, P, argument, FORMS)
