"""The published rates of HRank and CHIP against the sizes that their papers and code give."""

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


def test_hrank_of_resnet56():
    """Published for all 55 convolutions; those that produce a gate are the first of every block."""
    published = [0.1] + [0.6] * 35 + [0.0] * 2 + [0.6] * 6 + [0.4] * 3 + [0.1] + [0.4, 0.1] * 3 + [0.4]
    assert len(published) == 55
    assert list(cifar10_r56.HRANK) == published[1::2]
