"""Weights whose order differs from PyTorch's: after a flatten, before an image, in transposed convolutions."""

import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ddnp_jax import Selection, compact, torch_weights, trace

tnn = torch.nn
PHASES = (Phase.explicit, Phase.generate)  # shrinking compiles a network per step


def seeded(module, seed=0):
    """Random weights and statistics of the order of one, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                bound = (3 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 1
                tensor.copy_(bound * (2 * torch.rand(tensor.shape, generator=generator) - 1))
    return module.eval()


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def torch_outputs(module, x):
    """PyTorch's outputs for images (N, H, W, C); images among the outputs come back as (N, H, W, C)."""
    inputs = torch.from_numpy(x)
    with torch.inference_mode():
        outputs = module(inputs.permute(0, 3, 1, 2) if x.ndim == 4 else inputs)
    return (outputs.permute(0, 2, 3, 1) if outputs.ndim == 4 else outputs).numpy()


def assert_same_network(reference, model, x, input_shape=None):
    """Checks for PyTorch's outputs after loading, and for exactly PyTorch's weights after exporting."""
    expected = torch_outputs(reference, x)
    assert np.ptp(expected) > 0.01  # the comparison says something
    variables = torch_weights.load(reference.state_dict(), model, input_shape)
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=0, atol=1e-5)
    state = torch_weights.export(model, variables, input_shape)
    assert list(state) and set(state) == {k for k in reference.state_dict() if "num_batches" not in k}
    for name, array in state.items():
        np.testing.assert_array_equal(array, reference.state_dict()[name].numpy())
    return variables


def cut(model, variables, input_shape):
    """The model with two thirds of the channels of every gate, chosen at random."""
    topology = trace(model, input_shape)
    rng = np.random.default_rng(1)
    kept = (sorted(map(int, rng.choice(n, 1 + 2 * n // 3, replace=False))) for n in topology.widths)
    selection = Selection(tuple(map(tuple, kept)))
    assert len(selection.kept) > 1
    assert sum(selection.widths) < sum(topology.widths)
    return compact(model, variables, selection, topology)


def saved_and_read(folder, model, variables, whole_torch_model):
    """Rebuilds the network in PyTorch from the two files of `torch_weights.save`."""
    torch_weights.save(folder, model, variables)
    load = runpy.run_path(str(folder / "pytorch_layers.py"))["load"]
    return load(whole_torch_model, load_file(folder / "weights.safetensors")).eval()


# Flatten


class Vgg(nn.Module):
    """Convolutions, batch norm, pooling, flatten, and two dense layers, the first with a batch norm before it."""

    widths: tuple = (6, 8)

    @nn.compact
    def __call__(self, x, train=False):
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), name=f"features_{4 * i}")(x)
            x = nn.relu(nn.BatchNorm(not train, epsilon=1e-5, name=f"features_{4 * i + 1}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.BatchNorm(not train, epsilon=1e-5, name="flat")(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.Dense(12, name="classifier_0")(x))
        return nn.Dense(5, name="classifier_2")(x)


class TorchVgg(tnn.Module):
    def __init__(self, channels, pixels, widths=(6, 8)):
        super().__init__()
        layers = []
        for before, after in zip((channels, *widths), widths, strict=False):
            layers += [tnn.Conv2d(before, after, 3, padding=1), tnn.BatchNorm2d(after), tnn.ReLU(), tnn.MaxPool2d(2)]
        self.features = tnn.Sequential(*layers)
        self.flat = tnn.BatchNorm1d(widths[-1] * pixels)
        self.classifier = tnn.Sequential(tnn.Linear(widths[-1] * pixels, 12), tnn.ReLU(), tnn.Linear(12, 5))

    def forward(self, x):
        return self.classifier(self.flat(self.features(x).flatten(1)))


@settings(max_examples=8, deadline=None, derandomize=True, phases=PHASES)
@given(
    height=st.integers(4, 19),
    width=st.integers(4, 19),
    channels=st.integers(1, 5),
    widths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_a_dense_layer_behind_a_flatten(height, width, channels, widths):
    pixels = (height // 4) * (width // 4)
    reference = seeded(TorchVgg(channels, pixels, widths))
    assert_same_network(reference, Vgg(widths), noise(3, height, width, channels), (height, width, channels))


@pytest.mark.parametrize("shape", [(32, 32, 3), (20, 20, 1), (28, 28, 1), (40, 36, 3)])
def test_square_images_need_no_input_shape_and_others_that_have_as_many_pixels_as_one(shape):
    """40 x 36 leave 10 x 9 pixels: no square's number. Of 16 x 64 there are 4 x 16, as of 8 x 8: the same order."""
    height, width, channels = shape
    reference = seeded(TorchVgg(channels, (height // 4) * (width // 4)))
    if height == width:
        assert_same_network(reference, Vgg(), noise(3, *shape))
        return
    with pytest.raises(
        ValueError, match=r"^the state dict does not fit .* 'flat.weight' has shape \(720,\); give input_shape=\("
    ):
        torch_weights.load(reference.state_dict(), Vgg())


def test_images_of_16_by_64_pixels_are_ordered_as_those_of_32_by_32():
    reference = seeded(TorchVgg(3, 64))
    assert_same_network(reference, Vgg(), noise(3, 16, 64, 3))


def test_a_cut_network_behind_a_flatten(tmp_path):
    shape = (24, 20, 3)
    model, x = Vgg(), noise(3, *shape)
    variables = torch_weights.load(seeded(TorchVgg(3, 30)).state_dict(), model, shape)
    small, small_variables = cut(model, variables, shape)
    expected = small.apply(small_variables, x)
    state = torch_weights.export(small, small_variables, shape)
    loaded = torch_weights.load(state, small, shape)
    jax.tree.map(np.testing.assert_array_equal, loaded, small_variables)
    torch_weights.save(tmp_path, small, small_variables, shape)
    load = runpy.run_path(str(tmp_path / "pytorch_layers.py"))["load"]
    rebuilt = load(TorchVgg(3, 30), load_file(tmp_path / "weights.safetensors")).eval()
    np.testing.assert_allclose(torch_outputs(rebuilt, x), expected, rtol=0, atol=1e-5)


class LeNet(nn.Module):
    """Flattens to a hard-coded length, which would divide images of another size."""

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(jnp.tanh(nn.Conv(6, (5, 5), padding=2, name="conv1")(x)), (2, 2), (2, 2))
        x = nn.avg_pool(jnp.tanh(nn.Conv(16, (5, 5), padding="VALID", name="conv2")(x)), (2, 2), (2, 2))
        x = jnp.tanh(nn.Dense(20, name="fc1")(x.reshape(-1, 400)))
        return nn.Dense(10, name="fc")(x)


class TorchLeNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = tnn.Conv2d(1, 6, 5, padding=2), tnn.Conv2d(6, 16, 5)
        self.fc1, self.fc = tnn.Linear(400, 20), tnn.Linear(20, 10)

    def forward(self, x):
        for layer in (self.conv1, self.conv2):
            x = tnn.functional.avg_pool2d(torch.tanh(layer(x)), 2)
        return self.fc(torch.tanh(self.fc1(x.flatten(1))))


def test_lenet_whose_flatten_is_a_number():
    assert_same_network(seeded(TorchLeNet()), LeNet(), noise(3, 28, 28, 1))


def test_a_flatten_by_a_number_that_divides_other_images_too():
    """With images of 224 x 224 pixels, the flatten would give 64 times as many images."""

    class Divided(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), strides=4, padding=1, name="0")(x))
            return nn.Dense(5, name="3")(x.reshape(-1, 7 * 7 * 4))

    layers = [tnn.Conv2d(3, 4, 3, stride=4, padding=1), tnn.ReLU(), tnn.Flatten(), tnn.Linear(196, 5)]
    assert_same_network(seeded(tnn.Sequential(*layers)), Divided(), noise(3, 28, 28, 3))


def test_a_flatten_of_channels_first_stays():
    class First(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
            return nn.Dense(5, name="fc")(jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1))

    reference = tnn.Sequential()
    reference.add_module("conv", tnn.Conv2d(3, 4, 3, padding=1))
    reference.add_module("relu", tnn.ReLU())
    reference.add_module("flat", tnn.Flatten())
    reference.add_module("fc", tnn.Linear(4 * 48, 5))
    assert_same_network(seeded(reference), First(), noise(3, 6, 8, 3), (6, 8, 3))


class Two(nn.Module):
    """Two flattened images and a vector, concatenated."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv1")(x))
        y = nn.relu(nn.Conv(6, (3, 3), strides=2, padding=1, name="conv2")(x))
        parts = [each.reshape(each.shape[0], -1) for each in (x, y)] + [y.mean((1, 2))]
        return nn.Dense(5, name="fc")(jnp.concatenate(parts, axis=-1))


class TorchTwo(tnn.Module):
    def __init__(self, rows):
        super().__init__()
        self.conv1, self.conv2 = tnn.Conv2d(3, 4, 3, padding=1), tnn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.fc = tnn.Linear(rows, 5)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        y = torch.relu(self.conv2(x))
        return self.fc(torch.cat([x.flatten(1), y.flatten(1), y.mean((2, 3))], dim=1))


def test_several_flattened_images_on_one_axis():
    reference = seeded(TorchTwo(4 * 64 + 6 * 16 + 6))
    assert_same_network(reference, Two(), noise(3, 8, 8, 3), (8, 8, 3))
    with pytest.raises(
        ValueError, match=r"does not tell the order of the numbers in params/fc/kernel, .* input_shape="
    ):
        torch_weights.load(reference.state_dict(), Two())


def test_an_image_that_is_flattened_itself():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="3")(nn.relu(nn.Dense(9, name="1")(x.reshape(x.shape[0], -1))))

    reference = seeded(tnn.Sequential(tnn.Flatten(), tnn.Linear(4 * 6 * 3, 9), tnn.ReLU(), tnn.Linear(9, 5)))
    assert_same_network(reference, Mlp(), noise(3, 4, 6, 3), (4, 6, 3))
    for rows in (72, 48):  # the latter could be 4 x 4 x 3 or 2 x 2 x 12
        reference[1] = tnn.Linear(rows, 9)
        with pytest.raises(ValueError, match=r"give input_shape=\(H, W, C\), the shape of one image"):
            torch_weights.load(reference.state_dict(), Mlp())


def test_rows_that_cannot_be_followed_are_refused():
    """Space to depth: PyTorch has several orders for its channels."""

    class Patches(nn.Module):
        @nn.compact
        def __call__(self, x):
            n, height, width, channels = x.shape
            x = x.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
            x = x.reshape(n, height // 2, width // 2, 4 * channels)
            return nn.Dense(5, name="fc")(nn.Conv(6, (3, 3), name="conv")(x).mean((1, 2)))

    variables = Patches().init(jax.random.key(0), noise(1, 8, 8, 3))
    with pytest.raises(ValueError, match="variable params/conv/kernel holds pixels and channels on axis 2 in an order"):
        torch_weights.export(Patches(), variables)


# Images made of vectors


class Decoder(nn.Module):
    """A dense layer whose outputs become an image, and transposed convolutions."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(2 * 3 * 6, name="0")(x)).reshape(x.shape[0], 2, 3, 6)
        x = nn.relu(nn.ConvTranspose(6, (4, 4), strides=(2, 2), name="3")(x))
        return nn.ConvTranspose(3, (3, 3), strides=(2, 2), padding="VALID", transpose_kernel=True, name="5")(x)


def torch_decoder():
    return tnn.Sequential(
        tnn.Linear(7, 36),
        tnn.ReLU(),
        tnn.Unflatten(1, (6, 2, 3)),
        tnn.ConvTranspose2d(6, 6, 4, stride=2, padding=1),
        tnn.ReLU(),
        tnn.ConvTranspose2d(6, 3, 3, stride=2),
    )


def test_a_decoder(tmp_path):
    reference, x = seeded(torch_decoder()), noise(3, 7)
    variables = assert_same_network(reference, Decoder(), x, (7,))
    rebuilt = tmp_path / "rebuilt"
    torch_weights.save(rebuilt, Decoder(), variables, (7,))
    load = runpy.run_path(str(rebuilt / "pytorch_layers.py"))["load"]
    same = load(torch_decoder(), load_file(rebuilt / "weights.safetensors")).eval()
    np.testing.assert_array_equal(torch_outputs(same, x), torch_outputs(reference, x))


class Upsampling(nn.Module):
    """Convolutions down, transposed ones up again."""

    transpose_kernel: bool = False

    @nn.compact
    def __call__(self, x):
        up = {"strides": (2, 2), "transpose_kernel": self.transpose_kernel}
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, padding=1, name="0")(x))
        x = nn.relu(nn.ConvTranspose(6, (4, 4), **up, name="2")(x))
        x = nn.relu(nn.ConvTranspose(8, (2, 2), **up, use_bias=False, name="4")(x))
        return nn.Dense(4, name="8")(x.mean((1, 2)))


def torch_upsampling():
    down = tnn.Conv2d(3, 6, 3, stride=2, padding=1)
    up = tnn.ConvTranspose2d(6, 6, 4, stride=2, padding=1), tnn.ConvTranspose2d(6, 8, 2, stride=2, bias=False)
    pool = tnn.AdaptiveAvgPool2d(1), tnn.Flatten()
    return tnn.Sequential(down, tnn.ReLU(), up[0], tnn.ReLU(), up[1], tnn.ReLU(), *pool, tnn.Linear(8, 4))


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_transposed_convolutions_whole_and_cut(tmp_path, transpose_kernel):
    model, x = Upsampling(transpose_kernel), noise(3, 8, 12, 3)
    variables = assert_same_network(seeded(torch_upsampling()), model, x)
    small, small_variables = cut(model, variables, (8, 12, 3))
    rebuilt = saved_and_read(tmp_path, small, small_variables, torch_upsampling())
    expected = small.apply(small_variables, x)
    np.testing.assert_allclose(torch_outputs(rebuilt, x), expected, rtol=0, atol=1e-5)
    loaded = torch_weights.load(rebuilt.state_dict(), small)
    jax.tree.map(np.testing.assert_array_equal, loaded, small_variables)


@settings(max_examples=12, deadline=None, derandomize=True, phases=PHASES)
@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.integers(0, 3),
    added=st.integers(0, 2),
    dilation=st.integers(1, 2),
    transpose_kernel=st.booleans(),
)
def test_every_transposed_convolution(channels, kernel, stride, padding, added, dilation, transpose_kernel):
    reaches = [dilation * (k - 1) for k in kernel]
    padding, added = min(padding, *reaches), min(added, *(max(s, dilation) - 1 for s in stride))
    layer = tnn.ConvTranspose2d(*channels, kernel, stride, padding, added, dilation=dilation)
    reference = seeded(tnn.Sequential())
    reference.add_module("layer", layer)
    seeded(reference)
    layer = nn.ConvTranspose(
        channels[1],
        kernel,
        stride,
        padding=[(r - padding, r - padding + added) for r in reaches],
        kernel_dilation=(dilation, dilation),
        transpose_kernel=transpose_kernel,
    )
    assert_same_network(reference, Alone(layer), noise(2, 5, 4, channels[0]))


class Alone(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


def test_a_grouped_transposed_convolution_is_refused():
    state = {f"layer.{k}": v for k, v in tnn.ConvTranspose2d(6, 6, 3, groups=2).state_dict().items()}
    with pytest.raises(ValueError, match=r"'layer.weight' has shape \(6, 3, 3, 3\), the model's is \(6, 6, 3, 3\);"):
        torch_weights.load(state, Alone(nn.ConvTranspose(6, (3, 3))), (5, 5, 6))


@pytest.mark.parametrize("last", [False, True])
def test_channels_that_become_pixels_are_those_of_pixel_shuffle(last):
    class Shuffled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(2 * 2 * 5, (3, 3), name="0")(x)
            n, height, width, _ = x.shape
            x = x.reshape(n, height, width, 2, 2, 5).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, 5)
            return x if last else nn.Conv(2, (3, 3), name="2")(x)

    layers = [tnn.Conv2d(3, 20, 3, padding=1), tnn.PixelShuffle(2), tnn.Conv2d(5, 2, 3, padding=1)]
    reference = seeded(tnn.Sequential(*layers[: 2 if last else 3]))
    assert_same_network(reference, Shuffled(), noise(2, 5, 4, 3))


# The number of channels of the images


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 4), (8, 8, 6)])
def test_channels_of_the_images_are_those_of_the_weights(tmp_path, shape):
    class Grouped(nn.Module):
        groups: int

        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=self.groups, name="conv")(x))
            return nn.Dense(3, name="fc")(x.mean((1, 2)))

    model = Grouped(3 if shape[-1] == 6 else 1)
    x = noise(2, *shape)
    variables = model.init(jax.random.key(0), x)
    torch_weights.save(tmp_path, model, variables)
    loaded = torch_weights.load(tmp_path / "weights.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert torch_weights.layer_sizes(model, variables)["conv"]["in_channels"] == shape[-1]


def test_weights_go_into_a_model_whose_widths_are_spelled_out_or_not():
    shape = (8, 8, 3)
    variables = Vgg((6, 8)).init(jax.random.key(0), noise(1, *shape))
    state = torch_weights.export(Vgg((6, 8)), variables)
    jax.tree.map(np.testing.assert_array_equal, torch_weights.load(state, Vgg()), variables)


# flax.nnx


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Conv(3, 6, (3, 3), rngs=rngs), nnx.BatchNorm(6, rngs=rngs)])
        self.up = nnx.ConvTranspose(6, 6, (2, 2), strides=(2, 2), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(6 * 64, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.layers[1](self.layers[0](x)))
        x = nnx.max_pool(nnx.relu(self.up(x)), (2, 2), (2, 2))
        return self.fc(self.dropout(x.reshape(x.shape[0], -1)))


class TorchNnxNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.layers = tnn.ModuleList([tnn.Conv2d(3, 6, 3, padding=1), tnn.BatchNorm2d(6)])
        self.up, self.fc = tnn.ConvTranspose2d(6, 6, 2, stride=2), tnn.Linear(6 * 64, 5)

    def forward(self, x):
        x = torch.relu(self.layers[1](self.layers[0](x)))
        return self.fc(tnn.functional.max_pool2d(torch.relu(self.up(x)), 2).flatten(1))


@pytest.mark.parametrize("input_shape", [(8, 8, 3), None])
def test_nnx_modules(tmp_path, input_shape):
    class Sized(NnxNet):
        pass

    model, x = Sized(nnx.Rngs(0)), noise(3, 8, 8, 3)
    reference = seeded(TorchNnxNet())
    if input_shape is None:
        with pytest.raises(ValueError, match=r"^Sized cannot be called with square images of .*; give input_shape=\(H"):
            torch_weights.load(reference.state_dict(), model)
        return
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    loaded = torch_weights.load(reference.state_dict(), model, input_shape)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.Param)), before)
    loaded.eval()
    np.testing.assert_allclose(loaded(x), torch_outputs(reference, x), rtol=0, atol=1e-5)
    state = torch_weights.export(loaded, input_shape=input_shape)
    for name, array in state.items():
        np.testing.assert_array_equal(array, reference.state_dict()[name].numpy())
    small, _ = cut(loaded, None, input_shape)
    small.eval()
    torch_weights.save(tmp_path, small, input_shape=input_shape)
    load = runpy.run_path(str(tmp_path / "pytorch_layers.py"))["load"]
    rebuilt = load(TorchNnxNet(), load_file(tmp_path / "weights.safetensors")).eval()
    np.testing.assert_allclose(torch_outputs(rebuilt, x), small(x), rtol=0, atol=1e-5)


def test_nnx_modules_without_a_flatten_need_no_input_shape():
    model = nnx.Sequential(nnx.Conv(5, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.relu, lambda x: x.mean((1, 2)))
    reference = seeded(tnn.Sequential())
    reference.add_module("layers", tnn.Sequential(tnn.Conv2d(5, 4, 3, padding=1)))
    seeded(reference)
    loaded, x = torch_weights.load(reference.state_dict(), model), noise(2, 6, 7, 5)
    expected = torch_outputs(reference, x).clip(0).mean((1, 2))
    np.testing.assert_allclose(loaded(x), expected, rtol=0, atol=1e-5)


# Group normalization


class GroupNet(nn.Module):
    sizes: dict

    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(**self.sizes, epsilon=1e-5, name="norm")(nn.Conv(12, (3, 3), name="conv")(x))
        x = nn.GroupNorm(num_groups=1, epsilon=1e-5, name="last")(nn.Conv(8, (3, 3), name="conv2")(nn.relu(x)))
        return nn.Dense(5, name="fc")(x.mean((1, 2)))


class NnxGroupNet(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.conv2 = nnx.Conv(3, 12, (3, 3), rngs=rngs), nnx.Conv(12, 8, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(12, num_groups=4, epsilon=1e-5, rngs=rngs)
        self.last = nnx.GroupNorm(8, num_groups=1, epsilon=1e-5, rngs=rngs)
        self.fc = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.fc(self.last(self.conv2(x)).mean((1, 2)))


class TorchGroupNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.conv2 = tnn.Conv2d(3, 12, 3, padding=1), tnn.Conv2d(12, 8, 3, padding=1)
        self.norm, self.last = tnn.GroupNorm(4, 12), tnn.GroupNorm(1, 8)
        self.fc = tnn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(self.last(self.conv2(x)).mean((2, 3)))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("sizes", [{"num_groups": 4}, {"num_groups": None, "group_size": 3}, None], ids=str)
def test_cut_group_normalization_goes_to_pytorch(tmp_path, sizes, twice):
    x = noise(3, 8, 8, 3)
    model = NnxGroupNet(nnx.Rngs(0)) if sizes is None else GroupNet(sizes)
    loaded = torch_weights.load(seeded(TorchGroupNet()).state_dict(), model)
    model, variables = (loaded, None) if sizes is None else (model, loaded)
    for groups in (3, 1) if twice else (3,):
        topology = trace(model, (8, 8, 3), variables=variables)
        assert topology.widths == (4 if groups == 3 else 3,)  # whole groups
        model, variables = compact(model, variables, Selection((tuple(range(1, 1 + groups)),)), topology)
    small = saved_and_read(tmp_path, model, variables, TorchGroupNet())
    assert small.norm.num_groups == groups
    expected = model(x) if sizes is None else model.apply(variables, x)
    np.testing.assert_allclose(torch_outputs(small, x), expected, rtol=0, atol=1e-5)


# Refusals


def test_a_function_has_no_names():
    def plain(variables, images):
        return images @ variables["w"]

    with pytest.raises(ValueError, match=r"^plain is a function, and PyTorch's names are .*; give a flax\.linen or"):
        torch_weights.export(plain, {"w": np.ones((3, 3))})


def test_two_variables_of_one_name_are_refused():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(name="a")(nn.Dense(3, name="b_1")(x)) + Inner(name="b")(x)

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="1")(x)

    variables = Twice().init(jax.random.key(0), noise(1, 4, 4, 3))
    with pytest.raises(ValueError, match=r"params/b/1/bias and params/b_1/bias would both be 'b\.1\.bias' in PyTorch"):
        torch_weights.export(Twice(), variables)
