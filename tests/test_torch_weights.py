"""PyTorch weights: the same logits and predictions as PyTorch, exact round trips, and refusals in one sentence."""

import runpy
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ddnp_jax import models, torch_weights
from ddnp_jax.models.resnet_cifar import CifarResNet as FlaxCifarResNet
from experiments.pytorch_resnet import CifarResNet, randomize
from tests.small_job import Own

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IDELBAYEV = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th", 44: "resnet44-014dd654.th"}
IDELBAYEV[56] = "resnet56-4bfd9763.th"
AUTHORS = "resnet56-base.pth.tar"


def images(batch):
    """Noise around a different colour per image, so that the logits differ between images."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(batch, 32, 32, 3)) + 2 * rng.normal(size=(batch, 1, 1, 3))).astype(np.float32)


def torch_logits(model, x):
    with torch.inference_mode():
        return model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()


def tiny(**attributes):
    """A ResNet-8: the smallest network of the family."""
    return FlaxCifarResNet(**{"num_classes": 4, "blocks_per_stage": 1, "widths": (3, 5, 7)} | attributes)


def tiny_state(**attributes):
    arguments = {"num_classes": 4, "widths": [3, 5, 7]} | attributes
    return randomize(CifarResNet(8, "subsample", **arguments), seed=0).state_dict()


def assert_same_variables(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


# The same function as in PyTorch


@pytest.mark.parametrize(
    ("depth", "widths", "shortcut"),
    [
        (20, None, "subsample"),
        (20, None, "avgpool"),
        (20, [7, 1, 16, 5, 32, 3, 64, 1, 2], "subsample"),
        (56, [3] * 5 + [16] * 4 + [9] * 8 + [1] + [64] * 3 + [17] * 6, "avgpool"),
    ],
)
def test_logits_equal_pytorch_and_the_export_loads_strictly(depth, widths, shortcut):
    reference = randomize(CifarResNet(depth, shortcut, widths), seed=depth)
    model = models.create(f"resnet{depth}", num_classes=10, shortcut=shortcut, widths=widths)
    x = images(batch=7)
    expected = torch_logits(reference, x)
    assert expected.std(axis=0).min() > 0.01  # the images differ, so the comparison says something

    variables = torch_weights.load(reference.state_dict(), model)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), expected, atol=1e-4, rtol=0)

    fresh = CifarResNet(depth, shortcut, widths).eval()
    state = torch_weights.export(model, variables)
    fresh.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=True)
    np.testing.assert_array_equal(torch_logits(fresh, x), expected)


class SeparableFlax(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3, 5), feature_group_count=3, padding="VALID", name="features_0_1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn2")(x))
        x = nn.Conv(24, (3, 3), feature_group_count=12, padding="VALID", use_bias=False, name="features_1")(x)
        return nn.Dense(5, name="classifier_10")(x.mean(axis=(1, 2)))


class SeparableTorch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        first = torch.nn.Conv2d(3, 12, (3, 5), groups=3)
        second = torch.nn.Conv2d(12, 24, 3, groups=12, bias=False)
        self.features = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Identity(), first]), second])
        self.bn2 = torch.nn.BatchNorm2d(12)
        self.classifier = torch.nn.ModuleDict({"10": torch.nn.Linear(24, 5)})

    def forward(self, x):
        x = self.features[1](torch.relu(self.bn2(self.features[0][1](x))))
        return self.classifier["10"](x.mean(dim=(2, 3)))


def test_another_architecture_needs_no_code():
    reference = randomize(SeparableTorch(), seed=1)
    x = images(batch=3)[:, :16, :20]
    variables = torch_weights.load(reference.state_dict(), SeparableFlax(), input_shape=(16, 20, 3))
    np.testing.assert_allclose(SeparableFlax().apply(variables, x), torch_logits(reference, x), atol=1e-5, rtol=0)
    exported = torch_weights.export(SeparableFlax(), variables, input_shape=(16, 20, 3))
    assert {name: array.shape for name, array in exported.items()} == {
        "features.0.1.weight": (12, 1, 3, 5),
        "features.0.1.bias": (12,),
        "bn2.weight": (12,),
        "bn2.bias": (12,),
        "bn2.running_mean": (12,),
        "bn2.running_var": (12,),
        "features.1.weight": (24, 1, 3, 3),
        "classifier.10.weight": (5, 24),
        "classifier.10.bias": (5,),
    }


def test_layer_sizes_are_those_of_pytorch():
    variables = torch_weights.load(randomize(SeparableTorch(), seed=1).state_dict(), SeparableFlax(), (16, 20, 3))
    assert torch_weights.layer_sizes(SeparableFlax(), variables, (16, 20, 3)) == {
        "features.0.1": {"in_channels": 3, "out_channels": 12, "groups": 3},
        "bn2": {"num_features": 12},
        "features.1": {"in_channels": 12, "out_channels": 24, "groups": 12},
        "classifier.10": {"in_features": 24, "out_features": 5},
    }


def test_a_saved_network_does_not_go_into_another_one(tmp_path):
    """The error of the file's code names the layer that differs."""
    torch_weights.save(tmp_path, tiny(), torch_weights.load(tiny_state(), tiny()))
    namespace = runpy.run_path(str(tmp_path / "pytorch_layers.py"))
    state = load_file(tmp_path / "weights.safetensors")
    whole = CifarResNet(8, "subsample", num_classes=4)
    whole.conv1 = torch.nn.BatchNorm2d(16)
    with pytest.raises(ValueError, match="conv1 is a BatchNorm2d, which has no in_channels"):
        namespace["load"](whole, state)
    rebuilt = namespace["load"](CifarResNet(8, "subsample", num_classes=4), state)
    assert rebuilt.layer2[0].conv1.out_channels == rebuilt.layer2[0].bn1.num_features == 5
    assert all(torch.equal(tensor, state[name]) for name, tensor in rebuilt.named_parameters())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(widths=st.tuples(*(st.integers(1, channels) for channels in (16, 32, 64))), seed=st.integers(0, 99))
def test_load_undoes_export(widths, seed):
    model = tiny(widths=widths)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(1))
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    assert_same_variables(torch_weights.load(torch_weights.export(model, variables), model), variables)


def test_a_network_for_grey_images_goes_there_and_back_without_their_shape(tmp_path):
    """Like the network of the demonstration: 8 x 8 pixels with one channel."""
    variables = tiny().init(jax.random.key(0), np.zeros((1, 8, 8, 1)))
    torch_weights.save(tmp_path, tiny(), variables)
    assert load_file(tmp_path / "weights.safetensors")["conv1.weight"].shape == (16, 1, 3, 3)
    assert_same_variables(torch_weights.load(tmp_path / "weights.safetensors", tiny()), variables)


# The published checkpoints


def checkpoint(shared, file):
    """A file's flax model and variables, and the reference with the same weights, read without the library."""
    authors = file == AUTHORS
    depth, shortcut = int(file[6:8]), "avgpool" if authors else "subsample"
    state = torch.load(shared / "weights" / file, map_location="cpu", weights_only=True)
    state = state["net"] if authors else {k.removeprefix("module."): v for k, v in state["state_dict"].items()}
    reference = CifarResNet(depth, shortcut, classifier="fc" if authors else "linear")
    reference.load_state_dict(state, strict=True)
    reference = reference.to(memory_format=torch.channels_last).eval()  # the fastest on CPU
    model = models.create(f"resnet{depth}", num_classes=10, shortcut=shortcut)
    return model, torch_weights.load(shared / "weights" / file, model), reference


@pytest.mark.parametrize("file", [IDELBAYEV[32], IDELBAYEV[44], IDELBAYEV[56]])
def test_published_weights_give_the_logits_of_pytorch(shared, file):
    model, variables, reference = checkpoint(shared, file)
    x = images(batch=5)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), torch_logits(reference, x), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def cifar10_test(shared):
    import tensorflow_datasets as tfds

    records = tfds.builder("cifar10", data_dir=shared / "tfds").as_data_source("test")
    return tuple(np.stack([record[key] for record in records]) for key in ("image", "label"))


# Accuracies in percent on every fourth of the 8,000 JPEG test images; on all of them 90.275 and 81.275. The base
# checkpoint's is 90.2 on all 10,000: the check that `shortcut="avgpool"` is the form that network was trained in.
# ResNet-20's is 81.0 there.
@pytest.mark.parametrize(
    ("file", "normalization", "accuracy"), [(AUTHORS, CIFAR, 89.95), (IDELBAYEV[20], IMAGENET, 80.9)]
)
def test_predictions_on_test_images_are_those_of_pytorch(shared, cifar10_test, file, normalization, accuracy):
    pixels, labels = cifar10_test
    assert pixels.shape == (8000, 32, 32, 3)
    mean, std = np.array(normalization, np.float32)
    model, variables, reference = checkpoint(shared, file)
    apply = jax.jit(model.apply)
    ours, theirs = [], []
    for batch in np.split(pixels[::4], 4):
        x = (batch / np.float32(255) - mean) / std
        theirs.append(torch_logits(reference, x))
        ours.append(np.asarray(apply(variables, x)))
        np.testing.assert_allclose(ours[-1], theirs[-1], atol=1e-4, rtol=0)
    predictions = np.concatenate(ours).argmax(axis=1)
    np.testing.assert_array_equal(predictions, np.concatenate(theirs).argmax(axis=1))
    assert 100 * np.mean(predictions == labels[::4]) == pytest.approx(accuracy, abs=0.05)


# Forms of a checkpoint


def numpy_state():
    return {name: tensor.numpy() for name, tensor in tiny_state().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "best_prec1": 91.7},
        lambda state: {"net": state, "acc": 90.2, "epoch": 11},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name},
        lambda state: {name.replace("linear.", "fc."): tensor for name, tensor in state.items()},
        lambda state: {
            name: torch.nn.Parameter(tensor.double(), requires_grad=True)
            for name, tensor in state.items()
            if "num_batches_tracked" not in name
        },
        lambda state: {name: tensor.numpy() for name, tensor in state.items()},
    ],
    ids=["state_dict", "net", "module.", "no counters", "fc", "parameters", "numpy"],
)
def test_every_form_of_a_state_dict_gives_the_same_variables(wrap):
    expected = torch_weights.load(tiny_state(), tiny())
    assert set(expected) == {"params", "batch_stats"}
    assert {leaf.dtype for leaf in jax.tree.leaves(expected)} == {np.dtype(np.float32)}
    assert_same_variables(torch_weights.load(wrap(tiny_state()), tiny()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_are_read_without_pytorch(tmp_path, monkeypatch, dtype):
    state = {f"module.{name}": tensor.to(dtype) for name, tensor in tiny_state().items() if tensor.is_floating_point()}
    expected = torch_weights.load(state, tiny())
    save_file(state, tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_same_variables(torch_weights.load(tmp_path / "weights.safetensors", tiny()), expected)


@pytest.mark.parametrize("damage", [lambda c: c[:100], lambda c: c[:-4], lambda c: b"", lambda c: b"text" + c[4:]])
def test_damaged_safetensors_are_named(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    save_file(tiny_state(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"weights\.safetensors cannot be read: it is damaged"):
        torch_weights.load(path, tiny())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("accuracy", [90.2, np.float64(90.2), np.float32(90.2), np.int64(90)])
def test_a_numpy_number_beside_the_weights_does_no_harm(tmp_path, accuracy, zipped):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"net": tiny_state(), "acc": accuracy}, path, _use_new_zipfile_serialization=zipped)
    assert_same_variables(torch_weights.load(path, tiny()), torch_weights.load(tiny_state(), tiny()))


def test_half_precision_weights_become_float32():
    state = {name: tensor.bfloat16() for name, tensor in tiny_state().items()}
    kernel = torch_weights.load(state, tiny())["params"]["linear"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, state["linear.weight"].float().numpy().T)


def test_the_variables_do_not_share_memory_with_the_tensors():
    state = tiny_state()
    variables = torch_weights.load(state, tiny())
    before = jax.tree.map(np.array, variables)
    for tensor in state.values():
        tensor.zero_()
    assert_same_variables(variables, before)


def test_the_library_imports_no_pytorch():
    code = "import sys, ddnp_jax.torch_weights; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Refusals


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no PyTorch checkpoint .*nowhere\.th;"):
        torch_weights.load(tmp_path / "nowhere.th", tiny())


def test_missing_pytorch_says_how_to_install_it(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save(tiny_state(), path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"weights\.pth needs PyTorch; run `pip install ddnp_jax\[torch\]`"):
        torch_weights.load(path, tiny())


def test_missing_safetensors_says_how_to_install_it(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file(tiny_state(), path)
    variables = torch_weights.load(tiny_state(), tiny())
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(
        ImportError, match=r"weights\.safetensors needs safetensors; run `pip install ddnp_jax\[torch\]`"
    ):
        torch_weights.load(path, tiny())
    with pytest.raises(
        ImportError, match=r"weights\.safetensors needs safetensors; run `pip install ddnp_jax\[torch\]`"
    ):
        torch_weights.save(tmp_path / "out", tiny(), variables)


class Anything:
    """Represents a training script's own class in a checkpoint."""


def flip_a_bit(content):
    weight = tiny_state()["layer2.0.conv1.weight"].numpy().tobytes()
    position = content.index(weight)
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"not a checkpoint" + c[16:], lambda c: b"text", flip_a_bit],
    ids=["truncated", "empty", "overwritten", "text", "flipped bit"],
)
@pytest.mark.filterwarnings("error")
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "weights.pth"
    torch.save(tiny_state(), path)
    torch_weights.load(path, tiny())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read: it is damaged, or holds more than tensors"):
        torch_weights.load(path, tiny())


def test_a_file_with_code_is_refused_unopened(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"net": tiny_state(), "args": Anything()}, path)
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read: .* save only its state dict with torch\.save"):
        torch_weights.load(path, tiny())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"weights\.pth holds a list; give a state dict, directly or under one of the keys state_dict, "),
        ({"epoch": 3, "weights": {}}, r"weights\.pth holds 'epoch', which is not a tensor; give a state dict"),
        ({0: torch.zeros(3)}, r"weights\.pth holds 0, which is not a tensor; give a state dict"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        torch_weights.load(path, tiny())


def refusal(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    return str(caught.value)


def test_the_first_tensor_that_does_not_fit_is_named_with_the_file(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(tiny_state(), path)
    advice = "load it into a model of the same architecture, widths and number of classes."
    assert refusal(torch_weights.load, path, tiny(widths=(3, 6, 7))) == (
        f"{path} does not fit the model: 'layer2.0.conv1.weight' has shape (5, 16, 3, 3), "
        f"the model's is (6, 16, 3, 3); {advice}"
    )
    assert refusal(torch_weights.load, path, tiny(num_classes=10)) == (
        f"{path} does not fit the model: 'linear.weight' has shape (4, 64), the model's is (10, 64); {advice}"
    )
    assert refusal(torch_weights.load, path, SeparableFlax()) == (
        f"{path} does not fit the model: it has 'conv1.weight' of shape (16, 3, 3, 3), which the model lacks; {advice}"
    )
    assert refusal(torch_weights.load, path, tiny(blocks_per_stage=2, widths=(3, 3, 5, 5, 7, 7))) == (
        f"{path} does not fit the model: it lacks 'layer1.1.bn1.running_mean' of shape (3,); {advice}"
    )


def test_a_second_classifier_is_extra_not_an_alias():
    state = tiny_state()
    state["fc.weight"] = state["linear.weight"]
    message = refusal(torch_weights.load, state, tiny())
    assert message.startswith("the state dict does not fit the model: it has 'fc.weight' of shape (4, 64),")


def test_variables_that_are_not_finite_are_not_written(tmp_path):
    model, variables = tiny(), jax.tree.map(lambda x: x * np.nan, torch_weights.load(tiny_state(), tiny()))
    sentence = (
        "variable batch_stats/bn1/mean of CifarResNet has 16 values that are NaN or infinite; give weights that are "
        "finite."
    )
    assert refusal(torch_weights.save, tmp_path / "new", model, variables) == sentence
    assert refusal(torch_weights.export, model, variables) == sentence
    assert not (tmp_path / "new").exists()


def test_variables_of_another_model_are_not_exported():
    variables = torch_weights.load(tiny_state(), tiny())
    message = refusal(torch_weights.export, tiny(widths=(4, 5, 7)), variables)
    assert message.startswith("the set of variables does not fit the model: 'layer1.0.")
    del variables["params"]["linear"]["bias"]
    message = refusal(torch_weights.export, tiny(), variables)
    assert message.startswith("the set of variables does not fit the model: it lacks 'linear.bias' of shape (4,);")


def test_a_module_of_ones_own_without_a_default_for_train():
    model = Own((3, 2))
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1)), train=False)
    state = torch_weights.export(model, variables, (8, 8, 1))
    assert state["second.weight"].shape == (2, 3, 3, 3)
    jax.tree.map(np.testing.assert_array_equal, torch_weights.load(state, model, (8, 8, 1)), variables)
