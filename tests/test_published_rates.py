"""The published rates of HRank and CHIP against the sizes that their papers and code give."""

import flax.linen as nn
import jax.numpy as jnp

import ddnp_jax
from configs import cifar10_r56, imagenet_r50
from ddnp_jax.cost import flops


def resnet50():
    return ddnp_jax.trace(ddnp_jax.models.create("resnet50", num_classes=1000), (224, 224, 3), residual=True)


def test_chip_of_resnet50():
    topology = resnet50()
    widths = [round(channels * (1 - r)) for channels, r in zip(topology.widths, imagenet_r50.CHIP, strict=True)]
    named = dict(zip((gate.name for gate in topology.gates), widths, strict=True))
    assert [named[f"layer{i}_0/conv3"] for i in range(1, 5)] == [192, 384, 768, 2048]
    assert [named[f"layer{i}_1/conv2"] for i in range(1, 5)] == [32, 64, 128, 256]
    assert named["conv1"] == 64
    assert flops.parameters(topology, widths) == 11_047_336  # "11.05 M"
    assert flops.total(topology, widths) == 1_507_328_000  # "1.52 G", 62.8 % less


def test_hrank_of_resnet50():
    """As HRank counts: kernels and the classifier, of which only the output channels are pruned."""
    topology = resnet50()
    rates = {gate.producers[0].path: r for gate, r in zip(topology.gates, imagenet_r50.HRANK, strict=True)}
    rate_of = {piece.path: rates[gate.producers[0].path] for gate in topology.gates for piece in gate.producers}
    parameters = macs = 0
    for layer in topology.layers:
        *window, inputs, outputs = layer.kernel_shape
        kept = outputs - int(outputs * rate_of.get(layer.path, 0.0) + 1e-9)
        weights = inputs * kept
        for length in window:
            weights *= length
        parameters += weights
        macs += weights * layer.positions
    assert (parameters + 1000, macs) == (13_773_764, 1_549_651_456)  # 1000: the classifier's bias


class ThinResNet56(nn.Module):
    """ResNet-56 whose streams are pruned too: channels of the stem, of each stage, and inside its blocks."""

    stem: int
    streams: tuple[int, ...]
    inner: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train: bool = False):
        def conv(x, channels, strides=1):
            x = nn.Conv(channels, (3, 3), strides, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train)(x)

        x = nn.relu(conv(x, self.stem))
        for stage, (channels, inner) in enumerate(zip(self.streams, self.inner, strict=True)):
            for block in range(9):
                strides = 2 if stage and not block else 1
                y = conv(nn.relu(conv(x, inner, strides)), channels)
                x = x[:, ::strides, ::strides, :channels]
                x = nn.relu(y + jnp.pad(x, [(0, 0)] * 3 + [(0, channels - x.shape[-1])]))
        return nn.Dense(10)(x.mean((1, 2)))


def test_chip_of_resnet56():
    """CHIP's rates for 47.4 % of the FLOPs: nothing of the stem, 15 % of two streams, 40 % of every first convolution.

    The two rates of streams are those of the first two stages, of the gates of 16, 32 and 64 channels; the last stage
    keeps its own, so its convolutions produce 64.
    """
    kept = [int(channels * 0.85) for channels in (16, 32)]
    inner = tuple(int(channels * 0.6) for channels in (16, 32, 64))
    topology = ddnp_jax.trace(ThinResNet56(16, (*kept, 64), inner), (32, 32, 3))
    assert (*kept, *inner) == (13, 27, 9, 19, 38)
    assert flops.parameters(topology) == 485_413  # "0.48 M"
    assert flops.total(topology) == 65_168_128  # "65.94 M", 47.4 % less


def test_hrank_of_resnet56():
    """Published for all 55 convolutions; those that produce a gate are the first of every block."""
    published = [0.1] + [0.6] * 35 + [0.0] * 2 + [0.6] * 6 + [0.4] * 3 + [0.1] + [0.4, 0.1] * 3 + [0.4]
    assert len(published) == 55
    assert list(cifar10_r56.HRANK) == published[1::2]
