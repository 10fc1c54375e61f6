from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from ddnp_jax import models
from ddnp_jax.masking import apply_masked
from ddnp_jax.models.layers import Backbone
from ddnp_jax.topology import Consumer, Extent, Selection, Slice, Span, trace
from ddnp_jax.topology.axis_groups import AxisGroups, Constant, free

SHAPE = (16, 16, 3)


def gates_of(topology):
    """(name, channels, readers) of all gates."""
    names = [layer.name for layer in topology.layers]
    return [(g.name, g.channels, list(dict.fromkeys(names[r.layer] for r in g.consumers))) for g in topology.gates]


def gates_at(layer):
    """The one gate of a layer's inputs and of its outputs, or None."""
    return [next(iter(extent.gates), None) for extent in (layer.inputs, layer.outputs)]


def reason_of(topology, name):
    """The reason why the channels that layer `name` produces cannot be removed."""
    return "; ".join(reason for names, reason in topology.unprunable if name in names.split(", "))


@pytest.mark.parametrize("shortcut", ["subsample", "avgpool"])
def test_cifar_resnet_gates_are_the_first_convolutions_in_block_order(shortcut):
    topology = trace(models.create("resnet20", 10, shortcut=shortcut), (32, 32, 3))
    blocks = [f"layer{stage}_{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert topology.widths == (16, 16, 16, 32, 32, 32, 64, 64, 64)
    assert gates_of(topology) == [
        (f"{b}/conv1", c, [f"{b}/conv2"]) for b, c in zip(blocks, topology.widths, strict=True)
    ]
    bn = [(collection, "layer2_0", "bn1") for collection in ("batch_stats", "params")]
    assert set(topology.gates[3].slices) == {
        Slice(("params", "layer2_0", "conv1", "kernel"), 3),
        Slice((*bn[1], "scale"), 0),
        Slice((*bn[1], "bias"), 0),
        Slice((*bn[0], "mean"), 0),
        Slice((*bn[0], "var"), 0),
        Slice(("params", "layer2_0", "conv2", "kernel"), 2),
    }
    (reader,) = topology.gates[3].consumers
    assert (topology.layers[reader.layer].name, reader.axis, reader.span) == ("layer2_0/conv2", 3, Span())
    assert topology.gates[3].producers == (Slice(("params", "layer2_0", "conv1", "kernel"), 3),)
    assert "a residual addition (CifarResNet/layer1_0)" in reason_of(topology, "layer1_1/conv2")
    assert reason_of(topology, "linear") == "it is the network's output"
    assert hash(topology) == hash(trace(models.create("resnet20", 10, shortcut=shortcut), (32, 32, 3)))


def test_resnet_with_padded_shortcuts_stays_whole_outside_its_blocks_even_with_residual_gates():
    topology = trace(models.create("resnet20", 10), (32, 32, 3), residual=True)
    assert topology.widths == (16, 16, 16, 32, 32, 32, 64, 64, 64)
    assert reason_of(topology, "conv1") == "padding adds channels (CifarResNet/layer2_0)"


def test_resnet56_has_27_gates_in_block_order():
    assert trace(models.create("resnet56", 10), (32, 32, 3)).widths == (16,) * 9 + (32,) * 9 + (64,) * 9


def test_vgg():
    topology = trace(zoo.VGG(), SHAPE)
    assert gates_of(topology) == [
        ("features_0", 6, ["features_1"]),
        ("features_1", 8, ["features_2"]),
        ("features_2", 10, ["hidden"]),
        ("hidden", 12, ["classifier"]),
    ]
    assert topology.gates[2].consumers == (Consumer(3, 1, Span(outer=16, stride=10)),)
    assert Slice(("params", "hidden", "kernel"), 0, Span(outer=16, stride=10)) in topology.gates[2].slices
    assert topology.layers[3].inputs == Extent(0, ((2, 16),))
    ends = [(layer.name, layer.positions, *gates_at(layer)) for layer in topology.layers]
    assert ends == [
        ("features_0", 256, None, 0),
        ("features_1", 256, 0, 1),
        ("features_2", 64, 1, 2),
        ("hidden", 1, 2, 3),
        ("classifier", 1, 3, None),
    ]


def test_inverted_residuals_with_squeeze_excite():
    topology = trace(zoo.MobileNet(), SHAPE)
    assert gates_of(topology) == [
        ("block1/expand", 12, ["block1/se/squeeze", "block1/project"]),
        ("block1/se/squeeze", 4, ["block1/se/excite"]),
        ("block2/expand", 16, ["block2/se/squeeze", "block2/project"]),
        ("block2/se/squeeze", 5, ["block2/se/excite"]),
        ("block2/project", 10, ["head"]),
        ("head", 14, ["classifier"]),
    ]
    assert topology.gates[0].producers == (
        Slice(("params", "block1", "expand", "kernel"), 3),
        Slice(("params", "block1", "se", "excite", "kernel"), 3),
    )
    assert Slice(("params", "block1", "depthwise", "kernel"), 3) in topology.gates[0].slices
    (depthwise,) = [layer for layer in topology.layers if layer.name == "block2/depthwise"]
    assert (depthwise.groups, depthwise.positions, *gates_at(depthwise)) == (16, 16, None, 2)
    assert topology.unprunable[0] == ("stem, block1/project", "a residual addition (MobileNet/block1)")


def test_bottlenecks_with_and_without_residual_gates():
    inner = [f"stages_{i}/{name}" for i in range(3) for name in ("reduce", "spatial")]
    topology = trace(zoo.PreActResNet(), SHAPE)
    assert [g.name for g in topology.gates] == inner
    assert topology.widths == (4, 5, 6, 7, 8, 9)
    assert topology.unprunable[1][0] == "stages_1/shortcut, stages_1/widen, stages_2/widen"
    topology = trace(zoo.PreActResNet(), SHAPE, residual=True)
    assert topology.widths == (8, 4, 5, 16, 6, 7, 8, 9)
    assert gates_of(topology)[0] == ("stem", 8, ["stages_0/reduce", "stages_1/shortcut", "stages_1/reduce"])
    assert [p.path[1:-1] for p in topology.gates[0].producers] == [("stem",), ("stages_0", "widen")]


def test_what_an_unknown_operation_touches_stays_whole_and_is_named():
    topology = trace(zoo.Sorted(), SHAPE)
    assert gates_of(topology) == [("first", 6, ["second"]), ("third", 9, ["classifier"])]
    reason = "the operation `sort`, which the tracer does not know (Sorted)"
    assert topology.unprunable == (("second", reason), ("classifier", "it is the network's output"))
    text = topology.describe()
    assert "0  first: 6 channels, read by second" in text
    assert f"second: {reason}" in text
    assert "third: kernel (3, 3, 8, 9), 256 positions, to gate 1" in text


def test_a_shared_module_has_one_gate_and_counts_twice():
    topology = trace(zoo.Twice(), SHAPE)
    assert gates_of(topology) == [("first", 6, ["shared", "classifier"])]
    assert [layer.name for layer in topology.layers] == ["first", "shared", "shared", "classifier"]
    kernel = ("params", "shared", "kernel")
    assert {Slice(kernel, 2), Slice(kernel, 3)} <= set(topology.gates[0].slices)


def test_channel_multiplier_and_flatten_of_channels_first():
    topology = trace(zoo.Multiplier(), SHAPE)
    assert gates_of(topology) == [("first", 6, ["classifier"])]
    assert topology.gates[0].consumers == (Consumer(2, 1, Span(inner=2 * 4 * 4)),)
    assert Slice(("params", "depthwise", "kernel"), 3, Span(inner=2)) in topology.gates[0].slices


def test_layers_in_a_loop_are_refused():
    with pytest.raises(ValueError, match=r"inside `scan` \(Stacked\) cannot be counted"):
        trace(zoo.Stacked(), SHAPE)


def test_layers_behind_a_condition_are_refused_and_behind_the_platform_followed():
    class Branch(nn.Module):
        choose: Any

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 4))
            branches = (lambda x, kernel: x @ kernel, lambda x, kernel: 1 * (x @ kernel))
            return nn.Dense(7, name="classifier")(self.choose(x.mean((1, 2)), kernel, *branches))

    def by_platform(x, kernel, first, second):
        return jax.lax.platform_dependent(x, kernel, cpu=second, tpu=second, default=first)

    topology = trace(Branch(by_platform), SHAPE)
    assert [(layer.name, layer.kernel_shape) for layer in topology.layers] == [
        ("kernel", (3, 4)),
        ("classifier", (4, 7)),
    ]
    with pytest.raises(ValueError, match=r"inside `cond` .* cannot be counted"):
        trace(Branch(lambda x, kernel, *branches: jax.lax.cond(x.sum() > 0, *branches, x, kernel)), SHAPE)


class Sized(Backbone):
    """Two hidden layers, of which `widths` sizes the second."""

    def whole_widths(self):
        return (8,)

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="first")(x.mean((1, 2))))
        return nn.Dense(7, name="classifier")(nn.relu(nn.Dense(self.widths[0], name="second")(x)))


def test_the_widths_of_a_model_of_this_library_say_what_is_a_gate():
    topology = trace(Sized(7), SHAPE)
    assert gates_of(topology) == [("second", 8, ["classifier"])]
    assert reason_of(topology, "first") == "the model's `widths` do not size it"
    both = [("first", 6, ["second"]), ("second", 8, ["classifier"])]
    assert gates_of(trace(Sized(7), SHAPE, residual=True)) == both


def mean(x):
    return x.mean((1, 2))


GATED = {
    "gelu": lambda x: mean(nn.gelu(x)),
    "spatial pad, stride and slice": lambda x: mean(jnp.pad(x[:, ::2, 1:], ((0, 0), (1, 2), (0, 3), (0, 0)))),
    "spatial flip": lambda x: mean(x[:, ::-1]),
    "average and maximum pool": lambda x: mean(nn.avg_pool(x, (2, 2)) + nn.max_pool(x, (2, 2))),
    "depthwise": lambda x: mean(nn.Conv(8, (3, 3), feature_group_count=8)(x)),
    "product of two layers": lambda x: mean(x * nn.sigmoid(nn.Conv(8, (1, 1), name="other")(x))),
    "bfloat16": lambda x: nn.Dense(5, dtype=jnp.bfloat16)(mean(x)),
    "spatial softmax": lambda x: (x * nn.softmax(x, axis=(1, 2))).sum((1, 2)),
    "instance norm": lambda x: mean((x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)),
    "own kernel": lambda x: zoo.OwnKernel(5)(mean(x)),
    "zeros added before reading": lambda x: mean(
        zoo.OwnKernel(5, lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))))(x)
    ),
    "jit": lambda x: nn.jit(nn.Dense)(5)(mean(x)),
    "two readers": lambda x: nn.Dense(5)(mean(x)) * nn.Dense(5)(mean(x)),
    "group norm, by groups": lambda x: mean(nn.GroupNorm(2)(x)),
    "concatenation": lambda x: mean(jnp.concatenate([x, nn.relu(-x)], -1)),
    "computed kernel": lambda x: zoo.OwnKernel(5, kernel_map=lambda k: k * 2)(mean(x)),
    "vmap": zoo.over_rows,
    "activation inside the reader": lambda x: zoo.OwnKernel(5, nn.relu)(mean(x)),
    "subclass that changes its input": lambda x: zoo.ShiftedDense(5)(mean(x)),
    "subclass that hands its input on": lambda x: zoo.HandedOn(5)(mean(x)),
    "keyword argument": lambda x: nn.Dense(5)(inputs=mean(x)),
    "attend": lambda x: nn.Embed(5, 8).attend(mean(x)),
    "two layouts": zoo.two_layouts,
    "two masks would meet": lambda x: zoo.OwnKernelAndDense()(mean(x)),
    "ones added inside the reader": lambda x: mean(
        zoo.OwnKernel(5, lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=1))(x)
    ),
    "blur with a constant kernel": lambda x: mean(zoo.blur(x)),
    "resized image": lambda x: mean(jax.image.resize(x, (x.shape[0], 31, 9, x.shape[-1]), "bilinear")),
    "resized image, nearest": lambda x: mean(jax.image.resize(x, (x.shape[0], 31, 9, x.shape[-1]), "nearest")),
}


@pytest.mark.parametrize("name", GATED)
def test_channels_that_stay_apart_are_a_gate(name):
    topology = trace(zoo.Middle(GATED[name]), SHAPE)
    channels = 2 if "groups" in name else 8
    assert ("conv", channels) in [(g.name, g.channels) for g in topology.gates]


WHOLE = {
    "layer norm": (lambda x: mean(nn.LayerNorm()(x)), "`reduce_sum` mixes its channels"),
    "softmax": (lambda x: nn.softmax(mean(x)), "`reduce_max` mixes its channels"),
    "running sum": (lambda x: jnp.cumsum(mean(x), -1), "the operation `cumsum`"),
    "split": (lambda x: mean(jnp.split(x, 2, -1)[0]), "a split"),
    "slice": (lambda x: mean(x[..., 2:]), "a slice takes a part of it"),
    "standardized kernel": (lambda x: mean(zoo.standardized(x)), "as in weight standardization, mixes its channels"),
    "constant product": (lambda x: mean(x @ np.ones((8, 5), np.float32)), "a constant array of fixed size"),
    "divided concatenation": (
        lambda x: mean(jnp.concatenate([x, nn.Conv(4, (1, 1))(x)], -1).reshape(*x.shape[:-1], 4, 3)[..., 0]),
        "a reshape divides",
    ),
    "flip": (lambda x: mean(x[..., ::-1]), "its order is reversed"),
    "shift": (lambda x: mean(jax.lax.pad(x, 0.0, ((0, 0, 0),) * 3 + ((1, -1, 0),))), "padding adds channels"),
    "shuffle": (
        lambda x: mean(jnp.swapaxes(x.reshape(*x.shape[:3], 2, 4), 3, 4).reshape(x.shape)),
        "a reshape divides its channels",
    ),
    "depth to space": (
        lambda x: mean(x.reshape(*x.shape[:3], 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 32, 32, 2)),
        "a reshape divides its channels",
    ),
    "constant": (lambda x: mean(x * np.arange(8, dtype=np.float32).reshape(1, 1, 1, 8)), "a constant array"),
    "iota": (lambda x: mean(x * jnp.arange(8.0).reshape(1, 1, 1, 8)), "a constant array"),
    "channels pooled": (lambda x: mean(nn.max_pool(x[..., None], (1, 1, 2))[..., 0]), "pooling mixes its channels"),
    "channels as space": (
        lambda x: nn.Conv(5, (3, 3))(jnp.swapaxes(x, 2, 3)).mean((1, 2)),
        "it is a spatial axis of a convolution",
    ),
    "attention": (lambda x: mean(jnp.einsum("nhwc,nhvc->nhwv", x, x)), "`dot_general` of two activations"),
    "residual": (lambda x: mean(x + nn.Conv(8, (3, 3))(x)), "a residual addition"),
    "maximum of two layers": (lambda x: mean(jnp.maximum(x, nn.Conv(8, (3, 3))(x))), "a residual addition"),
    "outer product of two layers": (lambda x: zoo.outer(mean(x), nn.Dense(5)(mean(x))), "an axis holds two kinds"),
    "outer product with itself": (lambda x: zoo.outer(mean(x), mean(x)), "an axis holds two kinds"),
    "many output axes": (
        lambda x: nn.DenseGeneral((5, 2))(mean(x)).reshape(-1, 10),
        "its kernel has more than an input and an output axis",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_not_understood_stays_whole(name):
    middle, reason = WHOLE[name]
    topology = trace(zoo.Middle(middle), SHAPE)
    assert "conv" not in [g.name for g in topology.gates]
    assert reason in reason_of(topology, "conv")


def test_a_kernel_of_two_parameters_produces_nothing_that_could_be_scored():
    topology = trace(zoo.Middle(lambda x: zoo.two_kernels(mean(x))), SHAPE)
    assert gates_of(topology) == [("conv", 8, ["Middle/TwoKernels_0"])]
    assert reason_of(topology, "Middle/TwoKernels_0") == "its kernel is computed from several parameters"


def test_a_single_name_is_kept():
    assert trace(zoo.VGG(), SHAPE, keep="hidden") == trace(zoo.VGG(), SHAPE, keep=iter(["hidden"]))
    assert len(trace(zoo.VGG(), SHAPE, keep="hidden").gates) == 3
    with pytest.raises(ValueError, match=r"^keep names 'hid', which is not a gate"):
        trace(zoo.VGG(), SHAPE, keep="hid")


def test_call_kwargs_that_cannot_be_hashed_are_refused():
    class Sized(nn.Module):
        @nn.compact
        def __call__(self, x, sizes):
            return nn.Dense(sizes[0])(x)

    assert trace(Sized(), SHAPE, sizes=(2,)).call_kwargs == (("sizes", (2,)),)
    with pytest.raises(ValueError, match=r"^the network's argument sizes=\[2\] must be hashable; give a tuple inst"):
        trace(Sized(), SHAPE, sizes=[2])


def test_call_kwargs_and_other_inputs_reach_the_model():
    class Switch(nn.Module):
        @nn.compact
        def __call__(self, x, deep):
            x = nn.Conv(4, (3, 3))(x)
            return nn.Dense(7)((nn.Conv(5, (3, 3))(x) if deep else x).mean((1, 2)))

    assert trace(Switch(), SHAPE, deep=True).widths == (4, 5)
    assert trace(Switch(), SHAPE, deep=False).widths == (4,)


class Probe(nn.Module):
    """Dense layers whose logits can be computed by hand."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, use_bias=False, name="out")(nn.Dense(3, use_bias=False, name="in")(x))


def test_apply_masked_by_hand():
    variables = {
        "params": {
            "in": {"kernel": jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])},
            "out": {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0], [10.0, 0.0]])},
        }
    }
    topology = trace(Probe(), (2,))
    x = jnp.array([[1.0, 4.0]])  # hidden: 1, 6, 3
    observed = {}
    observe = observed.__setitem__

    def logits(mask):
        return apply_masked(Probe(), variables, x, (mask,), topology, observe=observe)

    np.testing.assert_array_equal(logits(jnp.array([1.0, 0.5, 0.0])), [[1.0, 3.0]])
    np.testing.assert_array_equal(observed[0], [[1.0, 6.0, 3.0]])
    gradient = jax.jacobian(logits)(jnp.array([1.0, 0.5, 0.0]))
    np.testing.assert_array_equal(gradient[0], [[1.0, 0.0, 30.0], [0.0, 6.0, 0.0]])


def test_masks_gradient_forms_no_weight_gradient():
    model = zoo.VGG()
    variables, topology = zoo.randomized(model, (8, 8, 3)), trace(model, (8, 8, 3))

    def loss(masks):
        return apply_masked(model, variables, jnp.ones((5, 8, 8, 3)), masks, topology).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(tuple(map(jnp.ones, topology.widths)))
    results = [eqn.outvars[0].aval.shape for eqn in jaxpr.eqns if "conv_general" in eqn.primitive.name]
    assert len(results) == 5  # three forward, two backward to the inputs
    assert all(shape[0] == 5 for shape in results)


def test_functions_with_their_own_derivative_keep_it():
    """At 0 flax's ReLU has the derivative 0, and a maximum has the derivative 1/2."""

    class AtZero(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(3, use_bias=False, name="second")(nn.Dense(2, use_bias=False, name="first")(x)))
            return nn.Dense(1, use_bias=False, name="out")(x)

    topology = trace(AtZero(), (1,))
    kernels = {"first": [[1.0, 1.0]], "second": [[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]], "out": [[1.0], [1.0], [1.0]]}
    variables = {"params": {name: {"kernel": jnp.array(kernel)} for name, kernel in kernels.items()}}

    def output(mask):
        return apply_masked(AtZero(), variables, jnp.ones((1, 1)), (mask, jnp.ones(3)), topology)[0, 0]

    np.testing.assert_array_equal(jax.grad(output)(jnp.ones(2)), [1.0, 1.0])  # with halves: [2, 0]


def test_rematerialization_stays_around_masked_layers():
    model = zoo.MobileNet()
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE)
    masks = tuple(map(jnp.ones, topology.widths))

    def loss(masks):
        return apply_masked(model, variables, jnp.ones((2, *SHAPE)), masks, topology).sum()

    assert "remat" in str(jax.make_jaxpr(loss)(masks)) or "checkpoint" in str(jax.make_jaxpr(loss)(masks))
    seen = []
    apply_masked(
        model,
        variables,
        jnp.ones((2, *SHAPE)),
        masks,
        topology,
        observe=lambda gate, x: seen.append((gate, x.shape[-1])),
    )
    assert dict(seen) == dict(enumerate(topology.widths))


def test_another_program_than_the_traced_one_is_refused():
    class Order(nn.Module):
        widths_first: bool

        @nn.compact
        def __call__(self, x):
            for features in (4, 6) if self.widths_first else (6, 4):
                x = nn.relu(nn.Conv(features, (1, 1), name=f"conv{features}")(x))
            return nn.Dense(3)(x.mean((1, 2)))

    topology = trace(Order(True), SHAPE)
    other = zoo.randomized(Order(False), SHAPE)
    masks = tuple(map(jnp.ones, topology.widths))
    with pytest.raises(
        ValueError, match=r"a kernel has shape \(1, 1, 6, 4\) instead of \(1, 1, 4, 6\); trace the network again"
    ):
        apply_masked(Order(False), other, jnp.ones((1, *SHAPE)), masks, topology)


def test_apply_masked_keeps_the_data_type_and_observes_channels_last():
    model = zoo.Multiplier()
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE)
    seen = []
    apply_masked(
        model,
        variables,
        jnp.ones((2, *SHAPE)),
        (jnp.ones(6, jnp.bfloat16),),
        topology,
        observe=lambda gate, x: seen.append((gate, x.shape, x.dtype)),
    )
    assert seen == [(0, (2, 32, 6), jnp.float32)]


def test_the_observed_channels_of_a_concatenation_and_of_another_axis_order_are_last():
    class Joined(nn.Module):
        @nn.compact
        def __call__(self, x):
            parts = [nn.Conv(features, (1, 1), name=f"conv{features}")(x) for features in (4, 3)]
            x = jnp.moveaxis(jnp.concatenate(parts, -1), -1, 1)
            return jax.lax.conv(x, self.param("head", nn.initializers.ones, (2, 7, 1, 1)), (1, 1), "VALID")

    topology, variables = trace(Joined(), SHAPE), zoo.randomized(Joined(), SHAPE)
    x = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    seen = {}
    apply_masked(Joined(), variables, x, tuple(map(jnp.ones, topology.widths)), topology, observe=seen.setdefault)
    for gate, name in enumerate(("conv4", "conv3")):
        weights = variables["params"][name]
        np.testing.assert_allclose(seen[gate], x @ weights["kernel"][0, 0] + weights["bias"], rtol=1e-4, atol=1e-5)


def test_apply_masked_names_what_does_not_fit():
    model, topology = zoo.VGG(), trace(zoo.VGG(), SHAPE)
    masks = [jnp.ones(n) for n in topology.widths]
    x = jnp.ones((1, *SHAPE))
    with pytest.raises(ValueError, match="3 masks were given; the network has 4 gates"):
        apply_masked(model, {}, x, masks[:3], topology)
    with pytest.raises(ValueError, match=r"gate hidden: the mask has shape \(11,\), not \(12,\)"):
        apply_masked(model, {}, x, [*masks[:3], jnp.ones(11)], topology)
    with pytest.raises(ValueError, match=r"traced for \(16, 16, 3\)"):
        apply_masked(model, {}, jnp.ones((1, 32, 32, 3)), masks, topology)


def test_selection_masks_and_file(tmp_path):
    topology = trace(zoo.VGG(), SHAPE)
    selection = Selection(((0, 5), (7,), tuple(range(10)), (1, 2, 3)))
    assert selection.widths == (2, 1, 10, 3)
    masks = selection.masks(topology)
    assert masks[0].dtype == np.float32
    np.testing.assert_array_equal(masks[0], [1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(masks[1], [0, 0, 0, 0, 0, 0, 0, 1])
    selection.save(tmp_path / "selection.json")
    assert Selection.load(tmp_path / "selection.json") == selection
    assert [path.name for path in tmp_path.iterdir()] == ["selection.json"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"kept": 3}', '{"kept": [[1.5]]}', '{"kept": [["1"]]}', '{"kept": ["1"]}']
)
def test_damaged_selection_files_are_refused(tmp_path, text):
    file = tmp_path / "selection.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"selection\.json does not hold a selection"):
        Selection.load(file)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (((0,),) * 3, "the selection has 3 gates, the network 4"),
        (((0,), (), (0,), (0,)), "gate features_1: no channel is kept"),
        (((0,), (0,), (2, 1), (0,)), "gate features_2: kept channels must be ascending"),
        (((0,), (0,), (1, 1), (0,)), "gate features_2: kept channels must be ascending"),
        (((0,), (0,), (0,), (0, 12)), r"gate hidden: kept channels must be in 0\.\.11"),
        (((-1, 0), (0,), (0,), (0,)), r"gate features_0: kept channels must be in 0\.\.5"),
    ],
)
def test_selections_that_do_not_fit_are_refused(kept, message):
    with pytest.raises(ValueError, match=message):
        Selection(kept).check(trace(zoo.VGG(), SHAPE))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 4), min_size=2, max_size=4), st.data())
def test_reshapes_carry_channels_to_where_numpy_does(shape, data):
    """Random reshapes and transposes: the positions from the groups are those of each channel's values."""
    groups = AxisGroups()
    axes, channel = tuple(groups.new(n) for n in shape), data.draw(st.integers(0, len(shape) - 1))
    (wanted,) = axes[channel]
    array = np.broadcast_to(
        np.arange(shape[channel]).reshape([-1 if i == channel else 1 for i in range(len(shape))]), shape
    )
    order = data.draw(st.permutations(range(len(shape))))
    axes, array = tuple(axes[i] for i in order), array.transpose(order)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(shape) - 1))))
    parts = np.split(np.array(array.shape), cuts)
    merged = tuple(int(np.prod(part)) for part in parts)
    axes, array = groups.reshape(axes, merged), array.reshape(merged)
    ((i, span),) = [(i, span) for i, axis in enumerate(axes) for part, span in groups.places(axis) if part == wanted]
    positions = span.positions(shape[channel])
    along = np.moveaxis(array, i, 0).reshape(merged[i], -1)  # a channel's positions hold its number everywhere
    for number, found in enumerate(positions):
        np.testing.assert_array_equal(np.sort(found), np.flatnonzero((along == number).all(1)))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_concatenations_and_reshapes_carry_channels_to_where_numpy_does(data):
    """Arrays whose rows hold channels are repeatedly flattened and concatenated at random."""
    groups = AxisGroups()
    pieces, names = [], {}
    for _ in range(data.draw(st.integers(1, 3))):
        rows, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 4))
        axis = groups.new(channels)
        numbers = 10 * len(names) + np.arange(channels)
        names[axis[0]] = numbers
        pieces.append((free(rows) + axis, np.tile(numbers, rows)))
    for _ in range(data.draw(st.integers(1, 3))):
        chosen = data.draw(st.lists(st.sampled_from(range(len(pieces))), min_size=1, max_size=3))
        repeats = data.draw(st.integers(1, 3))
        axis = groups.concatenate([pieces[i][0] for i in chosen])
        numbers = np.concatenate([pieces[i][1] for i in chosen])
        (axis,) = groups.reshape((free(repeats), axis), (repeats * len(numbers),))
        pieces.append((axis, np.tile(numbers, repeats)))
    axis, numbers = pieces[-1]
    found = np.full(len(numbers), -1)
    for part, span in groups.places(axis):
        positions = span.positions(part.size)
        assert (found[positions] == -1).all()  # no position is given twice
        found[positions] = names[part][:, None]
    np.testing.assert_array_equal(found, numbers)


def test_concatenations_meet():
    groups = AxisGroups()
    a, b, c, d, scale = (groups.new(n) for n in (4, 6, 4, 6, 10))
    first, second = groups.concatenate([a, b]), groups.concatenate([c, d])
    groups.join(scale, first)
    groups.join(first, second)  # segment by segment
    assert groups.factors(a) == groups.factors(c)
    assert groups.factors(b) == groups.factors(d)
    assert [(part.size, span.start) for part, span in groups.places(scale)] == [(4, 0), (6, 4)]
    groups.keep_whole(second, "a reason")
    assert groups.live(scale) == []
    other = groups.concatenate([groups.new(5), groups.new(5)])
    fresh = groups.concatenate([groups.new(4), groups.new(6)])
    groups.join(other, fresh)
    assert groups.live(other) == groups.live(fresh) == []


def test_a_concatenation_is_divided_into_groups():
    groups = AxisGroups()
    a, b = groups.new(4), groups.new(6)
    heads, inner = groups.reshape((groups.concatenate([a, b]),), (5, 2))
    assert [(part.size, span.start) for part, span in groups.places(heads)] == [(2, 0), (3, 2)]
    (first, shared), (second, again) = groups.factors(a), groups.factors(b)
    assert (first.size, second.size) == (2, 3)
    assert (shared,) == (again,) == groups.factors(inner)
    uneven = groups.concatenate([groups.new(3), groups.new(3)])
    groups.reshape((uneven,), (3, 2))
    assert groups.live(uneven) == []


def test_joining_divides_the_group_that_was_flattened():
    groups = AxisGroups()
    h, c, flat = groups.new(4, "space"), groups.new(6), groups.new(24)
    groups.join(h + c, flat)
    assert groups.factors(flat) == (*groups.factors(h), *groups.factors(c))
    assert [bool(groups.reasons(f.group)) for f in groups.factors(flat)] == [True, False]
    whole = groups.new(24, "a reason")
    groups.reshape((whole,), (4, 6))
    assert [groups.reasons(f.group) for f in groups.factors(whole)] == [{"a reason": ""}] * 2
    other = groups.new(24)
    groups.join(groups.new(6) + groups.new(4), other)
    groups.join(other, flat)  # (6, 4) against (4, 6): 4 and 6 do not divide each other
    assert all(groups.reasons(f.group) for f in groups.factors(flat) + groups.factors(other))
    assert groups.join((Constant(5),), left := groups.new(5)) == left


def flattened(model, shape=SHAPE):
    """The flattened images on the axes of the variables, by path."""
    variables = trace(model, shape).variables
    return {
        "/".join(v.path[1:]): [(each.axis, each.start, each.parts) for each in v.flattened]
        for v in variables
        if v.flattened
    }


def test_rows_behind_a_flatten_are_known_as_pixels_and_channels():
    assert flattened(zoo.VGG()) == {"hidden/kernel": [(0, 0, ((16, True), (10, False)))]}
    assert flattened(zoo.Multiplier(), (4, 6, 3))["classifier/kernel"][0][2][0][1] is False  # channels first
    for model in (zoo.MobileNet(), zoo.PreActResNet(), models.create("shufflenet_v2_plus_small", 10)):
        assert flattened(model, (32, 32, 3)) == {}


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (
            np.zeros((2, 8, 8, 3)),
            "input_shape must be the shape of one image, as in (32, 32, 3); of an array, array.shape[1:].",
        ),
        ((8, 8, 3.0), "input_shape must be the shape of one image, as in (32, 32, 3); of an array, array.shape[1:]."),
        (
            (1, 8, 8, 3),
            "input_shape=(1, 8, 8, 3) begins with 1; give the shape of one image, without an axis for the batch: "
            "(8, 8, 3).",
        ),
    ],
)
def test_what_is_not_the_shape_of_one_image_is_refused(shape, sentence):
    with pytest.raises(ValueError) as error:
        trace(models.create("resnet20", 10), shape)
    assert str(error.value) == sentence


def test_residual_additions_come_with_the_way_to_include_them():
    advice = "residual=True (--residual, or budget.residual of a configuration) includes residual additions."
    assert f"\n  {advice}\nsummary: " in trace(models.create("resnet20", 10), (32, 32, 3)).describe()
    assert advice not in trace(models.create("resnet20", 10), (32, 32, 3), residual=True).describe()
