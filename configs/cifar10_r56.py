"""ResNet-56 on CIFAR-10 (DDNP Table A1: p = 0.48), from a trained PyTorch checkpoint or from scratch.

    python -m experiments.cifar10_r56 --config=configs/cifar10_r56.py --workdir=runs/r56 \
        --config.base.weights=resnet56-base.pth.tar --config.data.data_dir=...

Arguments, joined by commas (`configs/cifar10_r56.py:authors,tiny`): `ddnp` (default) is the form of Tables A2 and A3;
`authors` the form of DDNP's published code; `scalar` one parameter per channel and per layer ("channel-wise-ks");
`nppm` (p = 0.50, NPPM Table 1) and `dg`, which is NPPM without the predictor, both on 10 % of the training images
(`data.search_fraction`, which base training leaves out; DDNP: 5 %); `uniform` and `magnitude` are baselines (random
and L1-norm channels at uniform widths); `tiny` runs the full pipeline in minutes, on ResNet-20 and the first 2,000
training images, too few for NPPM's predictor to take part. Further scores: `bn_scale`, `fpgm`, `lamp`, `taylor`,
`hrank`, `chip` and `cc`, at uniform widths except `lamp` and `cc`; `global` ranks the channels of all gates
together, and `hrank,hrank_rates` takes the rates of HRank's authors (CHIP's are the same for all blocks, which is what
uniform widths are). `62` removes 62 % of all FLOPs.
"""

from ml_collections import ConfigDict

from configs import default

P = {"ddnp": 0.48, "nppm": 0.50}
# Fraction of the channels that HRank's authors remove from the first convolution of each block (50 % of the FLOPs).
HRANK = (*(0.6,) * 18, 0.0, *(0.6,) * 3, 0.4, *(0.1,) * 4)
FORMS = {
    "62": {"budget.p": 0.3778},
    "hrank_rates": {"search.allocation": "rates", "search.rates": HRANK},
    "tiny": {**default.SHORT_CIFAR10, "model.name": "resnet20"},
}


def get_config(argument: str = "") -> ConfigDict:
    """The experiment in the form that `argument` names."""
    config = default.get_config()
    config.model.attributes.shortcut = "avgpool"  # the DDNP authors' network
    return default.choose(config, argument, P, FORMS)
