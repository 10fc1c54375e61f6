"""ResNet-50 on ImageNet: 55 % or 62 % of all FLOPs removed.

    python -m experiments.imagenet_r50 --config=configs/imagenet_r50.py --workdir=runs/imagenet_r50 \
        --config.data.data_dir=... --config.base.weights=resnet50.pth

Budgets: DDNP Table A1 has p = 0.38 for 55.0 % of the network's FLOPs and p = 0.31 for 62.0 %; NPPM Table 1 has 0.38.
With the FLOPs of this network, p = 0.38 removes 54.7 % and p = 0.31 60.9 %, so `62` is p = 0.2976, which removes what
the table's rows remove (docs/papers.md).

To expect (not reproduced here): DDNP Table A4, base 76.13 / 92.86 %, 62.0 % removed: 75.56 / 92.68 % top-1 / top-5.

Hardware and time: 8 H100 or a TPU v4-16; the hours are arithmetic in docs/scaling.md.

Arguments, joined by commas: a search as in configs/cifar10_r56.py; `55` and `62` choose the
budget by the FLOPs removed (`imagenet_r50.py:62`), of networks with unpruned residual streams; `hrank,hrank_rates`
and `chip,chip_rates` prune the streams too, at the rates of their authors, scaled to the budget; `tiny` runs the full
pipeline at 64 pixels on the first 500 training images, in minutes on a CPU where few test images are prepared. What is
the authors' and what is ours, and why: configs/imagenet.py.
"""

from ml_collections import ConfigDict

from configs import imagenet

P = {"ddnp": 0.38, "nppm": 0.38}
# Fraction of the channels that the methods' authors remove, in the order of the gates with residual streams: the stem,
# then of each stage two inner convolutions, the stream, and two inner convolutions of every further block. HRank's row
# of 62.1 % of the FLOPs; CHIP's of 62.8 %.
HRANK = (0.2, *(0.8,) * 7, *(0.8,) * 9, *(0.55,) * 13, *(0.45,) * 7)
_STAGE = (0.5, 0.5, 0.25, 0.5, 0.5, 0.5, 0.5)
CHIP = (0.0, *_STAGE, *_STAGE, *(0.5,) * 2, *_STAGE, *(0.5,) * 6, 0.5, 0.5, 0.0, *(0.5,) * 4)
FORMS = {
    "55": {"budget.p": 0.38},
    "62": {"budget.p": 0.2976},
    "hrank_rates": {"budget.residual": True, "search.allocation": "rates", "search.rates": HRANK},
    "chip_rates": {"budget.residual": True, "search.allocation": "rates", "search.rates": CHIP},
}


def get_config(argument: str = "") -> ConfigDict:
    """The experiment in the form that `argument` names."""
    return imagenet.get_config("resnet50", imagenet.RESNET, P, argument, FORMS)
