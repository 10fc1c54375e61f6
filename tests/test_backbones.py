"""Every backbone: published sizes, gates, the same outputs as in PyTorch, and pruning compared with masking."""

import copy
import functools
import importlib.util
import zlib

import jax
import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file

from ddnp_jax import models, torch_weights
from ddnp_jax.compact import compact, verify
from ddnp_jax.cost import flops
from ddnp_jax.masking import apply_masked
from ddnp_jax.topology import Selection, trace
from experiments import pytorch_models
from experiments.pytorch_resnet import randomize

CLASSES = 7
IMAGENET = (224, 224, 3)
SMALL = (64, 64, 3)
ODD = (45, 37, 3)
CIFAR = ("resnet20", "mobilenet_v2_cifar")

# MACs and parameters of torchvision's documentation and Megvii's README, which cuts its parameters off after the
# first decimal: 5.137, 5.680 and 6.768 million are its 5.1, 5.6 and 6.7. EfficientNet-Lite0's parameters are those of
# its published weights; its MACs are counted in PyTorch in test_efficientnet_lite.py.
KNOWN = {
    "resnet18": (1.814e9, 11.69e6),
    "resnet34": (3.664e9, 21.80e6),
    "resnet50": (4.089e9, 25.56e6),
    "resnet101": (7.801e9, 44.55e6),
    "mobilenet_v2": (300.8e6, 3.505e6),
    "mobilenet_v3_small": (56.5e6, 2.543e6),
    "efficientnet_lite0": (385.2e6, 4.652e6),
    "shufflenet_v2_plus_small": (156e6, 5.137e6),
    "shufflenet_v2_plus_medium": (222e6, 5.680e6),
    "shufflenet_v2_plus_large": (360e6, 6.768e6),
}
# The same code as others, wider or deeper.
LARGER = ("resnet34", "resnet101", "shufflenet_v2_plus_medium", "shufflenet_v2_plus_large")
BACKBONES = [*CIFAR, *(name for name in KNOWN if name not in LARGER)]


@functools.cache
def trace_whole(name):
    return trace(models.create(name, 1000), IMAGENET)


@pytest.mark.parametrize("name", KNOWN)
def test_known_macs_and_parameters(name):
    macs, parameters = KNOWN[name]
    digit = 0.5e6 if macs >= 1e9 or name.startswith("shuffle") else 0.05e6  # half of the last published digit
    assert flops.total(trace_whole(name)) == pytest.approx(macs, abs=digit)
    assert flops.parameters(trace_whole(name)) == pytest.approx(parameters, abs=5e3 if parameters > 1e7 else 500)


# The gates of METHOD: what is inside a block, and nothing else


def gate_names(topology):
    return [gate.name for gate in topology.gates]


def test_basic_blocks_have_a_gate_behind_the_first_convolution():
    topology = trace_whole("resnet34")
    blocks = [f"layer{stage}_{i}" for stage, count in enumerate((3, 4, 6, 3), 1) for i in range(count)]
    assert gate_names(topology) == [f"{block}/conv1" for block in blocks]
    assert topology.widths == (64,) * 3 + (128,) * 4 + (256,) * 6 + (512,) * 3
    assert trace_whole("resnet18").widths == (64, 64, 128, 128, 256, 256, 512, 512)


def test_bottlenecks_have_a_gate_behind_the_first_and_the_second_convolution():
    topology = trace_whole("resnet50")
    blocks = [f"layer{stage}_{i}" for stage, count in enumerate((3, 4, 6, 3), 1) for i in range(count)]
    assert gate_names(topology) == [f"{block}/{conv}" for block in blocks for conv in ("conv1", "conv2")]
    assert topology.widths == (64,) * 6 + (128,) * 8 + (256,) * 12 + (512,) * 6
    assert trace_whole("resnet101").widths == (64,) * 6 + (128,) * 8 + (256,) * 46 + (512,) * 6
    assert ("conv1", "the model's `widths` do not size it") in topology.unprunable
    stem_downsample_classifier = 112**2 * 147 * 64 + 56**2 * 64 * 256 + 3 * 28**2 * 256 * 512 + 2048 * 1000
    assert flops.total(topology) - flops.prunable(topology) == stem_downsample_classifier


def test_inverted_residuals_have_one_gate_on_both_sides_of_the_depthwise_convolution():
    topology = trace_whole("mobilenet_v2")
    assert gate_names(topology) == [f"features_{i}/conv_0_0" for i in range(2, 18)]
    assert topology.widths == (96, *[144] * 2, *[192] * 3, *[384] * 4, *[576] * 3, *[960] * 3)
    kernels = {where.path[2]: where.axis for where in topology.gates[0].slices if where.path[-1] == "kernel"}
    assert kernels == {"conv_0_0": 3, "conv_1_0": 3, "conv_2": 2}
    ends = {layer.name: (layer.inputs.gates, layer.outputs.gates) for layer in topology.layers}
    assert [ends[f"features_2/{name}"] for name in kernels] == [((), (0,)), ((), (0,)), ((0,), ())]
    assert ends["features_1/conv_0_0"] == ends["features_18_0"] == ((), ())

    cifar = trace(models.create("mobilenet_v2_cifar", 10), (32, 32, 3))
    assert gate_names(cifar) == [f"layers_{i}/conv1" for i in range(17)]
    assert cifar.widths == (32, *topology.widths)
    shortcuts = [layer.name for layer in cifar.layers if "shortcut" in layer.name]
    assert shortcuts == [f"layers_{i}/shortcut_0" for i in (0, 1, 3, 10, 16)]
    positions = {layer.name: layer.positions for layer in cifar.layers}
    assert [positions[f"layers_{i}/conv3"] for i in (0, 2, 5, 6, 12, 13, 16)] == [1024, 1024, 1024, 256, 256, 64, 64]
    assert flops.total(cifar) == 304_075_264  # the 304.08 M of both authors' network

    lite = trace_whole("efficientnet_lite0")
    assert gate_names(lite) == [f"_blocks_{i}/_expand_conv" for i in range(1, 16)]
    assert lite.widths == (96, 144, 144, 240, 240, *[480] * 3, *[672] * 3, *[1152] * 4)


def test_squeeze_excite_shrinks_with_the_channels_that_it_scales():
    topology = trace_whole("mobilenet_v3_small")
    assert gate_names(topology) == [f"features_{i}/block_0_0" for i in range(2, 12)]
    assert topology.widths == (72, 88, 96, 240, 240, 120, 144, 288, 576, 576)
    block = ("params", "features_4")
    kernels = {where.path[2:-1]: where.axis for where in topology.gates[2].slices if where.path[-1] == "kernel"}
    assert kernels == {
        ("block_0_0",): 3,
        ("block_1_0",): 3,
        ("block_2", "fc1"): 2,
        ("block_2", "fc2"): 3,
        ("block_3_0",): 2,
    }
    assert (*block, "block_2", "fc2", "bias") in [where.path for where in topology.gates[2].slices]


def test_shuffle_units_have_gates_inside_their_main_branch():
    topology = trace_whole("shufflenet_v2_plus_medium")
    inner = [[0]] * 20
    inner[2] = inner[18] = [2, 7]  # the Xception-like units
    assert gate_names(topology) == [f"features_{i}/branch_main_{j}" for i, each in enumerate(inner) for j in each]
    assert topology.widths == (24,) * 5 + (64,) * 4 + (128,) * 8 + (256,) * 5


@pytest.mark.parametrize(("p", "removed"), [(0.38, 55.0), (0.31, 62.0)])
def test_the_papers_p_removes_what_they_print(p, removed):
    assert 100 * flops.reduction_for_p(trace_whole("resnet50"), p) == pytest.approx(removed, abs=1.5)


def test_the_number_of_widths_is_checked():
    with pytest.raises(ValueError, match="widths has 2 entries; this network has 16"):
        models.create("mobilenet_v2", 10, widths=(1, 2))


# The same function as in PyTorch, whole and cut


def images(shape):
    """Noise around a different colour per image, so that the logits differ between images."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(2, *shape)) + 2 * rng.normal(size=(2, 1, 1, 3))).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def torch_logits(module, x):
    with torch.inference_mode():
        return module.eval()(channels_first(x)).numpy()


def shape_of(name):
    return (32, 32, 3) if name in CIFAR else SMALL


@functools.cache
def network(name):
    """PyTorch's network with random weights and statistics, ours with the same, and ours with masks."""
    module = pytorch_models.create(name, CLASSES)
    reference = randomize(module, seed=1, images=channels_first(images(shape_of(name))))
    model = models.create(name, CLASSES)
    variables = torch_weights.load(reference.state_dict(), model, shape_of(name))
    topology = trace(model, shape_of(name))
    masked = jax.jit(lambda variables, x, masks: apply_masked(model, variables, x, masks, topology))
    return reference, model, variables, topology, functools.partial(masked, variables, images(shape_of(name)))


def selection_of(name, kind):
    """Kept channels: one of each gate, or a random choice of one, all, or any number of them."""
    topology, rng = network(name)[3], np.random.default_rng(zlib.crc32(name.encode()))
    counts = {"one": lambda n: 1, "mixed": lambda n: int(rng.choice([1, n, rng.integers(1, n)]))}
    kept = [rng.choice(n, counts[kind](n), replace=False) for n in topology.widths]
    return Selection(tuple(tuple(sorted(map(int, each))) for each in kept))


@pytest.mark.parametrize("name", BACKBONES)
def test_logits_equal_pytorch(name):
    reference, _, _, topology, masked = network(name)
    expected = torch_logits(reference, images(shape_of(name)))
    assert np.ptp(expected, axis=0).max() > 0.01  # the images differ, so the comparison says something
    nothing_masked = Selection(tuple(tuple(range(n)) for n in topology.widths)).masks(topology)
    np.testing.assert_allclose(masked(nothing_masked), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_lite0", "shufflenet_v2_plus_small"]
)
def test_logits_equal_pytorch_at_an_odd_size(name):
    reference, model, variables, _, _ = network(name)
    expected = torch_logits(reference, images(ODD))
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images(ODD)), expected, atol=1e-4, rtol=0)


def rebuild_in_pytorch(folder, name):
    """Rebuilds the network in PyTorch from the two files of `torch_weights.save`."""
    spec = importlib.util.spec_from_file_location("pytorch_layers", folder / "pytorch_layers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(pytorch_models.create(name, CLASSES), load_file(folder / "weights.safetensors"))


# Mixed selections keep a single channel of many gates; one network with each kind of block keeps one of all.
ONE_OF_ALL = ("resnet18", "resnet50", "mobilenet_v3_small", "shufflenet_v2_plus_small")


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "mixed") for name in BACKBONES), *((name, "one") for name in ONE_OF_ALL)]
)
def test_the_cut_network_is_the_masked_one_also_in_pytorch(tmp_path, name, kind):
    _, model, variables, topology, masked = network(name)
    x, selection = images(shape_of(name)), selection_of(name, kind)
    expected = np.asarray(masked(selection.masks(topology)))
    small_model, small_variables = compact(model, variables, selection, topology)
    torch_weights.save(tmp_path, small_model, small_variables, shape_of(name))
    rebuilt = torch_logits(rebuild_in_pytorch(tmp_path, name), x)
    tolerance = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(rebuilt, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(jax.jit(small_model.apply)(small_variables, x), expected, rtol=0, atol=tolerance)
    written_out = pytorch_models.create(name, CLASSES, widths=selection.widths).state_dict()
    wanted = {k: tuple(v.shape) for k, v in written_out.items() if "num_batches" not in k}
    assert {k: v.shape for k, v in load_file(tmp_path / "weights.safetensors").items()} == wanted


@functools.cache
def residual_network(name):
    """The network with random weights and statistics, and its topology with gates in the residual streams."""
    attributes = {"shortcut": "projection"} if name == "resnet20" else {}
    model, shape = models.create(name, num_classes=CLASSES, **attributes), shape_of(name)
    return model, zoo.randomized(model, shape), trace(model, shape, residual=True)


@pytest.mark.parametrize("widths", ["unequal", "equal"])
@pytest.mark.parametrize(
    ("name", "gates"),
    [
        *(("resnet20", 12), ("resnet18", 12), ("resnet50", 37), ("mobilenet_v2", 25), ("mobilenet_v2_cifar", 26)),
        *(("mobilenet_v3_small", 27), ("efficientnet_lite0", 24), ("shufflenet_v2_plus_small", 42)),
    ],
)
def test_residual_streams_are_cut(name, gates, widths):
    """Blocks add or project their inputs where the unpruned ones do, although a cut makes other shapes equal or not."""
    model, variables, topology = residual_network(name)
    assert len(topology.gates) == gates
    kept = [min(channels, 8) for channels in topology.widths]
    if widths == "unequal":
        kept = [channels // 2 + i % 3 for i, channels in enumerate(topology.widths)]
    selection = Selection.first(kept)
    small = compact(model, variables, selection, topology)
    verify(model, variables, *small, selection, topology, images(shape_of(name)))


@pytest.mark.parametrize("name", BACKBONES)
def test_keeping_all_changes_nothing(name):
    _, model, variables, topology, _ = network(name)
    everything = Selection(tuple(tuple(range(n)) for n in topology.widths))
    small_model, small_variables = compact(model, variables, everything, topology)
    assert small_model == model
    jax.tree.map(np.testing.assert_array_equal, small_variables, variables)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_running_statistics_move_at_the_pace_of_pytorch(name):
    """The momentum of PyTorch is a tenth per step, and a hundredth in MobileNetV3."""
    reference, model, variables, _, _ = network(name)
    trained = copy.deepcopy(reference).train()
    trained(channels_first(images(SMALL)))
    apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable="batch_stats")[1]["batch_stats"]["features_0_1"])
    mean = apply(variables, images(SMALL))["mean"]
    np.testing.assert_allclose(mean, trained.features[0][1].running_mean, atol=1e-5, rtol=0)
